"""The box's side of a hand-off, on virtual time: when it asks, and what reaches the asker."""

from __future__ import annotations

import asyncio
import os

import pytest

from cloud_sync.deployment import Pool
from cloud_sync.errors import HandoffError
from cloud_sync.exchange import Reply
from cloud_sync.handoff import MAX_UNACKNOWLEDGED, Handoffs
from cloud_sync.sealing import Content, Opened, open_request, seal_reply, unpack_body
from cloud_sync.wire import HandoffMessage, ReplyHeader, Topics, parse_handoff, to_sequence
from models.request import Dialect, Request
from tests.fakes.certificates import IDENT, TestCA, TestPool
from tests.support.virtual_time import virtual_time

CA = TestCA()
BOX = CA.identity("pi-7")
POOL = TestPool()
REQUEST = Request(
    model="assistant", content_type="text/plain", body=b"a prompt", dialect=Dialect.HUGGINGFACE, deadline_ms=30_000
)
OTHER = "ffeeddccbbaa99887766554433221100"


class Cloud:
    """A scripted cloud: takes what the box publishes, answers what a test says."""

    def __init__(self, *, connected: bool = True, pool: Pool = POOL.pool, wall: float = 1.8e9) -> None:
        self.loop = asyncio.get_running_loop()
        self.sent: list[tuple[float, str, HandoffMessage]] = []
        self.pubacks: list[asyncio.Future[None]] = []
        self.puback_at_once = True
        self.handoffs = Handoffs(
            publish=self.publish,
            identity=BOX,
            topics=Topics("spillway", "pi-7"),
            clock=self.loop.time,
            wall=lambda: wall,
        )
        self.handoffs.set_pools([pool])
        self.handoffs.connected = connected
        self.root = asyncio.ensure_future(self.handoffs.run())

    def publish(self, topic: str, payload: bytes) -> asyncio.Future[None]:
        self.sent.append((self.loop.time() - 1000, topic, parse_handoff(payload)))
        done: asyncio.Future[None] = self.loop.create_future()
        self.pubacks.append(done)
        if self.puback_at_once:
            done.set_result(None)
        return done

    def opened(self, attempt: int = -1) -> Opened:
        return open_request(self.sent[attempt][2], POOL.private)

    def answer(
        self,
        body: bytes = b"answer",
        *,
        attempt: int = -1,
        run: int = 1,
        number: int = 0,
        status: str = "ok",
        code: str = "",
    ) -> bytes:
        ident = self.sent[attempt][2].header.id
        header = ReplyHeader(id=ident, sequence=to_sequence(run, number), final=status != "partial", status=status)
        content = Content(body=body, content_type="text/plain", model="big", code=code)
        payload = seal_reply(header, content, self.opened(attempt).secret)
        self.handoffs.on_reply(payload)
        return payload

    def ask(
        self, request: Request = REQUEST, *, ident: str = IDENT, within_s: float = 30.0
    ) -> asyncio.Task[list[Reply]]:
        async def collect() -> list[Reply]:
            replies = self.handoffs.send(ident, request, "default", self.loop.time() + within_s)
            return [reply async for reply in replies]

        return asyncio.ensure_future(collect())

    @property
    def times(self) -> list[float]:
        return [round(at, 1) for at, _, _ in self.sent]


def bodies(replies: list[Reply]) -> list[bytes]:
    return [reply.body for reply in replies]


async def code_of(task: asyncio.Task[list[Reply]]) -> str:
    with pytest.raises(HandoffError) as caught:
        await task
    return caught.value.code


@virtual_time
async def test_a_request_is_sealed_for_its_pool_and_its_answer_reaches_the_asker() -> None:
    cloud = Cloud()
    task = cloud.ask()
    await asyncio.sleep(1)
    (_, topic, message) = cloud.sent[0]
    assert topic == "spillway/handoff/default/assistant"
    assert (message.header.id, message.header.device, message.header.kid) == (IDENT, "pi-7", "k1")
    assert message.header.ttl_ms == 30_000
    assert unpack_body(cloud.opened().body) == b"a prompt"
    cloud.answer(b"hello")
    assert await task == [Reply(status="ok", final=True, body=b"hello", content_type="text/plain", model="big")]


