"""One model's worker through its life: start, restart, a fresh one for one that leaks, a new version, back to the old.

A version begins as a trial worker that must reproduce its golden samples inside its budget on this box; then requests
move over at once and the old worker drains. While it is new it is watched beside the version before it.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
from collections.abc import Awaitable, Callable

from agent.admission import MAX_THREADS, leak_bound_mb, needed_mb
from agent.house import House, backoff_s, ended, pointer
from agent.records import Record, fresh_record
from agent.rooms import NoRoomError
from agent.scheduler import ModelQueue
from agent.seat import Seat
from agent.trial import Trial, run_trial, timed
from agent.versions import Installed
from agent.watch import Regression, Seen, Watch, seen_of
from agent.workers import Worker, WorkerEndedError
from cloud_sync.errors import StoreError
from cloud_sync.state import Current, Failure
from models.channel import Piece
from models.errors import ModelError, RequestError
from models.evaluate import quantile
from models.request import Request

log = logging.getLogger(__name__)

CRASH_LIMIT = 5
CRASH_WINDOW_S = 120.0
START_LIMIT = 3
ROOM_RETRY_S = 30.0
"""How long a model waits for memory before it looks again, unless it is asked earlier."""
SLOW_BOX = 2.0
"""How much slower than at its trial the version before must be for the box to be at fault, and not the new version."""


Order = Callable[[], Awaitable[None]]


class Supervisor:
    """Keeps the current version of one model serving."""

    def __init__(self, name: str, queue: ModelQueue, house: House) -> None:
        self.name = name
        self.seat = Seat(name, queue, house)
        self.current: Installed | None = None
        self.record = Record()
        self._house = house
        self._crashes: collections.deque[float] = collections.deque()
        self._failed_starts = 0
        self._task: asyncio.Task[None] | None = None
        self._order: asyncio.Future[Order] | None = None
        self._looked_at = house.clock()
        queue.on_answer = self._answered

    # What others ask of it.

    async def resume(self, current: Current, *, crashing: bool) -> None:
        """Serve at once what served before; a version that was new when the agent began to crash gives way."""
        installed = await self._house.versions.installed(self.name, current.version, current.digest)
        if installed is None:
            self.seat.tell(state="failed", code="missing", message=f"{current.digest} is not on the disk")
            return
        self.current = installed
        self.record = await self._house.records.load(self.name, current.digest)
        self.seat.tell(state="starting", version=current.version, digest=current.digest)
        if crashing and not self.record.proven and current.previous_digest:
            await self._roll_back("agent: it ended several times in a row since this version was activated")
        self._supervise_again()

    async def stop(self) -> None:
        """End the worker, and those that drain."""
        await ended(self._task)
        await self._house.records.save(self.name, self.record)
        await self.seat.stop()

    async def leave(self) -> None:
        """Stop serving: finish what the worker has, then end."""
        await ended(self._task)
        await self._noted(self._house.state.drop_current(self.name))
        self.record = Record()
        await self.seat.leave()
        await self.stop()

    def look(self) -> None:
        """Look at the worker's memory and threads, and count the time that it has been watched."""
        now = self._house.clock()
        passed_s, self._looked_at = now - self._looked_at, now
        self.record.age(passed_s, self._house.config.watch.window_s)
        worker, current = self.seat.worker, self.current
        if worker is None or current is None or not worker.serving:
            return
        holding = worker.holding()
        if holding.threads > MAX_THREADS:
            worker.give_up(f"it has {holding.threads} threads")
            return
        figures = self.record.figures
        peak_mb = worker.settled_mb + max(0.0, holding.peak_mb - worker.settled_resident_mb)
        figures.trial_mb = figures.trial_mb or worker.settled_mb  # of a version from before records were kept
        figures.peak_mb = max(figures.peak_mb, round(peak_mb, 1))
        bound_mb = leak_bound_mb(measured_mb=figures.trial_mb, budget_mb=current.budget.memory_mb)
        if 0 < bound_mb < holding.own_mb:
            why = f"memory: it holds {holding.own_mb:.0f} MiB of its own, over {bound_mb:.0f} MiB"
            self._give_order(lambda: self._recycle(why))

    async def try_version(self, version: Installed, decision: str) -> None:
        """Run a trial of a version and activate it; raises NoRoomError, what a trial raises, and StoreError.

        StoreError says that the box could not note it; the version is not to blame.
        """
        try:
            async with self._loaded(version) as worker:
                trial = await run_trial(worker, version)
                for piece in trial.pieces:
                    self.seat.queue.law.observe(piece.tokens_in, piece.tokens_out, piece.compute_ms)
                await ended(self._task)  # nothing else may decide what is current while this does
                record = self._fresh_record(version, decision, trial)
                await self._house.records.activate(self.name, pointer(version, self.current), record)
        except BaseException:
            if self._task is None or self._task.done():
                self._supervise_again()
            raise
        self._activate(version, worker, record, trial)

    def settled_on_target(self) -> None:
        """Note that what runs is what should: nothing keeps it from its target any more."""
        if self.seat.report.code == "no_room" and self.seat.report.state == "unloaded":
            self.seat.tell(target="")
        else:
            self.seat.tell(target="", code="", message="")

    # The life of a worker.

    def _activate(self, version: Installed, worker: Worker, record: Record, trial: Trial) -> None:
        """Move requests over to a version that is durably noted, and let the old worker finish."""
        self.record = record
        self._crashes.clear()
        self._failed_starts = 0
        self._take(version, worker)
        self._supervise_again()
        self.seat.tell(
            target="", code="", message="", p95_ms=round(trial.p95_ms, 3), memory_mb=round(trial.memory_mb, 1)
        )
        log.info("%s serves", version.label)

    def _supervise_again(self) -> None:
        if self.current is not None:
            self._task = asyncio.get_running_loop().create_task(self._supervise(), name=f"model {self.name}")
            self._task.add_done_callback(self._supervised)

    def _supervised(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (fault := task.exception()) is not None:
            self._house.on_fault(fault)

    async def _supervise(self) -> None:
        """Keep a worker running: restart it with backoff, and go back from what crashes in a loop or cannot start."""
        while (current := self.current) is not None:
            worker = self.seat.worker
            if worker is not None:
                await self._attend(worker)
            elif self.seat.resting:
                await self._rest(current)
            else:
                await self._restart(current, evict=True)

    async def _attend(self, worker: Worker) -> None:
        """Wait until a worker ends or something is to be done about it."""
        order = self._order = self._order or asyncio.get_running_loop().create_future()
        await asyncio.wait({worker.ended, order}, return_when=asyncio.FIRST_COMPLETED)
        if self.seat.worker is not worker:
            return  # it was unloaded
        if worker.ended.done():
            await self._after_crash(worker.ended.result())
        else:
            self._order = None
            await order.result()()

    async def _rest(self, current: Installed) -> None:
        """Wait until the unloaded model is asked; or load it again once there is room that nobody need leave."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ROOM_RETRY_S):
                await self.seat.wanted.wait()
        await self._restart(current, evict=self.seat.wanted.is_set())

    async def _after_crash(self, why: str) -> None:
        self.seat.worker = None
        self.seat.queue.starting = True
        self.seat.tell(state="restarting")
        self._judge(Seen(size=0, failed=True))
        self._count_end()
        if len(self._crashes) >= CRASH_LIMIT:
            times = f"its worker ended {CRASH_LIMIT} times in {CRASH_WINDOW_S:.0f} s"
            await self._roll_back(f"crashes: {times}, the last time because {why}")
        else:
            await asyncio.sleep(backoff_s(len(self._crashes)))

    def _count_end(self) -> None:
        self._crashes.append(self._house.clock())
        while self._crashes[0] < self._house.clock() - CRASH_WINDOW_S:
            self._crashes.popleft()

    async def _restart(self, version: Installed, *, evict: bool) -> None:
        """Start the current version's worker; what cannot start is tried again, or left for the version before."""
        self.seat.queue.starting = self._failed_starts < START_LIMIT
        try:
            async with self._loaded(version, evict=evict) as worker:
                pass
        except NoRoomError as error:
            if evict:
                self.seat.put_off(str(error))
            return
        except (ModelError, WorkerEndedError, OSError) as error:
            await self._after_failed_start(version, str(error))
            return
        self._failed_starts = 0
        if self.seat.report.code in {"start_failed", "no_room"}:
            self.seat.tell(code="", message="")
        self._take(version, worker)

    async def _after_failed_start(self, version: Installed, why: str) -> None:
        """Wait before the next try; a version that has served before is given up only for one that can."""
        log.warning("%s could not be started: %s", version.label, why)
        self._failed_starts += 1
        self.seat.tell(state="restarting", code="start_failed", message=why)
        if self._failed_starts >= START_LIMIT and await self._before() is not None:
            await self._roll_back(f"start: {why}")
            return
        if self._failed_starts >= START_LIMIT:
            self.seat.queue.starting = False
            self.seat.queue.replace_worker(None)
        await asyncio.sleep(backoff_s(self._failed_starts))

    async def _recycle(self, why: str) -> None:
        """Put a fresh worker of the same version in a leaking one's place; one that leaks fast counts as crashing."""
        if self.current is None:
            return
        log.warning("%s gets a fresh worker: %s", self.current.label, why)
        self._count_end()
        before = await self._before() if len(self._crashes) >= CRASH_LIMIT else None
        if before is not None and await self._leave_for(before, why, confirm=False):
            return
        try:
            async with self._loaded(self.current) as worker:
                pass
        except (NoRoomError, ModelError, WorkerEndedError, OSError) as error:
            log.warning("%s could not be started anew beside itself: %s", self.current.label, error)
        else:
            self._take(self.current, worker)

    # Back to the version before.

    async def _go_back(self, regression: Regression, watch: Watch) -> None:
        """Leave a version that does worse than the one before it, unless it is the box that has become slow."""
        before = await self._before()
        if self.current is None:
            return
        if before is None:
            why = f"it does worse than the version before, which is not here any more: {regression.message}"
            log.error("%s: %s", self.current.label, why)
            self.seat.tell(message=why)
        elif not await self._leave_for(before, regression.message, confirm=regression.kind == "latency"):
            watch.begin_anew()
            self.record.watch = watch

    async def _leave_for(self, before: Installed, why: str, *, confirm: bool) -> bool:
        """Start the version before, move requests back to it, and let the failing one finish; False: it stays."""
        bad = self.current
        if bad is None:
            return False
        try:
            async with self._loaded(before) as worker:
                if confirm and await self._is_box_slow(worker, before):
                    log.warning("%s stays: the version before is slower now too, so it is the box: %s", bad.label, why)
                    await worker.stop()
                    return False
                log.error("%s is rolled back: %s", bad.label, why)
                await self._note_back(bad, before, why)
        except (NoRoomError, ModelError, WorkerEndedError, OSError) as error:
            log.warning("%s should give way to %s, which cannot be started: %s", bad.label, before.label, error)
            return False
        self._crashes.clear()
        self._take(before, worker)
        self.seat.tell(target=bad.version.version, code="rolled_back", message=why)
        return True

    async def _is_box_slow(self, worker: Worker, before: Installed) -> bool:
        """Whether a version takes so much longer now than at its own trial that another one's times mean nothing."""
        then_ms = self.record.before.trial_ms
        if not then_ms:
            return False
        try:
            pieces = await timed(worker, before.golden)
        except (ModelError, WorkerEndedError, RequestError):
            return False
        return quantile([piece.compute_ms for piece in pieces], 0.95) > SLOW_BOX * then_ms

    async def _roll_back(self, why: str) -> None:
        """Go back to the version before from one that has no worker any more; it is not tried again."""
        bad = self.current
        if bad is None:
            return
        log.error("%s is rolled back: %s", bad.label, why)
        before = await self._before()
        self.current, self.seat.worker, self._order = before, None, None
        self._crashes.clear()
        self._failed_starts = 0
        self.seat.queue.starting = before is not None
        self.seat.queue.replace_worker(None)
        if before is None:
            self.seat.queue.fail_waiting(f"{bad.label} is not served any more")
            await self._house.records.fail(bad.digest, self._failure(bad, why))
            await self._noted(self._house.state.drop_current(self.name))
            self.seat.tell(state="failed", version="", digest="")
            self.seat.tell(target=bad.version.version, code="rolled_back", message=why)
            return
        await self._note_back(bad, before, why)
        self.seat.tell(state="starting", target=bad.version.version, code="rolled_back", message=why)

    async def _note_back(self, bad: Installed, before: Installed, why: str) -> None:
        failed = bad.digest, self._failure(bad, why)
        self.record = self.record.gone_back(before.digest)
        await self._house.records.go_back(self.name, pointer(before, None), self.record, failed)

    def _failure(self, bad: Installed, why: str) -> Failure:
        return Failure("rolled_back", why, self.record.decision, bad.label)

    async def _before(self) -> Installed | None:
        """Return the version before the current one, if it is still whole on the disk."""
        try:
            known = (await self._house.state.current()).get(self.name)
        except StoreError as error:
            log.warning("the state could not be read: %s", error)
            return None
        if known is None or not known.previous_digest:
            return None
        return await self._house.versions.installed(self.name, known.previous_version, known.previous_digest)

    async def _noted(self, writing: Awaitable[None]) -> None:
        """Write to the state; serving goes on where the disk does not take it, and the next start finds the old."""
        try:
            await writing
        except StoreError as error:
            log.warning("the state could not be written: %s", error)

    # Workers that come and go.

    def _loaded(self, version: Installed, *, evict: bool = True) -> contextlib.AbstractAsyncContextManager[Worker]:
        """Load a version, beside the worker that serves or, where both do not fit, after it has ended."""
        peak_mb = self.record.peak_mb(version.digest)
        need_mb = needed_mb(measured_mb=peak_mb, budget_mb=version.budget.memory_mb, files_mb=version.files_mb)
        return self.seat.loaded(version, need_mb, evict=evict, leave=self._make_way)

    async def _make_way(self) -> None:
        await ended(self._task)
        await self.seat.make_way()

    def _take(self, version: Installed, worker: Worker) -> None:
        self.current = version
        self._order = None  # it was about the worker before
        self.seat.take(version, worker)

    # What it hears.

    def _give_order(self, order: Order) -> None:
        """Have the supervising task do something about the worker; one thing at a time."""
        if self._order is not None and not self._order.done():
            self._order.set_result(order)

    def _answered(self, worker: Worker, request: Request, piece: Piece) -> None:
        """Take an answer into the figures of the version that serves, and judge the version by it."""
        self.seat.used_at = self._house.clock()
        if worker is self.seat.worker and (seen := seen_of(len(request.body), piece)) is not None:
            self._judge(seen)

    def _judge(self, seen: Seen) -> None:
        watch = self.record.watch
        budget_ms = self.current.budget.p95_ms if self.current is not None else 0.0
        regression = self.record.take(seen, self._house.config.watch, budget_ms)
        if regression is not None and watch is not None:
            self._give_order(lambda: self._go_back(regression, watch))

    def _fresh_record(self, version: Installed, decision: str, trial: Trial) -> Record:
        return fresh_record(
            self.record if self.current is not None else None,
            version.digest,
            decision,
            p95_ms=trial.p95_ms,
            memory_mb=trial.memory_mb,
            watched=self._house.config.watch.window_s > 0,
        )
