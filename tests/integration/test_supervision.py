"""Workers that do what none should, under the agent's own supervisor: each harms itself alone.

Real worker processes, confined as on a box, whose session does what a request's text says.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import psutil
import pytest

from agent import workers
from agent.activation import Activation
from agent.config import parse_config
from agent.health import Health
from agent.house import Edges
from agent.workers import Worker
from cloud_sync.report import ModelReport
from cloud_sync.state import State
from cloud_sync.sync_settings import SyncOutcome, TargetModel
from models.manifest import Budget, digest_of, manifest_bytes
from tests.fakes import hostile
from tests.fakes.artifacts import manifest_of
from tests.support.bench import BOX, bench
from tests.support.box import LEAST, Asked, Box, open_box
from tests.support.virtual_time import virtual_time

ROOMY = "[limits]\nmax_requests = 20000\nhang_grace_s = 0.2\n[models.digits]\nmax_queue = 20000\n"
QUIET = "nothing"
PYTHON = sys.executable
FEW = 32
"""Answers of a flooded model that may go before one of a quiet model, at 2 ms of a processor each: the 49th of 50."""


class House:
    """A box in this process with real workers of `digits` and `sea`."""

    def __init__(self, box: Box, folder: Path) -> None:
        self.box = box
        self.folder = folder
        self.made: list[Worker] = []
        self.state = State(box.database)
        config = msgspec.structs.replace(
            box.config, state=parse_config(LEAST + f'[state]\ndirectory = "{folder}"').state
        )
        self.activation = Activation(
            config,
            self.state,
            box.service,
            Health(),
            box=BOX,
            clock=box.clock,
            on_change=lambda: None,
            edges=Edges(new_worker=self._new_worker),
        )

    def _new_worker(self, version: workers.Version) -> Worker:
        self.made.append(Worker(version))
        return self.made[-1]

    def install(self, number: str, name: str = "digits", memory_mb: int = 100) -> TargetModel:
        manifest = manifest_of({"model.onnx": number.encode()}, name=name, version=number)
        raw = manifest_bytes(msgspec.structs.replace(manifest, budget=Budget(memory_mb=memory_mb)))
        folder = self.folder / "versions" / digest_of(raw)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").write_bytes(raw)
        (folder / "model.onnx").write_bytes(number.encode())
        return TargetModel(name=name, version=number, digest=digest_of(raw), variant="default", staged=True)

    async def apply(self, *targets: TargetModel) -> None:
        await self.activation.apply(SyncOutcome(models=list(targets), pools=[]))

    @property
    def report(self) -> ModelReport:
        return self.activation.reports()["digits"]

    @property
    def worker(self) -> Worker:
        return self.made[-1]

    @property
    def answered(self) -> int:
        """How many requests to `digits` the box has answered itself."""
        return sum(
            count for (model, *_, code), count in self.box.telemetry.answers.items() if (model, code) == ("digits", "")
        )

    async def ask(self, words: str, *, model: str = "digits", deadline_s: float = 20.0) -> Asked:
        asked = self.box.ask(words.encode(), model=model, deadline_s=deadline_s)
        await self.box.finished(asked)
        return asked

    async def until(self, what: Callable[[], object]) -> None:
        async with asyncio.timeout(20):
            while not what():  # noqa: ASYNC110 - workers tell nobody
                await asyncio.sleep(0.01)


def outputs(asked: Asked) -> str:
    """Return what the attack came to."""
    told: str = msgspec.json.decode(asked.final.body)["outputs"]
    return told


@pytest.fixture(autouse=True)
def hostile_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the agent start workers whose session attacks; everything else of them is as on a box."""
    start = tmp_path / "python"
    start.write_text(f'#!/bin/sh\nexec {PYTHON} -I -c "{hostile.START}" "$4"\n')
    start.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(start))


@contextlib.asynccontextmanager
async def house(folder: Path, addition: str = ROOMY, *models: str) -> AsyncIterator[House]:
    async with open_box(folder, addition) as box:
        made = House(box, folder)
        running = asyncio.ensure_future(made.activation.run())
        try:
            await made.apply(*(made.install("1", name) for name in models or ("digits",)))
            yield made
        finally:
            running.cancel()
            await made.activation.stop()
        pids = [worker.pid for worker in made.made]
        assert not [pid for pid in pids if psutil.pid_exists(pid)], "a worker outlives the box"