@virtual_time
async def test_a_silent_cloud_is_asked_again_after_5_s_then_doubling_to_60_s_while_the_deadline_lasts() -> None:
    cloud = Cloud()
    task = cloud.ask(within_s=300)
    assert await code_of(task) == "deadline_exceeded"
    assert cloud.times == [0, 5, 15, 35, 75, 135, 195, 255]
    assert [m.header.ttl_ms for _, _, m in cloud.sent] == [
        300_000,
        295_000,
        285_000,
        265_000,
        225_000,
        165_000,
        105_000,
        45_000,
    ]
    assert {m.header.id for _, _, m in cloud.sent} == {IDENT}


@virtual_time
async def test_d7_each_attempt_is_sealed_anew_under_a_secret_of_its_own() -> None:
    cloud = Cloud()
    task = cloud.ask(within_s=100)
    await code_of(task)
    assert len({cloud.opened(n).secret for n in range(len(cloud.sent))}) == len(cloud.sent) == 5
    assert len({message.sealed for _, _, message in cloud.sent}) == 5


@virtual_time
async def test_d7_an_answer_to_any_attempt_is_taken() -> None:
    for attempt in (0, 1, 2):
        cloud = Cloud()
        task = cloud.ask()
        await asyncio.sleep(20)
        assert len(cloud.sent) == 3
        cloud.answer(b"hello", attempt=attempt)
        assert bodies(await task) == [b"hello"]


@virtual_time
async def test_d2_an_answer_that_comes_twice_or_from_two_gateways_is_seen_once() -> None:
    cloud = Cloud()
    task = cloud.ask()
    await asyncio.sleep(6)
    payload = cloud.answer(b"hello", attempt=0)
    cloud.handoffs.on_reply(payload)
    cloud.answer(b"another", attempt=1, run=2)
    assert bodies(await task) == [b"hello"]
    cloud.handoffs.on_reply(payload)
    assert cloud.handoffs.counters["other_run"] == 1
    assert cloud.handoffs.counters["duplicate"] == 1
    assert cloud.handoffs.counters["late"] == 1


@virtual_time
async def test_d2_d3_an_answer_after_the_deadline_is_counted_and_dropped() -> None:
    cloud = Cloud()
    task = cloud.ask(within_s=3)
    assert await code_of(task) == "deadline_exceeded"
    cloud.answer(b"late")
    assert cloud.handoffs.counters == {"late": 1}


@virtual_time
async def test_d2_an_answer_with_another_id_or_forged_is_counted_and_dropped() -> None:
    cloud = Cloud()
    task = cloud.ask()
    await asyncio.sleep(1)
    secret = cloud.opened().secret
    for ident, key in ((OTHER, secret), (IDENT, os.urandom(32))):
        header = ReplyHeader(id=ident, sequence=to_sequence(1, 0), final=True, status="ok")
        cloud.handoffs.on_reply(seal_reply(header, Content(body=b"evil"), key))
    cloud.handoffs.on_reply(b"garbage")
    assert cloud.handoffs.counters == {"late": 1, "forged": 1, "malformed": 1}
    cloud.answer(b"hello")
    assert bodies(await task) == [b"hello"]


@virtual_time
async def test_d2_the_pieces_of_a_stream_come_once_and_in_order_however_they_arrive() -> None:
    cloud = Cloud()
    task = cloud.ask()
    await asyncio.sleep(1)
    for number in (1, 1, 0, 3, 0, 2, 2, 3):
        cloud.answer(b"p%d" % number, number=number, status="ok" if number == 3 else "partial")
    replies = await task
    assert bodies(replies) == [b"p0", b"p1", b"p2", b"p3"]
    assert [reply.status for reply in replies] == ["partial", "partial", "partial", "ok"]


@virtual_time
async def test_pieces_of_two_gateways_are_never_mixed() -> None:
    cloud = Cloud()
    task = cloud.ask()
    await asyncio.sleep(6)
    cloud.answer(b"a0", run=1, number=0, status="partial", attempt=0)
    cloud.answer(b"b0", run=2, number=0, status="partial", attempt=1)
    cloud.answer(b"b1", run=2, number=1, attempt=1)
    cloud.answer(b"a1", run=1, number=1, attempt=0)
    assert bodies(await task) == [b"a0", b"a1"]


