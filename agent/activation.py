"""From staged to serving: trial, swap, watch, roll back. One supervisor for each model.

A version begins as a trial worker that must reproduce its golden samples inside its budget on this box; then
requests move over at once and the old worker drains. What fails is not tried again until an admin says so.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil

from agent.config import Config
from agent.health import Health
from agent.scheduler import ModelQueue
from agent.service import Service
from agent.workers import ENDED, Version, Worker, WorkerEndedError
from cloud_sync.state import Current, State
from cloud_sync.sync_settings import SyncOutcome, TargetModel
from models.body import parse_body
from models.channel import Piece
from models.errors import ModelError, RequestError
from models.evaluate import Answered, judge
from models.manifest import BoxFacts, Golden, ManifestError, parse_manifest, pick_variant
from models.request import Request

log = logging.getLogger(__name__)

TRIAL_TIMEOUT_MS = 60_000.0
CRASH_LIMIT = 5
CRASH_WINDOW_S = 120.0
MAX_BACKOFF_S = 30.0
GENERATING = frozenset({"text-generation"})


class ModelReport(msgspec.Struct, omit_defaults=True):
    """What the box tells of one model."""

    state: str
    version: str = ""
    digest: str = ""
    target: str = ""
    code: str = ""
    message: str = ""


class Runner:
    """Keeps the current version of one model serving."""

    def __init__(self, name: str, queue: ModelQueue) -> None:
        self.name = name
        self.queue = queue
        self.report = ModelReport(state="starting")
        self.current: Version | None = None
        self.worker: Worker | None = None
        self.crashes: collections.deque[float] = collections.deque()
        self.task: asyncio.Task[None] | None = None


class Activation:
    """Decides which version of each model serves here."""

    def __init__(
        self,
        config: Config,
        state: State,
        service: Service,
        health: Health,
        *,
        box: BoxFacts,
        clock: Callable[[], float],
        on_change: Callable[[], None],
    ) -> None:
        self._config = config
        self._state = state
        self._service = service
        self._health = health
        self.box = box
        self._clock = clock
        self._on_change = on_change
        self._versions = Path(config.state.directory) / "versions"
        self._runners: dict[str, Runner] = {}
        self._draining: set[asyncio.Task[None]] = set()
        self._busy = asyncio.Lock()
        self._stopping = False

    def reports(self) -> dict[str, ModelReport]:
        """Return the state of every model that this box knows."""
        return {name: runner.report for name, runner in sorted(self._runners.items())}

    async def resume(self) -> None:
        """Serve at once what served before; no network is needed."""
        for name, current in sorted((await self._state.current()).items()):
            runner = self._runner(name)
            version = self._installed(name, current.version, current.digest)
            if version is None:
                self._tell(runner, state="failed", code="missing", message=f"{current.digest} is not on the disk")
                continue
            runner.current = version
            self._tell(runner, state="starting", version=version.version, digest=version.digest)
            runner.task = asyncio.get_running_loop().create_task(self._supervise(runner), name=f"model {name}")

    async def apply(self, outcome: SyncOutcome) -> None:
        """Move every model towards its target; one that fails keeps the others from nothing."""
        async with self._busy:
            failed = await self._state.failed()
            for target in outcome.models:
                runner = self._runner(target.name)
                if target.error is not None:
                    self._tell(runner, target=target.version, code=target.error.code, message=target.error.message)
                elif runner.current is not None and runner.current.digest == target.digest:
                    self._tell(runner, target="", code="", message="")
                elif target.digest in failed:
                    known = failed[target.digest]
                    self._tell(runner, target=target.version, code=known.code, message=known.message)
                elif target.staged:
                    await self._try(runner, target)
            wanted = {target.name for target in outcome.models}
            for name in [name for name in self._runners if name not in wanted]:
                await self._remove(name)

    async def stop(self) -> None:
        """End every worker."""
        self._stopping = True
        for task in self._draining:
            task.cancel()
        await asyncio.gather(
            *(self._halt(runner) for runner in self._runners.values()), *self._draining, return_exceptions=True
        )

    def _runner(self, name: str) -> Runner:
        runner = self._runners.get(name)
        if runner is None:
            queue = self._service.queues[name] = ModelQueue(name, self._clock)
            runner = self._runners[name] = Runner(name, queue)
        return runner

    def _installed(self, name: str, version: str, digest: str) -> Version | None:
        """Return a version that is whole on this disk, or None."""
        folder = self._versions / digest
        try:
            raw = (folder / "manifest.json").read_bytes()
        except OSError:
            return None
        try:
            variant = pick_variant(parse_manifest(raw), self.box)
        except ManifestError as error:
            log.warning("%s@%s cannot run here: %s", name, version, error)
            return None
        return Version(name=name, version=version, digest=digest, folder=folder, variant=variant.name, manifest=raw)

    async def _try(self, runner: Runner, target: TargetModel) -> None:
        """Run a trial of the target and activate it, or report why not."""
        version = self._installed(target.name, target.version, target.digest)
        if version is None:
            self._tell(runner, target=target.version, code="missing", message="staged, but not on the disk")
            return
        self._tell(runner, target=target.version, code="", message="in trial")
        worker = Worker(version)
        try:
            await self._trial(worker, version)
        except asyncio.CancelledError:
            await worker.kill()
            raise
        except (ModelError, WorkerEndedError, ManifestError, RequestError) as error:
            await worker.kill()
            await self._state.mark_failed(target.digest, "trial_failed", str(error))
            self._tell(runner, target=target.version, code="trial_failed", message=str(error))
            log.warning("%s failed its trial: %s", version.label, error)
            return
        await self._activate(runner, version, worker)

    async def _trial(self, worker: Worker, version: Version) -> None:
        """Let a worker answer its golden samples; raises ModelError naming what it failed."""
        manifest = parse_manifest(version.manifest)
        await self._start(worker)
        answers = []
        for golden in manifest.golden:
            await self._sample(worker, golden)  # once to warm, once to measure
            answers.append((golden, await self._sample(worker, golden)))
        memory_mb = await asyncio.to_thread(_memory_mb, worker.pid)
        verdict = judge(manifest, [_answered(golden, piece) for golden, piece in answers], memory_mb)
        if not verdict.passed:
            raise ModelError("; ".join(verdict.problems))
        for _, piece in answers:
            law = self._runners[version.name].queue.law
            law.observe(piece.tokens_in, piece.tokens_out, piece.compute_ms)

    async def _sample(self, worker: Worker, golden: Golden) -> Piece:
        """Ask one golden question; raises ModelError where nothing comes back."""
        done: asyncio.Future[Piece] = asyncio.get_running_loop().create_future()

        def on_piece(piece: Piece) -> None:
            if piece.final and not done.done():
                done.set_result(piece)

        body = parse_body(golden.content_type, golden.body)
        request = Request(
            model=worker.version.name, content_type=body.content_type, body=body.body, dialect=body.dialect
        )
        worker.ask(request, TRIAL_TIMEOUT_MS, on_piece)
        try:
            async with asyncio.timeout(TRIAL_TIMEOUT_MS / 1e3):
                piece = await done
        except TimeoutError as error:
            raise ModelError(f"a golden sample had no answer within {TRIAL_TIMEOUT_MS / 1e3:.0f} s") from error
        if piece.code == ENDED:
            raise ModelError(f"the worker ended over a golden sample: {piece.message}")
        return piece

    async def _activate(self, runner: Runner, version: Version, worker: Worker) -> None:
        """Note the new version durably, move requests over, and let the old worker finish."""
        old_version, old_worker = runner.current, runner.worker
        await self._state.set_current(runner.name, _pointer(version, old_version))
        if runner.task is not None:
            runner.task.cancel()
        runner.current, runner.worker = version, worker
        runner.crashes.clear()
        runner.queue.replace_worker(worker, parallel=_generating(version))
        runner.task = asyncio.get_running_loop().create_task(self._supervise(runner), name=f"model {runner.name}")
        self._tell(
            runner, state="serving", version=version.version, digest=version.digest, target="", code="", message=""
        )
        log.info("%s serves", version.label)
        if old_worker is not None:
            task = asyncio.get_running_loop().create_task(self._drain(runner, old_worker), name=f"drain {runner.name}")
            self._draining.add(task)
            task.add_done_callback(self._draining.discard)

    async def _drain(self, runner: Runner, worker: Worker) -> None:
        try:
            async with asyncio.timeout(self._config.limits.drain_timeout_s):
                await runner.queue.drain(worker)
        except TimeoutError:
            log.warning("%s did not finish in time; its requests are asked again", worker.version.label)
        finally:
            await worker.stop()

    async def _supervise(self, runner: Runner) -> None:
        """Keep a worker running; restart it with backoff, and roll back what crashes in a loop."""
        while not self._stopping and runner.current is not None:
            if (runner.worker is None or runner.worker.ended.done()) and not await self._restart(runner):
                return
            worker = runner.worker
            if worker is None:
                return
            await asyncio.shield(worker.ended)
            runner.queue.starting = True
            self._tell(runner, state="restarting")
            runner.crashes.append(self._clock())
            while runner.crashes and runner.crashes[0] < self._clock() - CRASH_WINDOW_S:
                runner.crashes.popleft()
            if len(runner.crashes) >= CRASH_LIMIT:
                await self._roll_back(runner, f"its worker ended {CRASH_LIMIT} times in {CRASH_WINDOW_S:.0f} s")
            else:
                await asyncio.sleep(min(MAX_BACKOFF_S, 0.1 * 4 ** (len(runner.crashes) - 1)))

    async def _restart(self, runner: Runner) -> bool:
        """Start the current version's worker; False where it cannot be opened and there is nothing to go back to."""
        version = runner.current
        if version is None:
            return False
        runner.queue.starting = True
        worker = Worker(version)
        try:
            await self._start(worker)
        except asyncio.CancelledError:
            await worker.kill()
            raise
        except (ModelError, WorkerEndedError) as error:
            await worker.kill()
            await self._roll_back(runner, str(error))
            return runner.current is not None
        finally:
            runner.queue.starting = False
        runner.worker = worker
        runner.queue.replace_worker(worker, parallel=_generating(version))
        self._tell(runner, state="serving", version=version.version, digest=version.digest)
        return True

    async def _roll_back(self, runner: Runner, why: str) -> None:
        """Go back to the version before; the failing digest is not tried again."""
        bad = runner.current
        if bad is None:
            return
        log.error("%s is rolled back: %s", bad.label, why)
        await self._state.mark_failed(bad.digest, "rolled_back", why)
        known = (await self._state.current()).get(runner.name)
        before = None
        if known is not None and known.previous_digest:
            before = self._installed(runner.name, known.previous_version, known.previous_digest)
        runner.current, runner.worker = before, None
        runner.crashes.clear()
        runner.queue.starting = before is not None
        runner.queue.replace_worker(None)
        if before is None:
            await self._state.drop_current(runner.name)
            self._tell(
                runner, state="failed", version="", digest="", target=bad.version, code="rolled_back", message=why
            )
            return
        await self._state.set_current(runner.name, Current(before.version, before.digest))
        self._tell(runner, state="starting", target=bad.version, code="rolled_back", message=why)

    async def _remove(self, name: str) -> None:
        """Stop serving a model that no deployment names any more."""
        runner = self._runners.pop(name)
        self._service.queues.pop(name, None)
        await self._state.drop_current(name)
        if runner.worker is not None:
            await self._drain(runner, runner.worker)
        await self._halt(runner)
        self._health.models.pop(name, None)
        self._on_change()

    async def _halt(self, runner: Runner) -> None:
        if runner.task is not None:
            runner.task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await runner.task
        if runner.worker is not None:
            await runner.worker.stop()

    async def _start(self, worker: Worker) -> None:
        limits = self._config.limits
        threads = limits.worker_threads or max(1, (psutil.cpu_count(logical=False) or 2))
        await worker.start(threads=threads, slots=limits.worker_slots)

    def _tell(self, runner: Runner, **facts: str) -> None:
        """Change what is reported of a model, and let the world know."""
        for name, value in facts.items():
            setattr(runner.report, name, value)
        self._health.models[runner.name] = runner.report.state
        self._on_change()


def _pointer(version: Version, previous: Version | None) -> Current:
    if previous is None:
        return Current(version.version, version.digest)
    return Current(version.version, version.digest, previous.version, previous.digest)


def _generating(version: Version) -> bool:
    return parse_manifest(version.manifest).task in GENERATING


def _answered(golden: Golden, piece: Piece) -> Answered:
    return Answered(golden=golden, body=piece.body, ms=piece.compute_ms, code=piece.code, message=piece.message)


def _memory_mb(pid: int) -> float:
    """Return the proportional set size of a process in MiB; 0 where it is gone."""
    try:
        return float(psutil.Process(pid).memory_full_info().pss) / (1 << 20)
    except (psutil.Error, AttributeError):
        return 0.0
