from __future__ import annotations

import asyncio
import contextlib
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.scheduler import HUNG_AFTER_S, ModelQueue
from agent.workers import WorkerEndedError
from models.channel import Ask, Piece
from models.errors import RequestError
from models.request import Dialect, Request
from tests.fakes.worker import MemoryWorker, version
from tests.support.virtual_time import virtual_time


class Clock:
    """A clock that stands until it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A queue, its clock, and the askers that wait in it."""

    def __init__(self, capacity: int = 1) -> None:
        self.clock = Clock()
        self.queue = ModelQueue("digits", self.clock)
        self.worker = MemoryWorker(capacity=capacity).serve()
        self.queue.replace_worker(self.worker)
        self.tasks: dict[str, asyncio.Task[list[bytes]]] = {}

    async def ask(
        self, name: str, *, priority: int = 5, deadline_s: float = 60.0, predicted_ms: float = 10.0, alone: bool = False
    ) -> asyncio.Task[list[bytes]]:
        request = Request(
            model="digits",
            content_type="text/plain",
            body=name.encode(),
            dialect=Dialect.HUGGINGFACE,
            priority=priority,
        )
        answer = self.queue.answer(request, self.clock.now + deadline_s, predicted_ms, alone=alone)

        async def collect() -> list[bytes]:
            async with contextlib.aclosing(answer):
                return [piece.body async for piece, _ in answer]

        self.tasks[name] = asyncio.create_task(collect())
        await turns()
        return self.tasks[name]

    def begun(self, worker: MemoryWorker | None = None) -> list[str]:
        return [ask.request.body.decode() for ask in (worker or self.worker).asks]

    async def finish(self, name: str, **facts: float) -> None:
        ask = next(ask for ask in self.worker.asks if ask.request.body.decode() == name)
        self.worker.answer(ask, b"done", **facts)
        await turns()


async def turns(number: int = 5) -> None:
    """Let everything run that can."""
    for _ in range(number):
        await asyncio.sleep(0)


async def test_a_request_goes_to_the_worker_at_once_where_there_is_room() -> None:
    bench = Bench()
    task = await bench.ask("one")
    assert bench.begun() == ["one"]
    assert (bench.queue.queued, bench.queue.in_service) == (0, 1)
    await bench.finish("one")
    assert await task == [b"done"]
    assert (bench.queue.queued, bench.queue.in_service) == (0, 0)


async def test_pieces_come_as_they_are_made_and_say_which_version_made_them() -> None:
    bench = Bench()
    request = Request(model="digits", content_type="text/plain", body=b"x", dialect=Dialect.HUGGINGFACE)
    answer = bench.queue.answer(request, bench.clock.now + 1, 1.0)
    first = asyncio.ensure_future(anext(answer))
    await turns()
    bench.worker.answer(bench.worker.asks[0], b"a", final=False)
    piece, label = await first
    assert (piece.body, piece.final, label) == (b"a", False, "digits@1")
    bench.worker.answer(bench.worker.asks[0], b"b")
    piece, _ = await anext(answer)
    assert (piece.body, piece.final) == (b"b", True)
    await answer.aclose()
    assert bench.worker.cancels == []


async def test_a_worker_never_has_more_than_it_takes() -> None:
    bench = Bench(capacity=2)
    for name in "abcd":
        await bench.ask(name)
    assert bench.begun() == ["a", "b"]
    await bench.finish("a")
    assert bench.begun() == ["a", "b", "c"]


async def test_the_higher_priority_goes_first_then_the_earlier_deadline_then_who_came_first() -> None:
    bench = Bench()
    await bench.ask("busy")
    await bench.ask("late", deadline_s=50)
    await bench.ask("soon", deadline_s=20)
    await bench.ask("soon too", deadline_s=20)
    await bench.ask("low", priority=0, deadline_s=1)
    await bench.ask("high", priority=9, deadline_s=60)
    for name in ("busy", "high", "soon", "soon too", "late", "low"):
        await bench.finish(name)
    assert bench.begun() == ["busy", "high", "soon", "soon too", "late", "low"]


