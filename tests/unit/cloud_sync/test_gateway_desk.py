"""The gateway's desk on virtual time: bounds, deadlines, who asks again, what is sealed."""

from __future__ import annotations

import asyncio
import os

import msgspec
import pytest

from cloud_sync.errors import HandoffError
from cloud_sync.gateway.desk import Bounds, Desk
from cloud_sync.gateway.opener import Asker, Question, Refusal
from cloud_sync.sealing import open_reply
from cloud_sync.wire import Topics, from_sequence, parse_reply
from models.errors import RequestError
from models.request import Dialect, Request
from tests.fakes.answers import BUSY, ScriptedAnswers
from tests.support.virtual_time import virtual_time

TEXT = Request(model="assistant", content_type="text/plain", body=b"a prompt", dialect=Dialect.HUGGINGFACE)


BOUNDS = Bounds()


class Office:
    """A desk, and what leaves it."""

    def __init__(
        self, answers: ScriptedAnswers, *, concurrency: int = 4, bounds: Bounds = BOUNDS, max_payload: int = 96 << 10
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.sent: list[tuple[float, str, bytes]] = []
        self.desk = Desk(
            {"default": (answers, concurrency)},
            publish=self.publish,
            topics=Topics(),
            clock=self.loop.time,
            bounds=bounds,
            max_payload=max_payload,
        )

    def publish(self, topic: str, payload: bytes) -> asyncio.Future[None]:
        self.sent.append((self.loop.time() - 1000, topic, payload))
        done: asyncio.Future[None] = self.loop.create_future()
        self.loop.call_later(0.01, done.set_result, None)
        return done

    def read(self, secret: bytes) -> list[tuple[int, str, str]]:
        """Return number, status and text (or code) of what opens with a secret."""
        found = []
        for _, _, payload in self.sent:
            message = parse_reply(payload)
            try:
                content = open_reply(message, secret)
            except HandoffError:
                continue
            text = content.code or content.body.decode()
            found.append((from_sequence(message.header.sequence)[1], message.header.status, text))
        return found


def question(number: int = 1, *, ttl_ms: int = 30_000, body: bytes = b"a prompt", device: str = "pi-7") -> Question:
    return Question(
        asker=Asker(id=f"{number:032x}", device=device, secret=os.urandom(32)),
        pool="default",
        ttl_ms=ttl_ms,
        request=msgspec.structs.replace(TEXT, body=body),
        digest=body,
    )


def again(first: Question) -> Question:
    """Return the same question as its box seals it anew."""
    return msgspec.structs.replace(first, asker=msgspec.structs.replace(first.asker, secret=os.urandom(32)))


@virtual_time
async def test_an_answer_goes_to_its_boxs_own_topic_piece_by_piece() -> None:
    office, asked_ = Office(ScriptedAnswers("he", "llo")), question()
    await office.desk.settle(asked_)
    assert {topic for _, topic, _ in office.sent} == {"spillway/pi-7/handoff/reply"}
    assert office.read(asked_.asker.secret) == [(0, "partial", "he"), (1, "ok", "llo")]
    assert asyncio.get_running_loop().time() >= 1002.01
    assert office.desk.counters == {"ok": 1}


@virtual_time
async def test_beyond_its_concurrency_a_box_is_told_overloaded_and_nothing_is_paid() -> None:
    answers = ScriptedAnswers()
    office = Office(answers, concurrency=2)
    questions = [question(n) for n in range(3)]
    await asyncio.gather(*(office.desk.settle(q) for q in questions))
    assert len(answers.asked) == 2
    assert office.read(questions[2].asker.secret) == [(0, "error", "overloaded")]
    await office.desk.settle(again(questions[2]))
    assert len(answers.asked) == 3


@virtual_time
async def test_d11_a_replayed_request_is_answered_from_memory_with_the_same_bytes() -> None:
    answers = ScriptedAnswers("he", "llo")
    office, asked_ = Office(answers), question()
    await office.desk.settle(asked_)
    first = [payload for _, _, payload in office.sent]
    await office.desk.settle(asked_)
    assert [payload for _, _, payload in office.sent] == first + first
    assert len(answers.asked) == 1


@virtual_time
async def test_d7_c6_a_box_that_asks_again_joins_and_hears_all_of_it_under_its_new_secret() -> None:
    answers = ScriptedAnswers("a", "b", "c", pause_s=2.0)
    office, first = Office(answers), question()
    running = asyncio.ensure_future(office.desk.settle(first))
    await asyncio.sleep(3)
    second = again(first)
    await office.desk.settle(second)
    await running
    assert len(answers.asked) == 1
    assert office.read(first.asker.secret) == [(0, "partial", "a")]
    assert office.read(second.asker.secret) == [(0, "partial", "a"), (1, "partial", "b"), (2, "ok", "c")]


@virtual_time
async def test_d11_a_request_replayed_after_its_time_is_dropped() -> None:
    answers = ScriptedAnswers()
    office, asked_ = Office(answers), question(ttl_ms=10_000)
    await office.desk.settle(asked_)
    for wait_s in (10, 1000):
        await asyncio.sleep(wait_s)
        await office.desk.settle(asked_)
        await office.desk.settle(question(2 + wait_s))
    assert len(office.sent) == 3
    assert office.desk.counters["replayed"] == 2


@virtual_time
async def test_two_devices_may_use_one_id() -> None:
    answers = ScriptedAnswers()
    office = Office(answers)
    await office.desk.settle(question(device="pi-7"))
    await office.desk.settle(question(device="pi-8"))
    assert len(answers.asked) == 2


@virtual_time
async def test_another_request_under_the_same_id_is_refused() -> None:
    office = Office(ScriptedAnswers())
    await office.desk.settle(question())
    other = question(body=b"another")
    await office.desk.settle(other)
    assert office.read(other.asker.secret) == [(0, "error", "bad_request")]


@virtual_time
async def test_a_long_silence_is_broken_by_receipts() -> None:
    office, asked_ = Office(ScriptedAnswers("hello", pause_s=10.0)), question()
    await office.desk.settle(asked_)
    assert [round(at) for at, _, _ in office.sent] == [3, 6, 9, 10]
    assert office.read(asked_.asker.secret) == [
        (0, "partial", ""),
        (1, "partial", ""),
        (2, "partial", ""),
        (3, "ok", "hello"),
    ]


@virtual_time
async def test_at_the_deadline_the_work_ends_and_nothing_more_is_owed() -> None:
    answers = ScriptedAnswers("late", pause_s=100.0)
    office = Office(answers)
    await office.desk.settle(question(ttl_ms=5_000))
    assert asyncio.get_running_loop().time() < 1005.1
    assert answers.closed == 1
    assert office.desk.counters["expired"] == 1
    assert [round(at) for at, _, _ in office.sent] == [3]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RequestError("model_not_found", "no"), "model_not_found"),
        (KeyError("a mistake"), "internal"),
        (BUSY, "overloaded"),
    ],
)
@virtual_time
async def test_every_failure_becomes_a_sealed_error(error: Exception, code: str) -> None:
    office, asked_ = Office(ScriptedAnswers("he", "llo", error=error)), question()
    await office.desk.settle(asked_)
    assert office.read(asked_.asker.secret) == [(0, "partial", "he"), (1, "error", code)]


