"""The agent's side of real worker processes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import psutil
import pytest

from agent.workers import ENDED, Version, Worker
from models.channel import Piece
from models.errors import ModelError
from models.manifest import manifest_bytes
from models.request import Dialect, Request
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


async def ask(worker: Worker, budget_ms: float = 20_000) -> Piece:
    done: asyncio.Future[Piece] = asyncio.get_running_loop().create_future()
    worker.ask(TEXT, budget_ms, done.set_result)
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
        assert isinstance(protocol, asyncio.Protocol)
        protocol.data_received(garbage)
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
