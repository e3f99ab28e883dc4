"""What a real worker cannot do, whatever its model tries, and that every example model answers all the same."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import msgspec
import psutil
import pytest

from agent.scheduler import ModelQueue
from agent.workers import Version, Worker, WorkerEndedError
from models.backend_settings import BackendSettings
from models.body import parse_body
from models.channel import Ready
from models.errors import ModelError, RequestError
from models.evaluate import matches
from models.manifest import Budget, manifest_bytes
from models.record import record_golden
from models.request import Dialect, Request
from tests.fakes import hostile
from tests.fakes.onnx_graph import endless, fill, fill_asked
from tests.fakes.samples import MODELS, manifest_of, sample
from tests.fakes.worker_process import WorkerProcess

DENIED = {"EPERM", "EACCES"}


def text(body: str) -> Request:
    return Request(model="m", content_type="text/plain", body=body.encode(), dialect=Dialect.HUGGINGFACE)


def tensor(datatype: str, value: float) -> Request:
    body = {"inputs": [{"name": "x", "shape": [1], "datatype": datatype, "data": [value]}]}
    return Request(
        model="m",
        content_type="application/json",
        body=msgspec.json.encode(body),
        dialect=Dialect.OPEN_INFERENCE,
    )


@contextlib.contextmanager
def hostile_worker(budget_mb: int = 100, devices: Sequence[str] = ()) -> Iterator[WorkerProcess]:
    folder, manifest = sample("digits")
    manifest = msgspec.structs.replace(manifest, golden=[], budget=Budget(memory_mb=budget_mb))
    with WorkerProcess(start=hostile.START) as worker:
        ready = worker.open(folder, manifest, backends=BackendSettings(devices=[*devices]))
        assert isinstance(ready, Ready)
        assert ready.unprotected == []
        yield worker


def outcome(worker: WorkerProcess, attack: str) -> str:
    piece = worker.ask(text(attack))
    assert not piece.code, piece.message
    answer: str = msgspec.json.decode(piece.body)["outputs"]
    return answer


def test_e14_a_worker_reads_its_artifact_and_nothing_else(tmp_path: Path) -> None:
    secret = tmp_path / "device.key"
    secret.write_bytes(b"secret")
    with hostile_worker() as worker:
        assert outcome(worker, f"read {MODELS}/digits/model.onnx") not in DENIED
        for path in ("/etc/shadow", "/etc/passwd", str(secret), f"{MODELS}/language/model.onnx", "/proc/1/cmdline"):
            assert outcome(worker, f"read {path}") in DENIED, path
        assert outcome(worker, f"list {tmp_path}") in DENIED
        assert outcome(worker, f"peek {os.getpid()}") in DENIED


def test_e14_a_worker_writes_nothing(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.write_bytes(b"whole")
    with hostile_worker() as worker:
        for path in (tmp_path / "new", there, MODELS / "digits" / "new", Path("/dev/shm/new"), Path("/tmp/new")):
            assert outcome(worker, f"write {path}") in DENIED, path
        for attack in (f"remove {there}", f"mode {there}", f"folder {tmp_path}/new"):
            assert outcome(worker, attack) in DENIED, attack
    assert there.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [there]


def test_e14_a_worker_with_an_accelerator_writes_to_that_device_and_to_nothing_else(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.write_bytes(b"whole")
    with hostile_worker(devices=["/dev/nul*"]) as worker:
        assert outcome(worker, "use /dev/null") == "done"
        for path in (there, tmp_path / "new", Path("/dev/zero"), Path("/dev/shm/new"), MODELS / "digits" / "new"):
            assert outcome(worker, f"use {path}") in DENIED | {"ENOENT"}, path
            assert outcome(worker, f"write {path}") in DENIED, path
    assert there.read_bytes() == b"whole"


def test_e14_a_worker_reaches_no_network_and_no_local_socket(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind(str(tmp_path / "local"))
        local.listen()
        with hostile_worker() as worker:
            assert outcome(worker, f"connect {server.getsockname()[1]}") in DENIED
            assert outcome(worker, f"local {tmp_path}/local") in DENIED


@pytest.mark.parametrize("attack", ["fork", "spawn /bin/true", "exec /bin/true", "unshare", "limit", "type"])
def test_e14_a_worker_starts_no_process_and_raises_itself_to_nothing(attack: str) -> None:
    with hostile_worker() as worker:
        assert outcome(worker, attack) in DENIED
        assert outcome(worker, "nothing") == "done"


@pytest.mark.parametrize("attack", ["trace", "kill"])
def test_e14_a_worker_touches_no_other_process(attack: str) -> None:
    with hostile_worker() as worker:
        assert outcome(worker, f"{attack} {os.getpid()}") in DENIED


def test_e14_a_worker_that_opens_file_after_file_runs_out_of_them_and_answers_on() -> None:
    with hostile_worker() as worker:
        assert outcome(worker, "files /dev/null") == "EMFILE"
        assert outcome(worker, "nothing") == "done"


def test_b9_a_worker_over_its_memory_gets_an_error_and_answers_on() -> None:
    with hostile_worker(budget_mb=100) as worker:
        assert outcome(worker, f"memory {512 << 20}") == "done"
        assert outcome(worker, f"memory {1 << 30}") == "ENOMEM"
        assert outcome(worker, f"eat {1 << 30}") == "MemoryError"
        assert outcome(worker, "nothing") == "done"


@pytest.mark.parametrize("name", sorted(path.parent.name for path in MODELS.glob("*/spillway.toml")))
def test_every_example_answers_inside_the_sandbox_as_it_does_outside(name: str) -> None:
    folder, manifest = sample(name)
    expected = record_golden(folder, manifest)[0].expected
    golden = manifest.golden[0]
    body = parse_body(golden.content_type, golden.body)
    request = Request(model=name, content_type=body.content_type, body=body.body, dialect=body.dialect)
    with WorkerProcess() as worker:
        ready = worker.open(folder, manifest, threads=2)
        assert isinstance(ready, Ready)
        assert ready.unprotected == []
        piece = worker.ask(request)
        status = Path(f"/proc/{worker.process.pid}/status").read_text()
    assert not piece.code, piece.message
    if manifest.format == "genai":
        assert msgspec.json.decode(piece.body)
    else:
        assert matches(msgspec.json.decode(expected), msgspec.json.decode(piece.body), golden.tolerance) is None
    assert "NoNewPrivs:\t1" in status
    assert "Seccomp:\t2" in status


def made(folder: Path, graph: bytes) -> Version:
    """Return a version of a graph that lies on the disk."""
    (folder / "model.onnx").write_bytes(graph)
    raw = manifest_bytes(manifest_of(folder, {"task": "tensors", "format": "onnx"}))
    return Version(name="m", version="1", digest="0" * 64, folder=folder, variant="default", manifest=raw)


def digits() -> Version:
    folder, manifest = sample("digits")
    raw = manifest_bytes(manifest)
    return Version(name="digits", version="1", digest="1" * 64, folder=folder, variant="default", manifest=raw)


@contextlib.asynccontextmanager
async def serving(version: Version) -> AsyncIterator[tuple[Worker, ModelQueue]]:
    loop = asyncio.get_running_loop()
    worker = Worker(version)
    queue = ModelQueue(version.name, loop.time, hang_grace_s=0.5)
    try:
        await worker.start(threads=1, slots=1)
        queue.replace_worker(worker)
        yield worker, queue
    finally:
        await worker.stop()


async def asked(queue: ModelQueue, request: Request, deadline_s: float = 20.0) -> bytes:
    """Ask as the agent does: whoever asked goes away at the deadline."""
    deadline_at = asyncio.get_running_loop().time() + deadline_s
    async with asyncio.timeout(deadline_s), contextlib.aclosing(queue.answer(request, deadline_at, 10.0)) as pieces:
        return b"".join([piece.body async for piece, _ in pieces])


async def test_a_worker_s_memory_is_known_to_its_agent_though_it_shows_it_to_nobody_else() -> None:
    async with serving(digits()) as (worker, _):
        assert 10 < worker.memory_mb() < 400
    assert worker.memory_mb() == 0


async def gone(pid: int) -> None:
    async with asyncio.timeout(5):
        while psutil.pid_exists(pid):  # noqa: ASYNC110 - the kernel tells nobody
            await asyncio.sleep(0.01)


async def test_e1_a_graph_that_never_ends_is_killed_after_its_deadline_and_others_are_answered(tmp_path: Path) -> None:
    image = Request(
        model="digits",
        content_type="image/png",
        body=(MODELS.parent / "inputs" / "digit-0.png").read_bytes(),
        dialect=Dialect.HUGGINGFACE,
    )
    async with serving(made(tmp_path, endless())) as (bomb, bombed), serving(digits()) as (_, healthy):
        started = asyncio.get_running_loop().time()
        with pytest.raises(TimeoutError):
            await asked(bombed, tensor("FP32", 1.0), deadline_s=1.0)
        assert b'"0"' in await asked(healthy, image)
        assert await asyncio.wait_for(bomb.ended, 10)
        assert 1.4 < asyncio.get_running_loop().time() - started < 5.0
        await gone(bomb.pid)
        assert b'"0"' in await asked(healthy, image)


async def test_e2_a_graph_that_asks_for_512_gib_is_refused_or_fails_alone(tmp_path: Path) -> None:
    async with serving(made(tmp_path, fill_asked())) as (worker, queue):
        with pytest.raises((RequestError, WorkerEndedError)) as caught:
            await asked(queue, tensor("INT64", 1 << 37))
        assert getattr(caught.value, "code", "model_failed") == "model_failed"
        if worker.serving:
            assert b"outputs" in await asked(queue, tensor("INT64", 4))


async def test_e2_a_graph_that_always_needs_512_gib_is_refused_or_fails_alone(tmp_path: Path) -> None:
    with pytest.raises((ModelError, RequestError, WorkerEndedError)):
        async with serving(made(tmp_path, fill(1 << 37))) as (_, queue):
            await asked(queue, tensor("FP32", 1.0))
