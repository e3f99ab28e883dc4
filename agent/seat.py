"""Where one model's worker sits: loaded into room that is held for it, taking over, draining, making way, unloaded."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

from agent.admission import Held
from agent.house import House
from agent.scheduler import ModelQueue
from agent.versions import Installed
from agent.workers import Worker
from cloud_sync.report import ModelReport

log = logging.getLogger(__name__)

GENERATING = frozenset({"text-generation"})


class Seat:
    """One model's worker and those that it has replaced; decides nothing."""

    def __init__(self, name: str, queue: ModelQueue, house: House) -> None:
        self.name = name
        self.queue = queue
        self.report = ModelReport(state="starting")
        self.worker: Worker | None = None
        self.resting = False
        """Whether the model was unloaded, or had no room, and waits to be asked."""
        self.wanted = asyncio.Event()
        """Set once somebody asks for a model that rests."""
        self.used_at = house.clock()
        self._house = house
        self._draining: dict[asyncio.Task[None], Worker] = {}
        queue.on_wanted = self.wanted.set
        house.rooms.tenants[name] = self

    def tell(self, **facts: str | float) -> None:
        """Change what is reported of the model, and let the world know."""
        for name, value in facts.items():
            setattr(self.report, name, value)
        self._house.health.models[self.name] = self.report.state
        self._house.on_change()

    @contextlib.asynccontextmanager
    async def loaded(
        self,
        version: Installed,
        need_mb: float,
        *,
        evict: bool = True,
        leave: Callable[[], Awaitable[None]] | None = None,
    ) -> AsyncIterator[Worker]:
        """Start a worker in room that is held for it; it is ended again if the block does not end well.

        Raises NoRoomError, ModelError, WorkerEndedError, OSError. `leave` as in `Rooms.room`.
        """
        async with self._house.rooms.room(self.name, need_mb, evict=evict, leave=leave):
            worker = self._house.new_worker(version.version)
            try:
                await self._house.start(worker)
                yield worker
            except BaseException:
                await worker.kill()
                raise

    def take(self, version: Installed, worker: Worker) -> None:
        """Let a started worker take over at once; the one before it finishes what it has."""
        before, self.worker = self.worker, worker
        self.resting = False
        self.used_at = self._house.clock()
        self.report.unprotected, self.report.fallbacks = worker.unprotected, worker.fallbacks
        self.queue.starting = False
        self.queue.why_not = ""
        self.queue.replace_worker(worker, parallel=version.task in GENERATING)
        self.tell(state="serving", version=version.version.version, digest=version.digest)
        if before is not None:
            task = asyncio.get_running_loop().create_task(self._drain(before), name=f"drain {self.name}")
            self._draining[task] = before
            task.add_done_callback(self._draining.pop)

    async def make_way(self) -> None:
        """End the worker after what it has; requests wait meanwhile, for another is about to come."""
        worker, self.worker = self.worker, None
        if worker is not None:
            self.queue.starting = True
            self.queue.replace_worker(None)
            self.tell(state="restarting")
            await self._drain(worker)

    def put_off(self, why: str) -> None:
        """Leave a model unloaded: there is no room. What waits is let go, for the cloud may be in time."""
        if self.report.code != "no_room":
            log.warning("%s is not loaded: %s", self.name, why)
        self.resting = True
        self.wanted.clear()
        self.queue.starting = False
        self.queue.why_not = why
        self.queue.replace_worker(None)
        self.queue.fail_waiting(why)
        self.tell(state="unloaded", code="no_room", message=why)

    def held(self) -> Held | None:
        """Return what the worker holds, and whether it may be unloaded now."""
        worker = self.worker
        if worker is None or not worker.serving:
            return None
        busy = bool(worker.in_flight or self.queue.queued)
        idle_s = 0.0 if busy else self._house.clock() - self.used_at
        return Held(self.name, max(worker.holding().resident_mb, worker.settled_mb), idle_s, movable=not busy)

    async def unload(self) -> None:
        """End the worker if it is idle still; the next request, or free memory, brings it back."""
        worker = self.worker
        if worker is None or worker.in_flight or self.queue.queued:
            return
        self.worker, self.resting = None, True
        self.wanted.clear()
        self.queue.starting = True
        self.queue.replace_worker(None)
        self.tell(state="unloaded")
        await worker.stop()

    async def leave(self) -> None:
        """Give the seat up: let what waits go, and finish what the worker has."""
        self._house.rooms.tenants.pop(self.name, None)
        self.queue.fail_waiting(f"{self.name} is not served any more")
        if self.worker is not None:
            await self._drain(self.worker)

    async def stop(self) -> None:
        """End the worker, and those that drain, at once."""
        draining = dict(self._draining)
        for task in draining:
            task.cancel()
        workers = [*draining.values(), *([self.worker] if self.worker is not None else [])]
        await asyncio.gather(*(worker.stop() for worker in workers), return_exceptions=True)

    async def _drain(self, worker: Worker) -> None:
        try:
            async with asyncio.timeout(self._house.config.limits.drain_timeout_s):
                await self.queue.drain(worker)
        except TimeoutError:
            log.warning("%s did not finish in time; its requests are asked again", worker.version.label)
        finally:
            await worker.stop()