@virtual_time
async def test_a_stream_goes_on_under_the_secret_of_a_later_attempt() -> None:
    cloud = Cloud()
    task = cloud.ask()
    await asyncio.sleep(1)
    cloud.answer(b"p0", number=0, status="partial")
    await asyncio.sleep(15)
    assert len(cloud.sent) == 2
    cloud.answer(b"p0", number=0, status="partial")
    cloud.answer(b"p1", number=1)
    assert bodies(await task) == [b"p0", b"p1"]


@virtual_time
async def test_a_gateway_that_says_it_works_is_not_asked_again_until_it_falls_silent() -> None:
    cloud = Cloud()
    task = cloud.ask(within_s=100)
    for number in range(5):
        await asyncio.sleep(4)
        cloud.answer(b"", number=number, status="partial")
    assert cloud.times == [0]
    await asyncio.sleep(5.5)
    assert cloud.times == [0, 25]
    cloud.answer(b"hello", number=5)
    assert bodies(await task) == [b"hello"]


@virtual_time
async def test_a_second_gateway_takes_over_where_the_first_died_before_its_answer_began() -> None:
    cloud = Cloud()
    task = cloud.ask()
    await asyncio.sleep(1)
    cloud.answer(b"", run=1, status="partial")
    await asyncio.sleep(10)
    cloud.answer(b"", run=2, status="partial")
    cloud.answer(b"hello", run=2, number=1)
    assert bodies(await task) == [b"hello"]


@virtual_time
async def test_the_error_of_one_gateway_does_not_end_what_another_works_on() -> None:
    cloud = Cloud()
    task = cloud.ask()
    await asyncio.sleep(4)
    cloud.answer(b"", run=1, status="partial")
    cloud.answer(b"upstream broke", run=2, status="error", code="cloud_unavailable")
    cloud.answer(b"hello", run=1, number=1)
    assert bodies(await task) == [b"hello"]
    assert cloud.handoffs.counters["refused"] == 1


@virtual_time
async def test_d6_an_overloaded_gateway_is_asked_again_later_and_the_asker_gets_the_answer() -> None:
    cloud = Cloud()
    task = cloud.ask()
    await asyncio.sleep(1)
    cloud.answer(b"full", run=1, status="error", code="overloaded")
    await asyncio.sleep(6)
    assert len(cloud.sent) == 2
    cloud.answer(b"hello", run=2)
    assert bodies(await task) == [b"hello"]


@virtual_time
async def test_d6_overloaded_is_the_answer_where_no_time_is_left_to_ask_again() -> None:
    cloud = Cloud()
    task = cloud.ask(within_s=4)
    await asyncio.sleep(1)
    cloud.answer(b"full", status="error", code="overloaded")
    (reply,) = await task
    assert (reply.status, reply.code, reply.message, reply.final) == ("error", "overloaded", "full", True)


@virtual_time
async def test_an_error_reaches_the_asker_in_its_own_dialect() -> None:
    cloud = Cloud()
    task = cloud.ask()
    await asyncio.sleep(1)
    cloud.answer(b"the prompt is empty", status="error", code="bad_request")
    (reply,) = await task
    assert reply.body == b'{"error":{"code":"bad_request","message":"the prompt is empty","retryable":false}}'
    assert reply.content_type == "application/json"


@virtual_time
async def test_a_code_that_no_protocol_knows_becomes_internal() -> None:
    cloud = Cloud()
    task = cloud.ask()
    await asyncio.sleep(1)
    cloud.answer(b"?", status="error", code="made_up")
    (reply,) = await task
    assert reply.code == "internal"


@virtual_time
async def test_nothing_leaves_before_the_link_is_up_and_the_deadline_told_is_what_is_left_then() -> None:
    cloud = Cloud(connected=False)
    task = cloud.ask()
    await asyncio.sleep(12)
    assert cloud.sent == []
    cloud.handoffs.connected = True
    await asyncio.sleep(0.1)
    assert cloud.sent[0][2].header.ttl_ms == 18_000
    cloud.answer()
    assert bodies(await task) == [b"answer"]