async def test_what_can_no_longer_be_in_time_is_not_begun() -> None:
    bench = Bench()
    await bench.ask("busy", deadline_s=60)
    late = await bench.ask("late", deadline_s=5)
    fine = await bench.ask("fine", deadline_s=50)
    bench.clock.now += 6
    await bench.finish("busy")
    with pytest.raises(RequestError, match="waited") as caught:
        await late
    assert caught.value.code == "deadline_exceeded"
    assert bench.begun() == ["busy", "fine"]
    await bench.finish("fine")
    assert await fine == [b"done"]


async def test_the_worker_is_told_what_is_left_of_the_deadline() -> None:
    bench = Bench()
    await bench.ask("busy")
    await bench.ask("next", deadline_s=10)
    bench.clock.now += 4
    await bench.finish("busy")
    assert bench.worker.asks[1].budget_ms == pytest.approx(6000)


async def test_who_gives_up_in_the_queue_leaves_it_and_the_worker_never_hears_of_it() -> None:
    bench = Bench()
    await bench.ask("busy", predicted_ms=100)
    waiting = await bench.ask("waiting", predicted_ms=50)
    assert bench.queue.wait_ms() == pytest.approx(150)
    waiting.cancel()
    await turns()
    assert bench.queue.queued == 0
    assert bench.queue.wait_ms() == pytest.approx(100)
    await bench.finish("busy")
    assert bench.begun() == ["busy"]
    assert bench.worker.cancels == []


async def test_who_gives_up_in_service_has_the_worker_told_and_keeps_its_place_until_it_stops() -> None:
    bench = Bench()
    going = await bench.ask("going")
    await bench.ask("next")
    going.cancel()
    await turns()
    assert bench.worker.cancels == [bench.worker.asks[0].ticket]
    assert bench.begun() == ["going"]
    bench.worker.answer(bench.worker.asks[0], code="cancelled", message="by the asker")
    await turns()
    assert bench.begun() == ["going", "next"]


@virtual_time
async def test_e1_a_worker_that_never_comes_back_from_a_request_that_is_over_is_ended() -> None:
    bench = Bench(capacity=2)
    hung = await bench.ask("hung", predicted_ms=10)
    other = await bench.ask("other")
    hung.cancel()
    await asyncio.sleep(HUNG_AFTER_S)
    assert bench.worker.serving
    await asyncio.sleep(0.2)
    assert "did not come back" in await bench.worker.ended
    with pytest.raises(WorkerEndedError):
        await other


@virtual_time
async def test_e1_a_worker_that_only_takes_long_is_left_to_finish() -> None:
    bench = Bench()
    slow = await bench.ask("slow", predicted_ms=3000)
    slow.cancel()
    await asyncio.sleep(30)
    assert bench.worker.serving
    await bench.finish("slow")
    await asyncio.sleep(30)
    assert bench.worker.serving


async def test_an_error_from_the_worker_is_that_request_s_own() -> None:
    bench = Bench(capacity=2)
    bad, good = await bench.ask("bad"), await bench.ask("good")
    bench.worker.answer(bench.worker.asks[0], code="bad_request", message="inputs: is no picture")
    await bench.finish("good")
    with pytest.raises(RequestError, match="inputs: is no picture"):
        await bad
    assert await good == [b"done"]


async def test_a_new_worker_takes_new_requests_at_once_and_the_old_one_finishes_its_own() -> None:
    bench = Bench()
    old = await bench.ask("old")
    await bench.ask("waiting")
    newer = MemoryWorker(version(number="2")).serve()
    bench.queue.replace_worker(newer)
    await bench.ask("new")
    assert bench.begun() == ["old"]
    assert bench.begun(newer) == ["waiting"]
    drained = asyncio.ensure_future(bench.queue.drain(bench.worker))
    await turns()
    assert not drained.done()
    await bench.finish("old")
    assert await old == [b"done"]
    await drained
    assert not bench.worker.cancels


async def test_a_worker_without_requests_is_drained_already() -> None:
    bench = Bench()
    await bench.queue.drain(bench.worker)


