"""Mutants of valid models beside a healthy one: nobody may die but a worker, and the healthy model answers on.

`python -m tests.system.mutants [--trials 2000] [--opened 0] [--seed 1] [--keep FOLDER]`. Each of `trials` is tried as
a box tries a new version: a worker of its own, loaded, asked its golden samples. `opened` more are only opened, each
in a confined child of one loader, which is forty times as fast. Meanwhile a healthy model answers some requests a
second, before and during. After each worker that a mutant ended, the version before is started: it must be back
within 2 s. Exits 1 where a bound is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from agent.scheduler import ModelQueue
from agent.trial import run_trial
from agent.versions import Installed
from agent.workers import Version, Worker, WorkerEndedError
from models.body import parse_body
from models.errors import ModelError, RequestError
from models.evaluate import quantile
from models.manifest import Budget, Manifest, manifest_bytes
from models.record import record_golden
from models.request import Request
from tests.fakes.samples import sample
from tests.support.mutant_loader import GRAPHS, SEED_STEP
from tests.support.mutants import mutant

EXAMPLES = ("digits-int8", "digits", "co2-forecast", "digits-small", "sea-temperature", "language")
HEALTHY = "digits"
KNOWN = (("digits-int8", 1_000_003 + 14_078),)
"""Mutants that have ended a runtime before: example and seed. They come first, since chance finds few of them."""
KNOWN_TIMES = 5
PERIOD_S = 0.05
CALM_S = 10.0
TRIALS_A_CALM = 50
BACK_S = 2.0
SLOWER = 2.0
BUDGET = Budget(memory_mb=200)


class Harness:
    """A healthy model's worker and queue, and the times it took to answer."""

    def __init__(self) -> None:
        self.ends: collections.Counter[str] = collections.Counter()
        self.back_s: list[float] = []
        self.calm_ms: list[float] = []
        self.busy_ms: list[float] = []
        self.failed = 0
        self._times = self.calm_ms

    async def healthy(self) -> None:
        """Answer a request every so often, for ever."""
        folder, manifest = sample(HEALTHY)
        worker = Worker(_installed(folder, manifest).version)
        queue = ModelQueue(HEALTHY, asyncio.get_running_loop().time)
        await worker.start(threads=1, slots=1)
        queue.replace_worker(worker)
        request = _request(manifest)
        try:
            while True:
                began = time.perf_counter()
                try:
                    await _answered(queue, request)
                    self._times.append((time.perf_counter() - began) * 1000)
                except (RequestError, WorkerEndedError):
                    self.failed += 1
                await asyncio.sleep(max(0.0, began + PERIOD_S - time.perf_counter()))
        finally:
            await worker.stop()

    async def calm(self, seconds: float) -> None:
        """Let the healthy model be alone for a while; what it answers afterwards is counted as given beside mutants."""
        self._times = self.calm_ms
        await asyncio.sleep(seconds)
        self._times = self.busy_ms

    async def try_one(self, installed: Installed) -> bool:
        """Try a mutant as a box tries a new version; True if it ended its worker."""
        worker = Worker(installed.version)
        try:
            await worker.start(threads=1, slots=1)
            await run_trial(worker, installed)
            end = "passed its trial"
        except (ModelError, RequestError, WorkerEndedError):
            end = "refused"
        finally:
            await worker.kill()
        code = worker._process.returncode if worker._process is not None else None
        crashed = code is not None and code < 0 and code != -signal.SIGKILL
        self.ends[f"ended its worker by {signal.Signals(-code).name}" if code and crashed else end] += 1
        return crashed

    async def bring_back(self) -> None:
        """Start a version that is whole, as a box does after a crash, and note how long that took."""
        began = time.perf_counter()
        worker = Worker(_installed(*sample(HEALTHY)).version)
        await worker.start(threads=1, slots=1)
        self.back_s.append(time.perf_counter() - began)
        await worker.stop()

    def missed(self) -> list[str]:
        """Return which bounds were missed."""
        calm, busy, back = quantile(self.calm_ms, 0.99), quantile(self.busy_ms, 0.99), max(self.back_s, default=0.0)
        bounds = {
            f"{self.failed} of the healthy model's requests failed": self.failed > 0,
            f"its p99 went from {calm:.1f} to {busy:.1f} ms": busy > SLOWER * calm,
            f"a worker took {back:.1f} s to come back": back > BACK_S,
        }
        return [words for words, is_missed in bounds.items() if is_missed]

    def table(self) -> str:
        """Return what happened, as a markdown table."""
        rows = [(f"mutants: {end}", str(number)) for end, number in sorted(self.ends.items())]
        for name, times in (("alone", self.calm_ms), ("beside them", self.busy_ms)):
            middle, late = quantile(times, 0.5), quantile(times, 0.99)
            rows.append((f"healthy model {name}: answers, p50, p99", f"{len(times)}, {middle:.1f} ms, {late:.1f} ms"))
        rows.append(("its requests that failed", str(self.failed)))
        rows.append(("slowest start after a worker's end", f"{max(self.back_s, default=0.0):.2f} s"))
        return "\n".join(["| what | figure |", "| --- | --- |", *(f"| {what} | {figure} |" for what, figure in rows)])