@virtual_time
async def test_what_the_link_still_holds_is_not_sent_a_second_time() -> None:
    cloud = Cloud()
    cloud.puback_at_once = False
    task = cloud.ask(within_s=100)
    await asyncio.sleep(50)
    assert cloud.times == [0]
    cloud.pubacks[0].set_result(None)
    await asyncio.sleep(6)
    assert len(cloud.sent) == 2
    task.cancel()


@virtual_time
async def test_a_message_that_the_broker_refuses_is_sent_again() -> None:
    cloud = Cloud()
    cloud.puback_at_once = False
    task = cloud.ask()
    await asyncio.sleep(1)
    cloud.pubacks[0].set_exception(ConnectionError("not authorised"))
    await asyncio.sleep(5)
    assert len(cloud.sent) == 2
    assert cloud.handoffs.counters["refused_by_broker"] == 1
    cloud.answer()
    await task


@virtual_time
async def test_an_asker_that_goes_away_is_not_asked_for_again() -> None:
    cloud = Cloud()
    task = cloud.ask()
    await asyncio.sleep(1)
    task.cancel()
    await asyncio.sleep(20)
    assert cloud.times == [0]
    cloud.answer()
    assert cloud.handoffs.counters == {"late": 1}


async def test_a_body_over_what_one_message_holds_is_refused() -> None:
    cloud = Cloud()
    large = Request(model="m", content_type="image/png", body=os.urandom(97 << 10), dialect=Dialect.HUGGINGFACE)
    assert await code_of(cloud.ask(large)) == "too_large"
    cloud.root.cancel()


@virtual_time
async def test_the_largest_body_that_is_taken_fits_one_message() -> None:
    cloud = Cloud()
    cloud.handoffs = Handoffs(
        publish=cloud.publish,
        identity=BOX,
        topics=Topics("spillway", "pi-7"),
        clock=cloud.loop.time,
        max_payload=32 << 10,
    )
    cloud.handoffs.set_pools([POOL.pool])
    cloud.handoffs.connected = True
    root = asyncio.ensure_future(cloud.handoffs.run())
    sizes = []
    for size in range(28 << 10, 32 << 10, 256):
        request = Request(model="m", content_type="image/png", body=os.urandom(size), dialect=Dialect.HUGGINGFACE)
        task = cloud.ask(request, ident=f"{size:032x}")
        await asyncio.sleep(1)
        sizes.append(task.done() and task.exception() is not None)
    assert sizes == sorted(sizes)
    assert set(sizes) == {True, False}
    assert 29 << 10 < max(len(m.head) + len(m.sealed) for _, _, m in cloud.sent) <= 32 << 10
    root.cancel()


@virtual_time
async def test_one_id_is_on_its_way_once() -> None:
    cloud = Cloud()
    cloud.ask()
    await asyncio.sleep(1)
    assert await code_of(cloud.ask()) == "duplicate"


@virtual_time
async def test_a_pool_that_no_deployment_names_is_an_error() -> None:
    cloud = Cloud()
    cloud.handoffs.set_pools([])
    assert await code_of(cloud.ask()) == "unknown_pool"


@virtual_time
async def test_a_pool_that_vanishes_while_a_request_waits_is_an_error() -> None:
    cloud = Cloud(connected=False)
    task = cloud.ask()
    await asyncio.sleep(1)
    cloud.handoffs.set_pools([])
    cloud.handoffs.connected = True
    assert await code_of(task) == "unknown_pool"


@virtual_time
async def test_d10_a_key_that_is_over_is_not_sealed_for_and_the_next_one_is() -> None:
    old = TestPool(kid="old", not_after="2026-01-01T00:00:00Z").pool.keys[0]
    broken = TestPool(kid="broken", not_after="soon").pool.keys[0]
    cloud = Cloud(pool=Pool("default", "spillway/handoff/default", [old, broken, *POOL.pool.keys]))
    cloud.ask()
    await asyncio.sleep(1)
    assert cloud.sent[0][2].header.kid == "k1"
    cloud = Cloud(pool=Pool("default", "spillway/handoff/default", [old]))
    assert await code_of(cloud.ask()) == "no_key"


