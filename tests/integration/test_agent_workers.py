"""The agent's side of real worker processes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import psutil
import pytest

from agent.workers import ENDED, Version, Worker, _Channel
from models.channel import Piece
from models.errors import ModelError
from models.manifest import manifest_bytes
from models.request import Dialect, Request
from models.shelf import Shelf
from tests.fakes.samples import sample

TEXT = Request(
    model="language",
    content_type="text/plain",
    body=b"Guten Tag, wie geht es Ihnen heute?",
    dialect=Dialect.HUGGINGFACE,
)


def language() -> Version:
    """Return the example model as a version on the disk."""
    folder, manifest = sample("language")
    raw = manifest_bytes(manifest)
    return Version(name="language", version="1", digest="0" * 64, folder=folder, variant="default", manifest=raw)


@contextlib.asynccontextmanager
async def started() -> AsyncIterator[Worker]:
    worker = Worker(language())
    try:
        await worker.start(threads=1, slots=1)
        yield worker
    finally:
        await worker.stop()


def oom_score(pid: str) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text("ascii"))


async def ask(worker: Worker, budget_ms: float = 20_000, *, request: Request = TEXT) -> Piece:
    done: asyncio.Future[Piece] = asyncio.get_running_loop().create_future()
    worker.ask(request, budget_ms, done.set_result)
    return await asyncio.wait_for(done, 20)


async def gone(pid: int) -> None:
    async with asyncio.timeout(10):
        while psutil.pid_exists(pid):  # noqa: ASYNC110 - the kernel tells nobody
            await asyncio.sleep(0.01)


async def test_a_worker_answers_counts_and_ends_when_it_is_told() -> None:
    async with started() as worker:
        piece = await ask(worker)
        assert (piece.code, b'"de"' in piece.body) == ("", True)
        assert piece.compute_ms > 0
        assert (await worker.count(TEXT)).tokens_in > 0
        pid = worker.pid
    await gone(pid)
    assert worker.in_flight == 0


async def test_a_large_body_is_answered_alike_by_shared_memory_and_through_the_socket(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = b"Guten Tag, wie geht es Ihnen heute? " * 20_000
    request = msgspec.structs.replace(TEXT, body=words)
    told = []
    async with started() as worker:
        for least in (1024, 1 << 30):
            monkeypatch.setattr("agent.workers.LAID_FROM_BYTES", least)
            piece = await ask(worker, request=request)
            counted = await worker.count(request)
            told.append((piece.code, piece.message, counted.tokens_in))
            assert worker._shelf is not None
            assert worker._shelf.empty
    assert told[0] == told[1]
    assert told[0][0] == "too_large"


async def test_a_body_that_finds_no_room_on_the_shelf_goes_through_the_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.workers.LAID_FROM_BYTES", 1)
    monkeypatch.setattr(Shelf, "put", lambda _self, _data: None)
    async with started() as worker:
        assert b'"de"' in (await ask(worker)).body


async def test_b9_where_memory_runs_out_all_the_same_a_worker_goes_before_the_agent() -> None:
    async with started() as worker:
        assert oom_score(str(worker.pid)) > oom_score("self")


async def test_what_a_worker_holds_is_known_from_outside_though_it_is_confined() -> None:
    async with started() as worker:
        holding = worker.holding()
        assert 10 < holding.own_mb < holding.resident_mb <= holding.peak_mb < 1000
        assert holding.threads >= 1
        assert 10 < worker.memory_mb() < holding.peak_mb


async def test_what_has_no_time_left_is_not_begun() -> None:
    async with started() as worker:
        assert (await ask(worker, budget_ms=0.0)).code == "deadline_exceeded"


async def test_e16_a_killed_worker_is_known_to_be_gone_at_once() -> None:
    async with started() as worker:
        psutil.Process(worker.pid).suspend()
        asked = asyncio.ensure_future(ask(worker))
        await asyncio.sleep(0)
        psutil.Process(worker.pid).kill()
        assert (await asked).code == ENDED
        await asyncio.wait_for(worker.ended, 5)
        assert not worker.serving


@pytest.mark.parametrize("garbage", [b"\xff" * 64, b"\x00\x00\x00\x03\xc1\xc1\xc1"])
async def test_e15_a_worker_that_sends_garbage_is_killed_though_it_would_not_go(garbage: bytes) -> None:
    async with started() as worker:
        psutil.Process(worker.pid).suspend()
        asked = asyncio.ensure_future(ask(worker))
        await asyncio.sleep(0)
        assert worker._transport is not None
        protocol = worker._transport.get_protocol()
        assert isinstance(protocol, _Channel)
        protocol.take(garbage)
        assert (await asked).code == ENDED
        await gone(worker.pid)


async def test_a_hung_worker_is_ended_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.workers.STOP_TIMEOUT_S", 0.1)
    async with started() as worker:
        psutil.Process(worker.pid).suspend()
        pid = worker.pid
    await gone(pid)


async def test_a_start_that_is_given_up_leaves_no_process() -> None:
    worker = Worker(language())
    starting = asyncio.ensure_future(worker.start(threads=1, slots=1))
    async with asyncio.timeout(10):
        while not worker.pid:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0)
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    await worker.kill()
    await gone(worker.pid)


async def test_e7_a_model_that_cannot_be_opened_is_an_error_in_words() -> None:
    folder, manifest = sample("language")
    raw = manifest_bytes(manifest)
    worker = Worker(
        Version(name="x", version="1", digest="0" * 64, folder=folder / "nowhere", variant="default", manifest=raw)
    )
    with pytest.raises(ModelError):
        await worker.start(threads=1, slots=1)
    await worker.kill()
    await gone(worker.pid)
