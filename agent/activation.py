"""Which version of each model serves here: from staged to tried to serving, and away again. One supervisor a model."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil

from agent.config import Config
from agent.health import Health
from agent.house import Edges, House
from agent.records import PROVEN_S, Records
from agent.rooms import NoRoomError, Rooms
from agent.scheduler import ModelQueue
from agent.service import Service
from agent.supervisor import Supervisor
from agent.versions import Versions
from agent.workers import Worker, WorkerEndedError
from cloud_sync.errors import StoreError
from cloud_sync.report import ModelReport
from cloud_sync.state import Failure, State
from cloud_sync.sync_settings import SyncOutcome, TargetModel
from models.errors import ModelError, RequestError
from models.manifest import BoxFacts, ManifestError

log = logging.getLogger(__name__)

LOOK_S = 2.0
"""How often every worker's memory is looked at."""
SAVE_S = 900.0
"""How often what versions have shown is kept, where it has changed: so much is lost with a power cut."""
RETRY_S = 60.0
"""How often a version is tried again that had no room."""
START_LIMIT = 3
"""Starts in a row that ended badly, after which versions that were new by then give way."""


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
        edges: Edges = Edges(),  # noqa: B008 - a value that nobody can change
    ) -> None:
        self.box = box
        self._config = config
        self._state = state
        self._service = service
        self._health = health
        self._clock = clock
        self._house = House(
            config=config,
            state=state,
            records=Records(state),
            versions=Versions(Path(config.state.directory) / "versions", box),
            rooms=Rooms(edges.memory),
            health=health,
            clock=clock,
            on_change=on_change,
            new_worker=edges.new_worker,
            start=self._start,
            on_fault=self._on_fault,
        )
        self._supervisors: dict[str, Supervisor] = {}
        self._put_off: dict[str, TargetModel] = {}
        self._busy = asyncio.Lock()
        self._fault: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()

    def reports(self) -> dict[str, ModelReport]:
        """Return the state of every model that this box knows."""
        return {name: one.seat.report for name, one in sorted(self._supervisors.items())}

    @property
    def failures(self) -> dict[str, Failure]:
        """The digests that are not tried again here, and why; the newest last."""
        return self._house.records.failures

    async def resume(self) -> None:
        """Serve at once what served before; no network is needed."""
        await self._house.records.open()
        crashing = await self._starts() >= START_LIMIT
        for name, current in sorted((await self._state.current()).items()):
            await self._supervisor(name).resume(current, crashing=crashing)

    async def run(self) -> None:
        """Look after memory, records and what had no room; a root task. Raises what ended a supervisor."""
        began_at = saved_at = retried_at = self._clock()
        settled = False
        while not self._fault.done():
            await asyncio.wait((self._fault,), timeout=LOOK_S)
            now = self._clock()
            for one in list(self._supervisors.values()):
                one.look()
            if not settled and now - began_at >= PROVEN_S:
                settled, saved_at = True, began_at - SAVE_S
                await self.settle()
            if now - saved_at >= SAVE_S:
                saved_at = now
                for name, one in list(self._supervisors.items()):
                    await self._house.records.save(name, one.record)
            if self._put_off and now - retried_at >= RETRY_S:
                retried_at = now
                await self._try_again()
        raise self._fault.result()

    async def settle(self) -> None:
        """Note that the agent ran well, or ends because it was told to."""
        try:
            await self._state.clear_starts()
        except StoreError as error:
            log.warning("the state could not be written: %s", error)

    async def apply(self, outcome: SyncOutcome) -> None:
        """Move every model towards its target; one that fails keeps the others from nothing."""
        async with self._busy:
            self._put_off.clear()
            for target in outcome.models:
                await self._move(target)
            wanted = {target.name for target in outcome.models}
            for name in [name for name in self._supervisors if name not in wanted]:
                await self._remove(name)

    async def unload(self, name: str) -> None:
        """End a model's worker if it is idle; a request brings it back."""
        await self._supervisors[name].seat.unload()

    async def stop(self) -> None:
        """End every worker."""
        await asyncio.gather(*(one.stop() for one in self._supervisors.values()), return_exceptions=True)

    async def _starts(self) -> int:
        """Count this start; return how many there were since the agent last ran or ended well."""
        try:
            return await self._state.count_start()
        except StoreError as error:
            log.warning("the state could not be written: %s", error)
            return 0

    def _supervisor(self, name: str) -> Supervisor:
        known = self._supervisors.get(name)
        if known is None:
            queue = ModelQueue(name, self._clock, hang_grace_s=self._config.limits.hang_grace_s)
            self._service.queues[name] = queue
            known = self._supervisors[name] = Supervisor(name, queue, self._house)
        return known

    async def _move(self, target: TargetModel) -> None:
        """Move one model towards its target, or tell what keeps it."""
        one = self._supervisor(target.name)
        failure = await self._failure(target)
        if target.error is not None:
            one.seat.tell(target=target.version, code=target.error.code, message=target.error.message)
        elif one.current is not None and one.current.digest == target.digest:
            one.record.decision = one.record.decision or target.decision
            one.settled_on_target()
        elif failure is not None:
            one.seat.tell(target=target.version, code=failure.code, message=failure.message)
        elif target.staged:
            await self._try(one, target)

    async def _failure(self, target: TargetModel) -> Failure | None:
        """Return why a version is not tried: it failed here, and admins have not decided for it once more since."""
        records = self._house.records
        failure = records.failures.get(target.digest)
        if failure is None or not target.decision or failure.decision == target.decision:
            return failure
        if not failure.decision:  # it failed before anybody knew under which decision
            await records.fail(target.digest, msgspec.structs.replace(failure, decision=target.decision))
            return failure
        log.info("%s@%s failed here and is asked for anew", target.name, target.version)
        await records.forgive(target.digest)
        return None

    async def _try(self, one: Supervisor, target: TargetModel) -> None:
        """Run a trial of the target and activate it, or report why not."""
        version = await self._house.versions.installed(target.name, target.version, target.digest)
        if version is None:
            one.seat.tell(target=target.version, code="missing", message="staged, but not on the disk")
            return
        one.seat.tell(target=target.version, code="", message="in trial")
        try:
            await one.try_version(version, target.decision)
        except NoRoomError as error:
            self._put_off[target.name] = target
            one.seat.tell(target=target.version, code="no_room", message=str(error))
            log.warning("%s is put off: %s", version.label, error)
        except (ModelError, WorkerEndedError, ManifestError, RequestError) as error:
            failure = Failure("trial_failed", str(error), target.decision, version.label)
            await self._house.records.fail(target.digest, failure)
            one.seat.tell(target=target.version, code="trial_failed", message=str(error))
            log.warning("%s failed its trial: %s", version.label, error)
        except (StoreError, OSError) as error:  # not the version's fault: the next pass tries again
            one.seat.tell(target=target.version, code="trial_impossible", message=str(error))
            log.warning("%s could not be tried: %s", version.label, error)

    async def _remove(self, name: str) -> None:
        """Stop serving a model that no deployment names any more."""
        one = self._supervisors.pop(name)
        self._service.queues.pop(name, None)
        await one.leave()
        self._health.models.pop(name, None)
        self._house.on_change()

    async def _try_again(self) -> None:
        """Try what had no room once more."""
        async with self._busy:
            put_off, self._put_off = self._put_off, {}
            for target in put_off.values():
                if target.name in self._supervisors:
                    await self._move(target)

    def _on_fault(self, fault: BaseException) -> None:
        """Let a mistake of ours in one supervisor end the daemon, as in any root task, so that it is started anew."""
        if not self._fault.done():
            self._fault.set_result(fault)

    async def _start(self, worker: Worker) -> None:
        """Start a worker as the configuration says, and measure what it holds when it is loaded and warm."""
        limits = self._config.limits
        threads = limits.worker_threads or max(1, (psutil.cpu_count(logical=False) or 2))
        await worker.start(threads=threads, slots=limits.worker_slots, backends=self._config.backends)
        worker.settled_mb = await asyncio.to_thread(worker.memory_mb)
        worker.settled_resident_mb = worker.holding().resident_mb