async def test_e16_a_crash_costs_one_request_and_those_that_wait_are_answered(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        first = here.box.ask(b"crash")
        others = [here.box.ask(QUIET.encode()) for _ in range(50)]
        await here.box.finished(first, *others)
        assert first.code == "model_failed"
        assert "ended" in first.final.body.decode()
        assert {one.code for one in others} == {""}
        assert here.report.state == "serving"


async def test_e1_a_worker_that_hangs_is_ended_and_the_next_request_is_answered(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        hung = here.box.ask(b"hang 3600", deadline_s=0.3)
        waiting = here.box.ask(QUIET.encode())
        await here.box.finished(hung, waiting)
        assert (hung.code, waiting.code) == ("deadline_exceeded", "")
        assert len(here.made) == 2


async def test_a_worker_that_is_stopped_is_ended_and_the_next_request_is_answered(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        psutil.Process(here.worker.pid).suspend()
        assert (await here.ask(QUIET, deadline_s=0.3)).code == "deadline_exceeded"
        assert (await here.ask(QUIET)).code == ""


async def test_b9_a_worker_that_eats_more_than_it_may_gets_an_error_and_answers_on(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        assert outputs(await here.ask(f"eat {1 << 30}")) == "MemoryError"
        assert outputs(await here.ask(QUIET)) == "done"
        assert len(here.made) == 1


class MemoryGroup:
    """A limit of the kernel's, of 96 MiB; as root, for nobody else may make one."""

    def __init__(self) -> None:
        root = Path("/sys/fs/cgroup")
        old = (root / "memory").is_dir()
        self.folder = root / ("memory" if old else "") / f"spillway-test-{os.getpid()}"
        self.folder.mkdir()
        (self.folder / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(96 << 20))
        self._events = self.folder / ("memory.oom_control" if old else "memory.events")

    def add(self, pid: int) -> None:
        (self.folder / "cgroup.procs").write_text(str(pid))

    def kills(self) -> int:
        """Return how many processes the kernel has killed for the limit."""
        return int(dict(line.split() for line in self._events.read_text().splitlines())["oom_kill"])


@pytest.mark.quiet_machine
async def test_b9_a_worker_that_the_kernel_kills_for_its_memory_costs_nobody_an_answer(tmp_path: Path) -> None:
    group = MemoryGroup()
    async with house(tmp_path) as here:
        group.add(here.worker.pid)
        eaten, quiet = here.box.ask(f"leak {150 << 20}".encode()), here.box.ask(QUIET.encode())
        await here.box.finished(eaten, quiet)
        assert (eaten.code, quiet.code) == ("", "")
        assert (group.kills(), len(here.made), here.report.state) == (1, 2, "serving")
    group.folder.rmdir()


async def test_a_slow_leak_ends_in_a_fresh_worker_before_the_kernel_or_an_asker_notices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.activation.LOOK_S", 0.05)
    async with house(tmp_path) as here:
        codes = []
        for _ in range(40):
            codes.append((await here.ask(f"leak {10 << 20}")).code)
            await asyncio.sleep(0.02)
        await here.until(lambda: len(here.made) > 1 and here.worker.serving)
        assert set(codes) == {""}
        assert (here.report.state, here.report.code) == ("serving", "")
        assert here.worker.holding().own_mb < 214
        await here.until(here.made[0].ended.done)
        assert here.made[0]._process is not None
        assert here.made[0]._process.returncode == 0


async def test_a_fork_bomb_starts_nothing_and_hundreds_of_threads_end_their_worker_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.activation.LOOK_S", 0.05)
    async with house(tmp_path, ROOMY, "digits", "sea") as here:
        (sea,) = [worker for worker in here.made if worker.version.name == "sea"]
        assert outputs(await here.ask("bomb 1000")) == "1000 denied"
        await here.ask("threads 300")
        await here.until(lambda: len(here.made) == 3)
        assert (await here.ask(QUIET)).code == ""
        assert (await here.ask(QUIET, model="sea")).code == ""
        assert sea.serving


@pytest.mark.parametrize("numbers", [range(1), range(1, 2), range(2, len(hostile.GARBAGE))])
async def test_e15_garbage_on_the_channel_harms_the_worker_that_says_it_alone(tmp_path: Path, numbers: range) -> None:
    async with house(tmp_path) as here:
        asked = [here.box.ask(f"garbage {number}".encode()) for number in numbers]
        others = [here.box.ask(QUIET.encode()) for _ in range(5)]
        await here.box.finished(*asked, *others)
        assert {one.code for one in others} == {""}
        assert here.report.state == "serving"
        assert (await here.ask(QUIET)).code == ""


async def test_a_worker_that_never_says_ready_is_given_up_and_the_version_before_serves_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house(tmp_path) as here:
        monkeypatch.setattr(workers, "LOAD_TIMEOUT_S", 0.3)
        start = tmp_path / "python"
        start.write_text(f'#!/bin/sh\nexec {PYTHON} -I -c "import time; time.sleep(3600)" "$4"\n')
        await here.apply(here.install("2"))
        assert (here.report.state, here.report.version, here.report.code) == ("serving", "1", "trial_failed")
        assert here.report.message == "digits@2 was not loaded within 0 s"
        assert (await here.ask(QUIET)).code == ""


async def test_e8_a_version_whose_worker_crashes_again_and_again_is_rolled_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.house.MAX_BACKOFF_S", 0.05)
    async with house(tmp_path) as here:
        await here.apply(here.install("2"))
        for _ in range(3):
            await here.ask("crash")
        await here.until(lambda: (here.report.version, here.report.state) == ("1", "serving"))
        assert here.report.code == "rolled_back"
        assert here.report.message.startswith("crashes: its worker ended 5 times")
        assert (await here.ask(QUIET)).final.model == "digits@1"


@pytest.mark.quiet_machine
async def test_ten_thousand_requests_while_a_worker_is_down_are_all_answered(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        psutil.Process(here.worker.pid).kill()
        asked = [here.box.ask(QUIET.encode(), deadline_s=600) for _ in range(10_000)]
        await here.box.finished(*asked)
        assert {one.code for one in asked} == {""}
        assert len(here.made) == 2


@virtual_time
async def test_ten_thousand_requests_over_a_box_s_bounds_each_have_one_answer_and_the_box_goes_on(
    tmp_path: Path,
) -> None:
    async with bench(tmp_path) as here:
        await here.apply(here.install("1"))
        here.worker.die("signal 9")
        asked = [here.box.ask() for _ in range(10_000)]
        await here.box.finished(*asked)
        codes = [one.code for one in asked]
        assert set(codes) == {"", "overloaded"}
        assert codes.count("") >= 256
        assert (await here.ask()).code == ""


@pytest.mark.parametrize("addition", ["", "[limits]\nmax_requests = 200\n[models.digits]\nmax_queue = 5000\n"])
async def test_one_model_s_flood_takes_no_answer_from_another(tmp_path: Path, addition: str) -> None:
    """By counts: the flooded model's queue is never empty, and yet few of its answers go before one of the quiet's."""
    async with house(tmp_path, addition, "digits", "sea") as here:
        flood: list[Asked] = []

        async def keep_flooding() -> None:
            while True:
                flood.extend(here.box.ask(b"spin 0.002") for _ in range(400))
                await asyncio.sleep(0.1)

        flooding = asyncio.ensure_future(keep_flooding())
        await here.until(lambda: here.box.service.queues["digits"].queued > 100)
        quiet, before = [], []
        for _ in range(50):
            answered = here.answered
            quiet.append(await here.ask(QUIET, model="sea"))
            before.append(here.answered - answered)
            assert here.box.service.queues["digits"].queued > 0
        flooding.cancel()
        await here.box.finished(*flood)
        assert {one.code for one in quiet} == {""}
        assert {one.code for one in flood} == {"", "overloaded"}
        assert sorted(before)[48] <= FEW, before