async def test_a_drain_ends_when_the_old_worker_dies() -> None:
    bench = Bench()
    old = await bench.ask("old")
    bench.queue.replace_worker(MemoryWorker().serve())
    drained = asyncio.ensure_future(bench.queue.drain(bench.worker))
    await turns()
    bench.worker.die()
    await drained
    with pytest.raises(WorkerEndedError):
        await old


async def test_e16_a_worker_s_death_is_told_to_those_it_had_and_the_others_wait_for_the_next() -> None:
    bench = Bench(capacity=2)
    had = [await bench.ask(name) for name in ("a", "b")]
    waits = [await bench.ask(name) for name in ("c", "d")]
    bench.worker.die("its socket closed")
    await turns()
    for task in had:
        with pytest.raises(WorkerEndedError, match="its socket closed"):
            await task
    assert bench.queue.worker is None
    assert bench.queue.queued == 2
    bench.worker = MemoryWorker(capacity=2).serve()
    bench.queue.replace_worker(bench.worker)
    await turns()
    assert bench.begun() == ["c", "d"]
    for name, task in zip("cd", waits, strict=True):
        await bench.finish(name)
        assert await task == [b"done"]


async def test_e16_who_was_there_when_a_worker_died_runs_with_no_other() -> None:
    bench = Bench(capacity=4)
    await bench.ask("going")
    await bench.ask("suspect", priority=9, alone=True)
    await bench.ask("other")
    assert bench.begun() == ["going"]
    await bench.finish("going")
    assert bench.begun() == ["going", "suspect"]
    await bench.finish("suspect")
    assert bench.begun() == ["going", "suspect", "other"]


async def test_each_suspect_runs_alone() -> None:
    bench = Bench(capacity=4)
    await bench.ask("first", alone=True)
    await bench.ask("second", alone=True)
    assert bench.begun() == ["first"]
    await bench.finish("first")
    assert bench.begun() == ["first", "second"]


async def test_a_queue_without_a_worker_keeps_its_requests() -> None:
    bench = Bench()
    bench.queue.replace_worker(None)
    task = await bench.ask("one")
    assert (bench.queue.queued, bench.queue.wait_ms()) == (1, 0.0)
    bench.queue.replace_worker(bench.worker)
    await turns()
    await bench.finish("one")
    assert await task == [b"done"]


async def test_a_worker_that_is_not_ready_is_not_asked() -> None:
    bench = Bench()
    loading = MemoryWorker()
    bench.queue.replace_worker(loading)
    await bench.ask("one")
    assert loading.asks == []
    assert bench.queue.worker is None


async def test_the_law_learns_the_time_of_one_request_of_a_batch() -> None:
    bench = Bench(capacity=8)
    for name in "abcd":
        await bench.ask(name)
    for name in "abcd":
        await bench.finish(name, compute_ms=40.0, batch=4)
    assert bench.queue.law.observed == 4
    assert bench.queue.law.predict_ms(0, 0) == pytest.approx(10, abs=1)


async def test_the_law_learns_nothing_from_errors() -> None:
    bench = Bench()
    task = await bench.ask("bad")
    bench.worker.answer(bench.worker.asks[0], code="bad_request", message="no", compute_ms=9000.0)
    with pytest.raises(RequestError):
        await task
    assert bench.queue.law.observed == 0


async def test_the_wait_is_what_is_left_in_service_and_what_is_queued() -> None:
    bench = Bench()
    assert bench.queue.wait_ms() == 0.0
    await bench.ask("busy", predicted_ms=100)
    await bench.ask("queued", predicted_ms=30)
    assert bench.queue.wait_ms() == pytest.approx(130)
    bench.clock.now += 0.06
    assert bench.queue.wait_ms() == pytest.approx(70)
    bench.clock.now += 10
    assert bench.queue.wait_ms() == pytest.approx(30)


async def test_a_generating_worker_shares_the_wait_among_its_slots() -> None:
    bench = Bench(capacity=4)
    bench.queue.replace_worker(bench.worker, parallel=True)
    for name in "abc":
        await bench.ask(name, predicted_ms=100)
    assert bench.queue.wait_ms() == 0.0
    await bench.ask("d", predicted_ms=100)
    assert bench.queue.wait_ms() == pytest.approx(100)
    await bench.ask("e", predicted_ms=100)
    assert bench.queue.wait_ms() == pytest.approx(125)