@virtual_time
async def test_d6_an_overloaded_answer_is_not_kept_so_that_asking_again_can_help() -> None:
    answers = ScriptedAnswers(error=BUSY)
    office, first = Office(answers), question()
    await office.desk.settle(first)
    answers.error = None
    second = again(first)
    await office.desk.settle(second)
    assert office.read(second.asker.secret) == [(0, "ok", "answer")]


@virtual_time
async def test_an_answer_that_fits_no_message_is_an_error_that_says_so() -> None:
    office, asked_ = Office(ScriptedAnswers(os.urandom(400).hex()), max_payload=400), question()
    await office.desk.settle(asked_)
    assert office.read(asked_.asker.secret) == [(0, "error", "too_large")]


@virtual_time
async def test_kept_answers_are_bounded_and_the_oldest_leave() -> None:
    answers = ScriptedAnswers("x" * 100)
    office = Office(answers, bounds=Bounds(answers=100, answer_bytes=350))
    questions = [question(n) for n in range(5)]
    for each in questions:
        await office.desk.settle(each)
    await office.desk.settle(again(questions[4]))
    assert len(answers.asked) == 5
    await office.desk.settle(again(questions[0]))
    assert len(answers.asked) == 6


@virtual_time
async def test_b21_a_draining_desk_refuses_what_is_new_and_a_cancelled_one_tells_its_boxes_to_ask_elsewhere() -> None:
    office, first, second = Office(ScriptedAnswers("slow", pause_s=100.0)), question(1), question(2)
    running = asyncio.ensure_future(office.desk.settle(first))
    await asyncio.sleep(1)
    office.desk.draining = True
    await office.desk.settle(second)
    running.cancel()
    await asyncio.wait([running])
    assert office.read(first.asker.secret) == [(0, "error", "overloaded")]
    assert office.read(second.asker.secret) == [(0, "error", "overloaded")]


@virtual_time
async def test_a_refusal_is_sealed_for_its_asker() -> None:
    office, asker = Office(ScriptedAnswers()), question().asker
    await office.desk.settle(Refusal(asker=asker, code="forbidden", message="no"))
    assert office.read(asker.secret) == [(0, "error", "forbidden")]