def _installed(folder: Path, manifest: Manifest) -> Installed:
    raw = manifest_bytes(manifest)
    version = Version(name="m", version="1", digest="0" * 64, folder=folder, variant="default", manifest=raw)
    return Installed(version=version, task=manifest.task, budget=manifest.budget, golden=manifest.golden, files_mb=1.0)


def _request(manifest: Manifest) -> Request:
    golden = manifest.golden[0]
    body = parse_body(golden.content_type, golden.body)
    return Request(model=HEALTHY, content_type=body.content_type, body=body.body, dialect=body.dialect)


async def _answered(queue: ModelQueue, request: Request) -> None:
    deadline_at = asyncio.get_running_loop().time() + 10
    async with contextlib.aclosing(queue.answer(request, deadline_at, 10.0)) as pieces:
        async for _ in pieces:
            pass


async def _tried(harness: Harness, name: str, seeds: Sequence[int], calm_s: float) -> None:
    """Try the mutants of an example one after the other, with a calm now and then to compare with."""
    folder, manifest = sample(name)
    recorded = msgspec.structs.replace(manifest, golden=record_golden(folder, manifest), budget=BUDGET)
    graph = GRAPHS[manifest.format]
    original = (folder / graph).read_bytes()
    with tempfile.TemporaryDirectory() as made:
        for entry in manifest.files:
            (Path(made) / entry.path).write_bytes((folder / entry.path).read_bytes())
        for at, seed in enumerate(seeds):
            if at % TRIALS_A_CALM == 0:
                await harness.calm(calm_s)
            (Path(made) / graph).write_bytes(mutant(original, manifest.format, seed))
            if await harness.try_one(_installed(Path(made), recorded)):
                await harness.bring_back()


async def _opened(harness: Harness, name: str, count: int, seed: int, keep: str) -> None:
    """Let a loader open so many mutants of an example."""
    command = [sys.executable, "-m", "tests.support.mutant_loader", name, str(seed), "0", str(count), keep]
    one_thread = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env=one_thread)
    told, _ = await process.communicate()
    ends: dict[str, int] = json.loads(told)
    for end, number in ends.items():
        harness.ends[f"opened, {end}"] += number


async def run(arguments: argparse.Namespace) -> int:
    """Run and tell; returns the exit status."""
    logging.getLogger("agent").setLevel(logging.CRITICAL)  # each refused mutant is a line
    harness = Harness()
    healthy = asyncio.create_task(harness.healthy())
    for name, seed in KNOWN:
        await _tried(harness, name, [seed] * KNOWN_TIMES, arguments.calm_s)
    for at, name in enumerate(EXAMPLES):
        shares = [(total + at) // len(EXAMPLES) for total in (arguments.trials, arguments.opened)]
        if shares[0]:
            first = arguments.seed * SEED_STEP
            await _tried(harness, name, range(first, first + shares[0]), arguments.calm_s)
        if shares[1]:
            await harness.calm(arguments.calm_s)
            await _opened(harness, name, shares[1], arguments.seed, arguments.keep)
    alive = not healthy.done()
    healthy.cancel()
    await asyncio.gather(healthy, return_exceptions=True)
    missed = harness.missed() + ([] if alive else ["the healthy model's asker ended"])
    sys.stdout.write(harness.table() + "\n" + "".join(f"missed: {words}\n" for words in missed))
    return 1 if missed else 0


def main() -> int:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description="Mutants of valid models beside a healthy one.")
    parser.add_argument("--trials", type=int, default=2000, help="mutants tried as a box tries a version")
    parser.add_argument("--opened", type=int, default=0, help="mutants opened by a loader")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--calm-s", type=float, default=CALM_S, help="seconds of each calm, in which the healthy model is alone"
    )
    parser.add_argument("--keep", default="", help="a folder for mutants that ended their process by a signal")
    return asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
