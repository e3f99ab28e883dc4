"""The real link over a real mosquitto and its in-memory twin do the same, so that tests may use the twin."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cloud_sync.link import Link
from cloud_sync.messages import Details, LinkSettings, Message, Will
from tests.fakes.link import MemoryBroker
from tests.support.mosquitto import Mosquitto

PATIENCE_S = 10.0
Make = Callable[..., Any]


class Both:
    """Makes links of one kind, and takes them away."""

    def __init__(self, broker: Mosquitto | MemoryBroker) -> None:
        self.broker = broker
        self.roots: list[asyncio.Future[None]] = []

    def link(self, name: str, on_message: Callable[[Message], None], *, clean: bool = False, **more: Any) -> Any:
        if isinstance(self.broker, MemoryBroker):
            return self.broker.link(on_message, clean_start=clean, **more)
        settings = LinkSettings(port=self.broker.port, client_id=name, clean_start=clean, max_backoff_s=0.2)
        return Link(settings, on_message=on_message, **more)

    async def up(self, *links: Any) -> None:
        for link in links:
            self.roots.append(asyncio.ensure_future(link.run()))
            async with asyncio.timeout(PATIENCE_S):
                await link.wait_up()
        await asyncio.sleep(0.1)

    async def cut(self, link: Any) -> None:
        """Take the network away and bring it back."""
        if isinstance(self.broker, MemoryBroker):
            link.drop()
            link.connect()
        else:
            link._client.socket().close()
            link._lost.set()
            await asyncio.sleep(0.1)
            async with asyncio.timeout(PATIENCE_S):
                await link.wait_up()

    async def stop(self) -> None:
        for root in self.roots:
            root.cancel()
        await asyncio.gather(*self.roots, return_exceptions=True)


@pytest.fixture(params=["twin", "mosquitto"])
def broker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Mosquitto | MemoryBroker]:
    if request.param == "twin":
        yield MemoryBroker()
        return
    real = Mosquitto(tmp_path)
    real.start()
    yield real
    real.kill()


@contextlib.asynccontextmanager
async def both(broker: Mosquitto | MemoryBroker) -> AsyncIterator[Both]:
    kind = Both(broker)
    try:
        yield kind
    finally:
        await kind.stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - a callback without an event sets it
            await asyncio.sleep(0.01)


def payloads(seen: list[Message]) -> list[bytes]:
    return [message.payload for message in seen]


async def test_a_message_arrives_with_its_properties(broker: Mosquitto | MemoryBroker) -> None:
    seen: list[Message] = []
    async with both(broker) as kind:
        receiver, sender = kind.link("r", seen.append), kind.link("s", lambda _: None)
        receiver.subscribe("a/+/c")
        await kind.up(receiver, sender)
        details = Details(response_topic="x/y", correlation=b"\x00", content_type="text/plain", user=(("k", "v"),))
        await sender.publish("a/b/c", b"1", qos=1, details=details)
        await sender.publish("a/b", b"2", qos=1)
        await until(lambda: len(seen) == 1)
        (message,) = seen
        assert (message.topic, message.payload, message.qos, message.retain) == ("a/b/c", b"1", 1, False)
        assert message.details == details


async def test_what_is_not_acknowledged_comes_again_after_a_cut(broker: Mosquitto | MemoryBroker) -> None:
    seen: list[Message] = []
    async with both(broker) as kind:
        receiver, sender = kind.link("r", seen.append), kind.link("s", lambda _: None)
        receiver.subscribe("a")
        await kind.up(receiver, sender)
        for body in (b"1", b"2", b"3"):
            await sender.publish("a", body, qos=1)
        await until(lambda: len(seen) == 3)
        receiver.acknowledge(seen[0])
        receiver.acknowledge(seen[2])  # waits for the second: PUBACKs leave in the order of arrival
        await asyncio.sleep(0.1)
        await kind.cut(receiver)
        await until(lambda: len(seen) == 5)
        assert payloads(seen[3:]) == [b"2", b"3"]
        assert all(message.duplicate for message in seen[3:])


async def test_a_clean_start_forgets_what_was_not_acknowledged(broker: Mosquitto | MemoryBroker) -> None:
    seen: list[Message] = []
    async with both(broker) as kind:
        receiver, sender = kind.link("r", seen.append, clean=True), kind.link("s", lambda _: None)
        receiver.subscribe("a")
        await kind.up(receiver, sender)
        await sender.publish("a", b"1", qos=1)
        await until(lambda: len(seen) == 1)
        await kind.cut(receiver)
        await asyncio.sleep(0.2)
        await sender.publish("a", b"2", qos=1)
        await until(lambda: len(seen) == 2)
        assert payloads(seen) == [b"1", b"2"]


async def test_a_retained_message_comes_to_who_subscribes_later_and_is_marked(broker: Mosquitto | MemoryBroker) -> None:
    seen: list[Message] = []
    async with both(broker) as kind:
        sender = kind.link("s", lambda _: None)
        await kind.up(sender)
        await sender.publish("a/status", b"online", qos=1, retain=True)
        receiver = kind.link("r", seen.append)
        receiver.subscribe("a/#")
        await kind.up(receiver)
        await until(lambda: len(seen) == 1)
        assert (seen[0].payload, seen[0].retain) == (b"online", True)


async def test_a_shared_subscription_gives_each_message_to_one(broker: Mosquitto | MemoryBroker) -> None:
    first: list[Message] = []
    second: list[Message] = []
    async with both(broker) as kind:
        links = [kind.link("r1", first.append), kind.link("r2", second.append), kind.link("s", lambda _: None)]
        for link in links[:2]:
            link.subscribe("$share/gateway/a/+")
        await kind.up(*links)
        for number in range(10):
            await links[2].publish("a/b", b"%d" % number, qos=1)
        await until(lambda: len(first) + len(second) == 10)
        assert sorted(payloads(first + second)) == [b"%d" % number for number in range(10)]
        assert first
        assert second


async def test_a_last_will_tells_of_a_link_that_vanished(broker: Mosquitto | MemoryBroker) -> None:
    seen: list[Message] = []
    async with both(broker) as kind:
        receiver = kind.link("r", seen.append)
        vanishing = kind.link("v", lambda _: None, will=Will("v/status", b"offline"))
        receiver.subscribe("v/status")
        await kind.up(receiver, vanishing)
        await kind.cut(vanishing)
        await until(lambda: len(seen) == 1)
        assert seen[0].payload == b"offline"


async def test_a_qos_1_publish_waits_for_the_link_and_a_qos_0_one_fails(broker: Mosquitto | MemoryBroker) -> None:
    seen: list[Message] = []
    async with both(broker) as kind:
        receiver, sender = kind.link("r", seen.append), kind.link("s", lambda _: None)
        receiver.subscribe("a")
        await kind.up(receiver)
        waiting = sender.publish("a", b"1", qos=1)
        with pytest.raises(ConnectionError):
            await sender.publish("a", b"0")
        assert not waiting.done()
        await kind.up(sender)
        async with asyncio.timeout(PATIENCE_S):
            await waiting
        await until(lambda: payloads(seen) == [b"1"])
