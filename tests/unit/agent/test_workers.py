from __future__ import annotations

import asyncio
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.workers import (
    COUNT_TIMEOUT_S,
    ENDED,
    MAX_TOLD,
    MAX_TOLD_LETTERS,
    Holding,
    Worker,
    WorkerEndedError,
    _Channel,
)
from models.channel import MAX_FRAME_BYTES, Broken, Count, Counted, FromWorker, Piece, Ready, frame
from models.errors import ModelError, RequestError
from models.request import Dialect, Request
from tests.fakes.worker import MemoryWorker, version
from tests.support.virtual_time import virtual_time

REQUEST = Request(model="digits", content_type="text/plain", body=b"x", dialect=Dialect.HUGGINGFACE)
MESSAGES: list[FromWorker] = [
    Ready(load_ms=1.0, capacity=2),
    Piece(ticket=1, body=b"a" * 1000, final=False),
    Counted(ticket=2, tokens_in=7),
    Piece(ticket=1),
    Broken("no"),
]


class Ear:
    """What a channel heard."""

    def __init__(self) -> None:
        self.messages: list[FromWorker] = []
        self.ends: list[str] = []
        self.channel = _Channel(self.messages.append, self.ends.append)


@given(st.lists(st.integers(1, 400), max_size=20))
def test_messages_are_whole_however_the_socket_cuts_them(cuts: list[int]) -> None:
    ear = Ear()
    data = b"".join(frame(message) for message in MESSAGES)
    for cut in cuts:
        ear.channel.take(data[:cut])
        data = data[cut:]
    ear.channel.take(data)
    assert ear.messages == MESSAGES
    assert ear.ends == []


def test_e15_a_frame_over_the_limit_ends_the_worker_before_it_is_read() -> None:
    ear = Ear()
    ear.channel.take(struct.pack(">I", MAX_FRAME_BYTES + 1) + b"x" * 100)
    assert len(ear.ends) == 1
    assert ear.messages == []


@pytest.mark.parametrize("payload", [b"", b"\xff", b"\x93\x01\x02\x03", b"\x91" * 100_000, b'{"tag":"piece"}'])
def test_e15_a_frame_that_is_no_message_ends_the_worker(payload: bytes) -> None:
    ear = Ear()
    ear.channel.take(struct.pack(">I", len(payload)) + payload)
    assert len(ear.ends) == 1


@given(st.binary(max_size=300))
def test_e15_garbage_is_heard_or_ends_the_worker_and_does_nothing_else(data: bytes) -> None:
    Ear().channel.take(data)


def test_a_closed_socket_is_the_worker_s_end() -> None:
    ear = Ear()
    ear.channel.connection_lost(None)
    assert ear.ends == ["its socket closed"]


async def test_a_worker_takes_nothing_before_it_is_ready() -> None:
    worker = MemoryWorker(capacity=3)
    assert (worker.serving, worker.capacity) == (False, 0)
    worker.serve()
    assert (worker.serving, worker.capacity) == (True, 3)


async def test_a_worker_that_ended_serves_no_more_and_says_why_to_all_who_wait() -> None:
    worker = MemoryWorker().serve()
    pieces: list[Piece] = []
    worker.ask(REQUEST, 1000, pieces.append)
    worker._tokens = None
    counting = asyncio.ensure_future(worker.count(REQUEST))
    await asyncio.sleep(0)
    worker.die("killed")
    assert [(piece.code, piece.message) for piece in pieces] == [(ENDED, "killed")]
    with pytest.raises(WorkerEndedError, match="killed"):
        await counting
    assert not worker.serving
    assert await worker.ended == "killed"
    assert worker.in_flight == 0


async def test_a_worker_ends_once() -> None:
    worker = MemoryWorker().serve()
    worker.die("first")
    worker.die("second")
    assert await worker.ended == "first"


async def test_asking_a_worker_that_ended_is_refused_and_leaves_nothing_behind() -> None:
    worker = MemoryWorker().serve()
    worker.die()
    with pytest.raises(WorkerEndedError):
        worker.ask(REQUEST, 1000, lambda _piece: None)
    with pytest.raises(WorkerEndedError):
        await worker.count(REQUEST)
    assert worker.in_flight == 0


async def test_a_worker_that_ends_while_it_loads_is_the_version_s_fault() -> None:
    worker = MemoryWorker()
    worker.die("its socket closed")
    with pytest.raises(ModelError, match="ended while loading"):
        await worker.ready


async def test_a_model_that_cannot_be_opened_is_reported_in_the_worker_s_words() -> None:
    worker = MemoryWorker()
    worker._receive(Broken("model.onnx: truncated"))
    with pytest.raises(ModelError, match=r"model\.onnx: truncated"):
        await worker.ready
    assert not worker.serving
    worker._receive(Ready(load_ms=1, capacity=1))
    assert not worker.serving