async def test_what_an_old_worker_still_does_is_not_waited_for() -> None:
    bench = Bench()
    await bench.ask("old", predicted_ms=5000)
    newer = MemoryWorker(version(number="2")).serve()
    bench.queue.replace_worker(newer)
    await bench.ask("new", predicted_ms=10)
    assert bench.queue.wait_ms() == pytest.approx(10)


MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.integers(0, 9), st.floats(0.01, 5)),
        st.tuples(st.just("alone"), st.integers(0, 9), st.floats(0.01, 5)),
        st.tuples(st.just("finish"), st.integers(0, 30), st.just(0.0)),
        st.tuples(st.just("give up"), st.integers(0, 30), st.just(0.0)),
        st.tuples(st.just("die"), st.just(0), st.just(0.0)),
        st.tuples(st.just("swap"), st.just(0), st.just(0.0)),
        st.tuples(st.just("wait"), st.just(0), st.floats(0, 3)),
    ),
    max_size=40,
)


@settings(max_examples=80, deadline=None)
@given(MOVES, st.integers(1, 4))
def test_whatever_happens_every_request_ends_once_and_nothing_is_left(
    moves: list[tuple[str, int, float]], capacity: int
) -> None:
    async def play() -> None:
        await Play(capacity).play(moves)

    asyncio.run(play())


class Play:
    """Makes random moves on a queue and holds what must be true after each."""

    def __init__(self, capacity: int) -> None:
        self.bench = Bench(capacity=capacity)
        self.capacity = capacity
        self.workers = [self.bench.worker]
        self.answered: set[tuple[int, int]] = set()

    async def play(self, moves: list[tuple[str, int, float]]) -> None:
        for number, (move, which, seconds) in enumerate(moves):
            await self.move(str(number), move, which, seconds)
            await turns()
            assert all(worker.in_flight <= self.capacity for worker in self.workers)
            assert self.bench.queue.wait_ms() < math.inf
        while self.open_asks():
            self.answer(0)
            await turns()
        results = await asyncio.wait_for(asyncio.gather(*self.bench.tasks.values(), return_exceptions=True), 5)
        ends = (list, RequestError, WorkerEndedError, asyncio.CancelledError)
        assert all(isinstance(result, ends) for result in results)
        assert (self.bench.queue.queued, self.bench.queue.in_service) == (0, 0)
        assert self.bench.queue.wait_ms() == 0.0

    async def move(self, name: str, move: str, which: int, seconds: float) -> None:
        if move in {"ask", "alone"}:
            await self.bench.ask(name, priority=which, deadline_s=seconds, alone=move == "alone")
        elif move == "finish" and self.open_asks():
            self.answer(which)
        elif move == "give up" and self.bench.tasks:
            list(self.bench.tasks.values())[which % len(self.bench.tasks)].cancel()
        elif move in {"die", "swap"}:
            await self.next_worker(died=move == "die")
        elif move == "wait":
            self.bench.clock.now += seconds

    def open_asks(self) -> list[tuple[int, Ask]]:
        alive = [(index, worker) for index, worker in enumerate(self.workers) if not worker.ended.done()]
        asks = [(index, ask) for index, worker in alive for ask in worker.asks]
        return [(index, ask) for index, ask in asks if (index, ask.ticket) not in self.answered]

    def answer(self, which: int) -> None:
        asks = self.open_asks()
        index, ask = asks[which % len(asks)]
        self.answered.add((index, ask.ticket))
        self.workers[index].answer(ask)

    async def next_worker(self, *, died: bool) -> None:
        if died:
            self.bench.worker.die()
            await turns()
        self.bench.worker = MemoryWorker(capacity=self.capacity).serve()
        self.workers.append(self.bench.worker)
        self.bench.queue.replace_worker(self.bench.worker)


async def test_a_piece_for_a_ticket_that_nobody_has_is_dropped() -> None:
    bench = Bench()
    await bench.ask("one")
    bench.worker._receive(Piece(ticket=99, body=b"whose?"))
    assert bench.queue.in_service == 1