@virtual_time
async def test_d4_a_long_queue_leaves_at_the_brokers_pace_and_the_most_urgent_first() -> None:
    cloud = Cloud(connected=False)
    for number in range(1000):
        request = Request(
            model="m", content_type="text/plain", body=b"x", dialect=Dialect.HUGGINGFACE, priority=number % 10
        )
        cloud.ask(request, ident=f"{number:032x}", within_s=3600)
    await asyncio.sleep(1)
    cloud.handoffs.connected = True
    await asyncio.sleep(4)
    first = [int(message.header.id, 16) % 10 for _, _, message in cloud.sent]
    assert first[:100] == [9] * 100
    for second in range(4):
        assert sum(1 + second <= at < 2 + second for at, _, _ in cloud.sent) <= 120
    await asyncio.sleep(20)
    assert len({message.header.id for _, _, message in cloud.sent}) == 1000


@virtual_time
async def test_d4_no_more_are_unacknowledged_than_the_strictest_broker_takes() -> None:
    cloud = Cloud()
    cloud.puback_at_once = False
    for number in range(200):
        cloud.ask(ident=f"{number:032x}")
    await asyncio.sleep(3)
    assert len(cloud.sent) == MAX_UNACKNOWLEDGED
    cloud.pubacks[0].set_result(None)
    await asyncio.sleep(1)
    assert len(cloud.sent) == MAX_UNACKNOWLEDGED + 1


@virtual_time
async def test_large_messages_leave_at_the_brokers_pace_too() -> None:
    cloud = Cloud()
    for number in range(40):
        request = Request(model="m", content_type="image/png", body=os.urandom(50 << 10), dialect=Dialect.HUGGINGFACE)
        cloud.ask(request, ident=f"{number:032x}")
    await asyncio.sleep(0.99)
    sent = sum(len(message.sealed) for _, _, message in cloud.sent)
    assert sent <= 900 << 10


@virtual_time
async def test_d4_exchanges_that_ended_leave_the_queues() -> None:
    cloud = Cloud()
    for number in range(200):
        task = cloud.ask(ident=f"{number:032x}", within_s=3600)
        await asyncio.sleep(0.02)
        cloud.answer()
        await task
    assert len(cloud.handoffs._later) <= 66
    cloud.handoffs.connected = False
    first = cloud.ask(ident=OTHER, within_s=3600)
    for number in range(200):
        task = cloud.ask(ident=f"{number:032x}", within_s=3600)
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
    assert len(cloud.handoffs._ready) <= 66
    cloud.handoffs.connected = True
    await asyncio.sleep(1)
    assert cloud.sent[-1][2].header.id == OTHER
    first.cancel()


@virtual_time
async def test_d7_after_an_outage_what_was_sent_before_it_is_asked_again_within_two_seconds() -> None:
    cloud = Cloud()
    for number in range(50):
        cloud.ask(ident=f"{number:032x}", within_s=100)
    await asyncio.sleep(6)
    assert len(cloud.sent) == 100
    cloud.handoffs.connected = False
    await asyncio.sleep(1)
    cloud.handoffs.connected = True
    await asyncio.sleep(2.5)
    again = [at - 7 for at, _, _ in cloud.sent[100:]]
    assert len(again) == 50
    assert min(again) >= 1.0
    assert max(again) <= 2.1
    assert max(again) - min(again) > 0.3


@virtual_time
async def test_after_an_outage_what_the_link_holds_or_a_gateway_works_on_is_not_asked_again_early() -> None:
    cloud = Cloud()
    working = cloud.ask(within_s=100)
    await asyncio.sleep(1)
    cloud.answer(b"", number=0, status="partial")
    cloud.puback_at_once = False
    held = cloud.ask(ident=OTHER, within_s=100)
    await asyncio.sleep(1)
    cloud.handoffs.connected = False
    await asyncio.sleep(0.5)
    cloud.handoffs.connected = True
    cloud.pubacks[1].set_result(None)
    await asyncio.sleep(2.5)
    assert len(cloud.sent) == 2
    working.cancel()
    held.cancel()