async def test_a_count_is_the_worker_s_or_its_error() -> None:
    def tokens(asked: Count) -> Counted:
        if asked.request.body == b"bad":
            return Counted(ticket=asked.ticket, code="bad_request", message="inputs: are none")
        return Counted(ticket=asked.ticket, tokens_in=12, max_tokens=34)

    worker = MemoryWorker(tokens=tokens).serve()
    counted = await worker.count(REQUEST)
    assert (counted.tokens_in, counted.max_tokens) == (12, 34)
    bad = Request(model="digits", content_type="text/plain", body=b"bad", dialect=Dialect.HUGGINGFACE)
    with pytest.raises(RequestError, match="inputs: are none"):
        await worker.count(bad)


@virtual_time
async def test_a_worker_whose_counting_hangs_is_ended_and_all_who_wait_for_it_learn_so() -> None:
    worker = MemoryWorker().serve()
    worker._send = lambda message: None  # type: ignore[method-assign]
    counting = [asyncio.ensure_future(worker.count(REQUEST)) for _ in range(3)]
    started = asyncio.get_running_loop().time()
    for one in counting:
        with pytest.raises(WorkerEndedError, match="counted nothing for 30 s"):
            await one
    assert asyncio.get_running_loop().time() - started == pytest.approx(COUNT_TIMEOUT_S)
    assert worker.ended.done()


@virtual_time
async def test_a_worker_that_counts_slowly_but_steadily_is_left_alone() -> None:
    worker = MemoryWorker().serve()
    worker._send = lambda message: None  # type: ignore[method-assign]
    counting = [asyncio.ensure_future(worker.count(REQUEST)) for _ in range(5)]
    for ticket in range(1, 6):
        await asyncio.sleep(COUNT_TIMEOUT_S * 0.9)
        worker._receive(Counted(ticket=ticket, tokens_in=7))
    assert [one.tokens_in for one in await asyncio.gather(*counting)] == [7] * 5
    await asyncio.sleep(COUNT_TIMEOUT_S * 3)
    assert worker.serving


async def test_what_a_process_holds_is_read_from_its_own_figures(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("VmHWM:\t 4096 kB\nVmRSS:\t 2048 kB\nRssAnon:\t 1024 kB\nThreads:\t7\n")
    worker = Worker(version())
    assert worker.holding() == Holding()
    worker._status = status.open("rb", buffering=0)
    held = Holding(own_mb=1, resident_mb=2, peak_mb=4, threads=7)
    assert (worker.holding(), worker.holding()) == (held, held)
    worker.give_up("enough")
    assert worker.holding() == Holding()


async def test_nobody_is_told_of_a_ticket_twice() -> None:
    worker = MemoryWorker().serve()
    pieces: list[Piece] = []
    worker.ask(REQUEST, 1000, pieces.append)
    worker.answer(worker.asks[0])
    worker.answer(worker.asks[0])
    worker.die()
    assert len(pieces) == 1


async def test_a_ticket_that_is_answered_is_not_cancelled_any_more() -> None:
    worker = MemoryWorker().serve()
    ticket = worker.ask(REQUEST, 1000, lambda _piece: None)
    worker.answer(worker.asks[0])
    worker.cancel(ticket)
    assert worker.cancels == []


async def test_what_a_worker_could_not_be_kept_from_is_told(caplog: pytest.LogCaptureFixture) -> None:
    worker = MemoryWorker()
    assert worker.unprotected == []
    worker._receive(Ready(load_ms=1.0, capacity=1, unprotected=["files: no Landlock", *["x" * 1000] * 100]))
    assert worker.unprotected[0] == "files: no Landlock"
    assert (len(worker.unprotected), max(map(len, worker.unprotected))) == (MAX_TOLD, MAX_TOLD_LETTERS)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "files: no Landlock" in caplog.text


async def test_the_accelerators_that_a_worker_runs_without_are_told_one_by_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    worker = MemoryWorker()
    worker._receive(Ready(load_ms=1.0, capacity=1, fallbacks=["tensorrt: built without it", "cuda: no libcudnn"]))
    assert worker.fallbacks == ["tensorrt: built without it", "cuda: no libcudnn"]
    assert [record.getMessage().partition("runs without ")[2] for record in caplog.records] == worker.fallbacks


async def test_a_confined_worker_is_nothing_to_warn_of(caplog: pytest.LogCaptureFixture) -> None:
    worker = MemoryWorker().serve()
    assert (worker.unprotected, worker.memory_mb(), caplog.records) == ([], 0.0, [])
