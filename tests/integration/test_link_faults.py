"""The link against brokers that do not what they should: silent, wrong, gone, or malicious (FAULTS C)."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import AsyncIterator

import pytest

from cloud_sync import link as link_module
from cloud_sync.link import Link
from cloud_sync.messages import LinkSettings, Message
from tests.support.raw_broker import (
    CONNECT,
    PUBACK,
    PUBLISH,
    SUBSCRIBE,
    Packet,
    RawBroker,
    connack,
    kindly,
    packet,
    puback,
    publish,
    suback,
)


class Ear:
    """A link under test and what it took."""

    def __init__(self, broker: RawBroker, *, receive_maximum: int = 100) -> None:
        self.messages: list[Message] = []
        self.ups = 0
        self.downs = 0
        settings = LinkSettings(port=broker.port, client_id="box", max_backoff_s=0.0, receive_maximum=receive_maximum)
        self.link = Link(settings, on_message=self.take, on_up=self._up, on_down=self._down)
        self.link.subscribe("spillway/kitchen/infer/+", 1)

    def take(self, message: Message) -> None:
        self.messages.append(message)

    def _up(self) -> None:
        self.ups += 1

    def _down(self) -> None:
        self.downs += 1

    async def takes(self, number: int) -> list[Message]:
        """Wait until so many messages have come."""
        async with asyncio.timeout(10):
            while len(self.messages) < number:  # noqa: ASYNC110 - a look now and then is enough for a test
                await asyncio.sleep(0.005)
        return self.messages


@contextlib.asynccontextmanager
async def listening(broker: RawBroker, *, up: bool = True) -> AsyncIterator[Ear]:
    """Run a link against the broker; it must still run at the end."""
    ear = Ear(broker)
    task = asyncio.create_task(ear.link.run())
    try:
        if up:
            await asyncio.wait_for(ear.link.wait_up(), 10)
        yield ear
        assert not task.done(), "the link's task ended"
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_pubacks_leave_in_the_order_of_arrival_however_requests_are_settled() -> None:
    async with RawBroker() as broker, listening(broker) as ear:
        broker.send(b"".join(publish(b"spillway/kitchen/infer/m", b"%d" % mid, mid) for mid in (1, 2, 3, 4)))
        first, second, third, fourth = await ear.takes(4)
        for message in (third, second):
            ear.link.acknowledge(message)
        await asyncio.sleep(0.05)
        assert broker.kinds(PUBACK) == []
        ear.link.acknowledge(first)
        assert [one.mid for one in await broker.hears(PUBACK, 3)] == [1, 2, 3]
        ear.link.acknowledge(fourth)
        assert [one.mid for one in await broker.hears(PUBACK, 4)] == [1, 2, 3, 4]


async def test_c3_what_was_settled_while_the_link_was_down_is_not_acknowledged_for_another() -> None:
    async with RawBroker() as broker, listening(broker) as ear:
        broker.send(publish(b"spillway/kitchen/infer/m", b"old", 1))
        (old,) = await ear.takes(1)
        broker.cut()
        await broker.hears(SUBSCRIBE, 2)
        broker.send(publish(b"spillway/kitchen/infer/m", b"new", 1))
        await ear.takes(2)
        ear.link.acknowledge(old)
        await asyncio.sleep(0.05)
        assert broker.kinds(PUBACK) == []
        ear.link.acknowledge(ear.messages[1])
        await broker.hears(PUBACK, 1)


async def test_c6_a_publish_cut_off_before_its_puback_is_sent_again_marked_and_under_its_id() -> None:
    def forgetful(heard: Packet) -> bytes:
        return b"" if heard.kind == PUBLISH and heard.connection == 1 else kindly(heard)

    async with RawBroker(forgetful) as broker, listening(broker) as ear:
        done = ear.link.publish("spillway/kitchen/reply/me/m", b"answer", qos=1)
        (first,) = await broker.hears(PUBLISH, 1)
        broker.cut()
        await asyncio.wait_for(done, 10)
        again = broker.kinds(PUBLISH)[1]
        assert (again.mid, again.duplicate, first.duplicate) == (first.mid, True, False)


async def test_c6_a_publish_into_a_socket_that_is_dying_is_not_given_up() -> None:
    async with RawBroker() as broker, listening(broker) as ear:
        broker.cut()
        await asyncio.sleep(0)
        pending = [ear.link.publish("spillway/kitchen/reply/me/m", b"answer", qos=1) for _ in range(3)]
        time.sleep(0.01)  # noqa: ASYNC251 - the loop must not notice yet
        pending += [ear.link.publish("spillway/kitchen/reply/me/m", b"answer", qos=1) for _ in range(3)]
        assert not any(done.done() for done in pending)
        await asyncio.wait_for(asyncio.gather(*pending), 10)


async def test_a_publish_while_the_link_is_down_waits_at_qos_1_and_fails_at_qos_0() -> None:
    async with RawBroker() as broker, listening(broker, up=False) as ear:
        waiting = ear.link.publish("spillway/kitchen/status", b"online", qos=1)
        with pytest.raises(ConnectionError):
            await ear.link.publish("spillway/kitchen/reply/me/m", b"answer", qos=0)
        await asyncio.wait_for(waiting, 10)


async def test_c7_a_connack_that_never_comes_is_waited_for_and_tried_again_at_most_once_a_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link_module, "CONNECT_TIMEOUT_S", 0.1)
    async with RawBroker(lambda _: b"") as broker, listening(broker, up=False) as ear:
        connects = await broker.hears(CONNECT, 3)
        assert all(later.at - earlier.at >= 1 for earlier, later in itertools.pairwise(connects))
        assert ear.ups == 0


async def test_c9_a_connection_that_is_refused_is_tried_again() -> None:
    await asyncio.gather(*(_refused_at_first(reason) for reason in (0x80, 0x85, 0x87, 0x89, 0x9F)))


async def _refused_at_first(reason: int) -> None:
    def at_first(heard: Packet) -> bytes:
        return connack(reason) if heard.kind == CONNECT and heard.connection == 1 else kindly(heard)

    async with RawBroker(at_first) as broker, listening(broker):
        assert broker.connections == 2


async def test_c9_a_subscription_that_is_refused_or_answered_with_nothing_is_asked_for_again() -> None:
    await asyncio.gather(*(_unsubscribed_at_first(reasons) for reasons in ((0x80,), (0x87,), ())))


async def _unsubscribed_at_first(reasons: tuple[int, ...]) -> None:
    def at_first(heard: Packet) -> bytes:
        return suback(heard, *reasons) if heard.kind == SUBSCRIBE and heard.connection == 1 else kindly(heard)

    async with RawBroker(at_first) as broker, listening(broker) as ear:
        await broker.hears(SUBSCRIBE, 2)
        broker.send(publish(b"spillway/kitchen/infer/m", b"x"))
        await ear.takes(1)


async def test_a_filter_that_the_link_can_do_without_may_be_refused() -> None:
    def choosy(heard: Packet) -> bytes:
        granted = 0x87 if b"sensors/+" in heard.body else 1
        return suback(heard, granted) if heard.kind == SUBSCRIBE else kindly(heard)

    told: list[str] = []
    async with RawBroker(choosy) as broker, listening(broker) as ear:
        await broker.hears(SUBSCRIBE, 1)
        ear.link.subscribe("sensors/+", 1, on_refused=told.append)
        await broker.hears(SUBSCRIBE, 2)
        broker.send(publish(b"spillway/kitchen/infer/m", b"x"))
        await ear.takes(1)
        assert broker.connections == 1
        assert [words.lower() for words in told] == ["not authorized"]


async def test_c10_after_each_reconnection_the_subscriptions_are_made_again() -> None:
    async with RawBroker() as broker, listening(broker) as ear:
        await broker.hears(SUBSCRIBE, 1)
        broker.cut()
        first, second = await broker.hears(SUBSCRIBE, 2)
        assert first.body[2:] == second.body[2:]
        assert (ear.ups, ear.downs) == (2, 1)


async def test_c11_who_is_taken_over_waits_long_before_it_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    ceilings: list[float] = []

    def longest(low: float, high: float) -> float:
        ceilings.append(high)
        return low

    monkeypatch.setattr(random, "uniform", longest)
    async with RawBroker() as broker:
        link = Link(LinkSettings(port=broker.port, client_id="box", max_backoff_s=60.0), on_message=lambda _: None)
        task = asyncio.create_task(link.run())
        await asyncio.wait_for(link.wait_up(), 10)
        broker.send(packet(14, b"\x8e\x00"))
        await broker.hears(CONNECT, 2)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert ceilings[0] >= 32


@pytest.mark.parametrize("topic", [b"spillway/\xff\xfe", b"\xed\xa0\x80"])
async def test_c16_a_topic_that_is_no_utf_8_is_dropped_counted_and_acknowledged(topic: bytes) -> None:
    async with RawBroker() as broker, listening(broker) as ear:
        broker.send(publish(topic, b"x", 1) + publish(b"spillway/kitchen/infer/m", b"y", 2))
        (message,) = await ear.takes(1)
        ear.link.acknowledge(message)
        assert [one.mid for one in await broker.hears(PUBACK, 2)] == [1, 2]
        assert (ear.link.dropped, broker.connections) == (1, 1)


MALFORMED = [
    b"\x08\xff\xff",  # a response topic longer than the packet
    b"\x7f",  # no such property
    b"\x01\x01\x01\x01",  # a property twice
    b"\x09\x00\x05ab",  # correlation data cut off
    b"\x26\x00\x01\xff\x00\x01a",  # a user property that is no UTF-8
    b"\x02\x00",  # an expiry cut off
]


async def test_c17_malformed_properties_end_the_connection_or_nothing_and_never_the_link() -> None:
    await asyncio.gather(*map(_malformed, MALFORMED))


async def _malformed(properties: bytes) -> None:
    async with RawBroker() as broker, listening(broker) as ear:
        await broker.hears(SUBSCRIBE, 1)
        broker.send(publish(b"spillway/kitchen/infer/m", b"x", 1, properties=properties))
        broker.send(b"")
        await asyncio.sleep(0.1)
        if broker.connections == 1 and not ear.link.connected:
            await broker.hears(SUBSCRIBE, 2)
        async with asyncio.timeout(5):
            while not ear.link.connected:  # noqa: ASYNC110 - a look now and then is enough for a test
                await asyncio.sleep(0.01)


NOT_MQTT = [b"\xff\xff\xff\xff\xff\xff", b"\x00\x00", b"\x30\xff\xff\xff\x7f", b"\xf0\x02\x99\x00", b"\x20\x00"]


async def test_c17_bytes_that_are_no_mqtt_never_end_the_link() -> None:
    await asyncio.gather(*map(_not_mqtt, NOT_MQTT))


async def _not_mqtt(data: bytes) -> None:
    async with RawBroker() as broker, listening(broker):
        broker.send(data)
        await asyncio.sleep(0.1)
        broker.cut()
        await broker.hears(SUBSCRIBE, 2)


async def test_c23_never_more_is_in_flight_than_the_server_s_receive_maximum() -> None:
    def one_at_a_time(heard: Packet) -> bytes:
        if heard.kind == CONNECT:
            return connack(0, b"\x21\x00\x01")
        return b"" if heard.kind == PUBLISH else kindly(heard)

    async with RawBroker(one_at_a_time) as broker, listening(broker) as ear:
        pending = [ear.link.publish("spillway/kitchen/reply/me/m", b"%d" % number, qos=1) for number in range(3)]
        for number in range(1, 4):
            heard = await broker.hears(PUBLISH, number)
            await asyncio.sleep(0.05)
            assert len(broker.kinds(PUBLISH)) == number
            broker.send(puback(heard[-1].mid))
        await asyncio.wait_for(asyncio.gather(*pending), 5)


async def test_a_publish_that_the_broker_refuses_ends_in_an_error() -> None:
    def refuse(heard: Packet) -> bytes:
        return packet(PUBACK, heard.mid.to_bytes(2, "big") + b"\x87") if heard.kind == PUBLISH else kindly(heard)

    async with RawBroker(refuse) as broker, listening(broker) as ear:
        with pytest.raises(ConnectionError, match="refused"):
            await asyncio.wait_for(ear.link.publish("spillway/kitchen/reply/me/m", b"x", qos=1), 5)


async def test_a_message_that_trips_over_a_mistake_of_ours_takes_nothing_else_with_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with RawBroker() as broker, listening(broker) as ear:
        take = ear.take

        def stumble(message: Message) -> None:
            if message.payload == b"poison":
                raise KeyError("a bug")
            take(message)

        ear.link._deliver = stumble
        broker.send(
            publish(b"spillway/kitchen/infer/m", b"poison", 1) + publish(b"spillway/kitchen/infer/m", b"fine", 2)
        )
        (message,) = await ear.takes(1)
        ear.link.acknowledge(message)
        assert [one.mid for one in await broker.hears(PUBACK, 2)] == [1, 2]
        assert broker.connections == 1
        assert "a bug" in caplog.text
