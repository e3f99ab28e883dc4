"""From staged to serving: trial, swap, watch, roll back. One supervisor for each model.

A version begins as a trial worker that must reproduce its golden samples inside its budget on this box; then
requests move over at once and the old worker drains. What fails is not tried again until an admin says so.
"""

from __future__ import annotations

import asyncio
import collections
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import psutil

from agent.config import Config
from agent.health import Health
from agent.scheduler import ModelQueue
from agent.service import Service
from agent.trial import run_trial
from agent.workers import Version, Worker, WorkerEndedError
from cloud_sync.errors import StoreError
from cloud_sync.state import Current, State
from cloud_sync.sync_settings import SyncOutcome, TargetModel
from models.errors import ModelError, RequestError
from models.manifest import BoxFacts, ManifestError, parse_manifest, pick_variant

log = logging.getLogger(__name__)

CRASH_LIMIT = 5
CRASH_WINDOW_S = 120.0
START_LIMIT = 3
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
    unprotected: list[str] = []
    """What this box's kernel lacks to confine its worker."""


class Runner:
    """Keeps the current version of one model serving."""

    def __init__(self, name: str, queue: ModelQueue) -> None:
        self.name = name
        self.queue = queue
        self.report = ModelReport(state="starting")
        self.current: Version | None = None
        self.worker: Worker | None = None
        self.crashes: collections.deque[float] = collections.deque()
        self.failed_starts = 0
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
        new_worker: Callable[[Version], Worker] = Worker,
    ) -> None:
        self._new_worker = new_worker
        self._config = config
        self._state = state
        self._service = service
        self._health = health
        self.box = box
        self._clock = clock
        self._on_change = on_change
        self._versions = Path(config.state.directory) / "versions"
        self._runners: dict[str, Runner] = {}
        self._draining: dict[asyncio.Task[None], Worker] = {}
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
        draining = dict(self._draining)
        for task in draining:
            task.cancel()
        halts = [self._halt(runner) for runner in self._runners.values()]
        await asyncio.gather(*halts, *(worker.stop() for worker in draining.values()), return_exceptions=True)

    def _runner(self, name: str) -> Runner:
        runner = self._runners.get(name)
        if runner is None:
            queue = self._service.queues[name] = self._new_queue(name)
            runner = self._runners[name] = Runner(name, queue)
        return runner

    def _new_queue(self, name: str) -> ModelQueue:
        return ModelQueue(name, self._clock, hang_grace_s=self._config.limits.hang_grace_s)

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
        worker = self._new_worker(version)
        try:
            await self._start(worker)
            for piece in await run_trial(worker):
                runner.queue.law.observe(piece.tokens_in, piece.tokens_out, piece.compute_ms)
            await _ended(runner.task)  # nothing else may decide what is current while this does
            await self._state.set_current(runner.name, _pointer(version, runner.current))
        except asyncio.CancelledError:
            await worker.kill()
            raise
        except (ModelError, WorkerEndedError, ManifestError, RequestError) as error:
            await worker.kill()
            await self._noted(self._state.mark_failed(target.digest, "trial_failed", str(error)))
            self._tell(runner, target=target.version, code="trial_failed", message=str(error))
            log.warning("%s failed its trial: %s", version.label, error)
        except (StoreError, OSError) as error:  # not the version's fault: the next pass tries again
            await worker.kill()
            self._tell(runner, target=target.version, code="trial_impossible", message=str(error))
            log.warning("%s could not be tried: %s", version.label, error)
            if runner.task is not None and runner.task.done():
                runner.task = asyncio.get_running_loop().create_task(self._supervise(runner))
        else:
            self._activate(runner, version, worker)

    def _activate(self, runner: Runner, version: Version, worker: Worker) -> None:
        """Move requests over to a version that is durably noted, and let the old worker finish."""
        old_worker = runner.worker
        runner.current, runner.worker = version, worker
        runner.report.unprotected = worker.unprotected
        runner.crashes.clear()
        runner.failed_starts = 0
        runner.queue.replace_worker(worker, parallel=_generating(version))
        runner.task = asyncio.get_running_loop().create_task(self._supervise(runner), name=f"model {runner.name}")
        self._tell(
            runner, state="serving", version=version.version, digest=version.digest, target="", code="", message=""
        )
        log.info("%s serves", version.label)
        if old_worker is not None:
            task = asyncio.get_running_loop().create_task(self._drain(runner, old_worker), name=f"drain {runner.name}")
            self._draining[task] = old_worker
            task.add_done_callback(self._draining.pop)

    async def _drain(self, runner: Runner, worker: Worker) -> None:
        try:
            async with asyncio.timeout(self._config.limits.drain_timeout_s):
                await runner.queue.drain(worker)
        except TimeoutError:
            log.warning("%s did not finish in time; its requests are asked again", worker.version.label)
        finally:
            await worker.stop()

    async def _supervise(self, runner: Runner) -> None:
        """Keep a worker running: restart it with backoff, and go back from what crashes in a loop or cannot start."""
        while not self._stopping and runner.current is not None:
            if runner.worker is None:
                await self._restart(runner, runner.current)
            else:
                await asyncio.shield(runner.worker.ended)
                await self._after_crash(runner)

    async def _after_crash(self, runner: Runner) -> None:
        runner.worker = None
        runner.queue.starting = True
        self._tell(runner, state="restarting")
        runner.crashes.append(self._clock())
        while runner.crashes[0] < self._clock() - CRASH_WINDOW_S:
            runner.crashes.popleft()
        if len(runner.crashes) >= CRASH_LIMIT:
            await self._roll_back(runner, f"its worker ended {CRASH_LIMIT} times in {CRASH_WINDOW_S:.0f} s")
        else:
            await asyncio.sleep(_backoff_s(len(runner.crashes)))

    async def _restart(self, runner: Runner, version: Version) -> None:
        """Start the current version's worker; what cannot start is tried again, or left for the version before."""
        runner.queue.starting = runner.failed_starts < START_LIMIT
        worker = self._new_worker(version)
        try:
            await self._start(worker)
        except asyncio.CancelledError:
            await worker.kill()
            raise
        except (ModelError, WorkerEndedError, OSError) as error:
            await worker.kill()
            await self._after_failed_start(runner, version, str(error))
            return
        runner.failed_starts = 0
        runner.worker = worker
        runner.report.unprotected = worker.unprotected
        runner.queue.starting = False
        runner.queue.replace_worker(worker, parallel=_generating(version))
        if runner.report.code == "start_failed":
            self._tell(runner, code="", message="")
        self._tell(runner, state="serving", version=version.version, digest=version.digest)

    async def _after_failed_start(self, runner: Runner, version: Version, why: str) -> None:
        """Wait before the next try; a version that has served before is given up only for one that can."""
        log.warning("%s could not be started: %s", version.label, why)
        runner.failed_starts += 1
        self._tell(runner, state="restarting", code="start_failed", message=why)
        if runner.failed_starts >= START_LIMIT and await self._before(runner) is not None:
            await self._roll_back(runner, why)
            return
        if runner.failed_starts >= START_LIMIT:
            runner.queue.starting = False
            runner.queue.replace_worker(None)
        await asyncio.sleep(_backoff_s(runner.failed_starts))

    async def _before(self, runner: Runner) -> Version | None:
        """Return the version before the current one, if it is still whole on the disk."""
        try:
            known = (await self._state.current()).get(runner.name)
        except StoreError as error:
            log.warning("the state could not be read: %s", error)
            return None
        if known is None or not known.previous_digest:
            return None
        return self._installed(runner.name, known.previous_version, known.previous_digest)

    async def _roll_back(self, runner: Runner, why: str) -> None:
        """Go back to the version before; the failing digest is not tried again."""
        bad = runner.current
        if bad is None:
            return
        log.error("%s is rolled back: %s", bad.label, why)
        before = await self._before(runner)
        await self._noted(self._state.mark_failed(bad.digest, "rolled_back", why))
        runner.current, runner.worker = before, None
        runner.crashes.clear()
        runner.failed_starts = 0
        runner.queue.starting = before is not None
        runner.queue.replace_worker(None)
        if before is None:
            runner.queue.fail_waiting(f"{bad.label} is not served any more")
            await self._noted(self._state.drop_current(runner.name))
            self._tell(
                runner, state="failed", version="", digest="", target=bad.version, code="rolled_back", message=why
            )
            return
        await self._noted(self._state.set_current(runner.name, Current(before.version, before.digest)))
        self._tell(runner, state="starting", target=bad.version, code="rolled_back", message=why)

    async def _noted(self, writing: Awaitable[None]) -> None:
        """Write to the state; serving goes on where the disk does not take it, and the next start finds the old."""
        try:
            await writing
        except StoreError as error:
            log.warning("the state could not be written: %s", error)

    async def _remove(self, name: str) -> None:
        """Stop serving a model that no deployment names any more."""
        runner = self._runners.pop(name)
        self._service.queues.pop(name, None)
        runner.queue.fail_waiting(f"{name} is not served any more")
        await self._noted(self._state.drop_current(name))
        if runner.worker is not None:
            await self._drain(runner, runner.worker)
        await self._halt(runner)
        self._health.models.pop(name, None)
        self._on_change()

    async def _halt(self, runner: Runner) -> None:
        await _ended(runner.task)
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


async def _ended(task: asyncio.Task[None] | None) -> None:
    """Cancel a supervisor and wait until it has let go."""
    if task is not None:
        task.cancel()
        await asyncio.wait((task,))


def _backoff_s(times: int) -> float:
    """Return how long to wait after something went wrong so many times."""
    return min(MAX_BACKOFF_S, 0.1 * 4.0 ** min(times - 1, 10))


def _pointer(version: Version, previous: Version | None) -> Current:
    if previous is None:
        return Current(version.version, version.digest)
    return Current(version.version, version.digest, previous.version, previous.digest)


def _generating(version: Version) -> bool:
    return parse_manifest(version.manifest).task in GENERATING
