"""One bounded queue for each model, by priority and deadline; its worker takes what it has room for.

A batch is what waits at the moment the worker is free: asks go to the worker up to its capacity, and it
takes together whatever has come when it begins. Nothing waits for company.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncGenerator, Callable

from agent.estimator import ServiceLaw
from agent.workers import ENDED, Worker, WorkerEndedError
from models.channel import Piece
from models.errors import RequestError
from models.request import Request

HUNG_AFTER_S = 5.0
"""How long a worker may go on with a request that is over, beside ten times what it was predicted to take."""


class Entry:
    """One request in a queue or in service; its pieces arrive in `pieces`."""

    __slots__ = ("alone", "deadline_at", "pieces", "predicted_ms", "request", "started_at", "ticket", "worker")

    def __init__(self, request: Request, deadline_at: float, predicted_ms: float, *, alone: bool) -> None:
        self.request = request
        self.alone = alone
        self.deadline_at = deadline_at
        self.predicted_ms = predicted_ms
        self.pieces: asyncio.Queue[Piece] = asyncio.Queue()
        self.started_at = 0.0
        self.worker: Worker | None = None
        self.ticket = 0


class ModelQueue:
    """The requests of one model on their way to its worker. `clock` gives seconds."""

    def __init__(self, name: str, clock: Callable[[], float], *, hang_grace_s: float = HUNG_AFTER_S) -> None:
        self.name = name
        self._hang_grace_s = hang_grace_s
        self.law = ServiceLaw()
        self._clock = clock
        self._heap: list[tuple[int, float, int, Entry]] = []
        self._order = itertools.count()
        self._worker: Worker | None = None
        self._serving: set[Entry] = set()
        self._queued_ms = 0.0
        self._drained: dict[Worker, asyncio.Event] = {}
        self.starting = False
        """Whether a worker is being started, so that waiting in the queue has a point."""
        self.parallel = False
        """Whether the worker answers its asks side by side (generation) rather than as one batch."""

    @property
    def worker(self) -> Worker | None:
        """The worker that takes new requests, if one is ready."""
        return self._worker if self._worker is not None and self._worker.serving else None

    @property
    def expecting(self) -> bool:
        """Whether a worker is on its way, or has just died and is not given up yet."""
        return self.starting or (self._worker is not None and not self._worker.serving)

    @property
    def queued(self) -> int:
        """Requests accepted but not given to a worker."""
        return len(self._heap)

    @property
    def in_service(self) -> int:
        """Requests that a worker has."""
        return len(self._serving)

    def wait_ms(self) -> float:
        """Predict how long a new request waits before it begins: the work ahead, shared among the slots."""
        worker = self.worker
        if worker is None or worker.in_flight < (worker.capacity if self.parallel else 1):
            return 0.0
        now = self._clock()
        begun = [entry for entry in self._serving if entry.worker is worker]
        serving = sum(max(0.0, entry.predicted_ms - (now - entry.started_at) * 1e3) for entry in begun)
        return (serving + self._queued_ms) / (worker.capacity if self.parallel else 1)

    def replace_worker(self, worker: Worker | None, *, parallel: bool = False) -> None:
        """Let a new worker take over at once; the old one finishes what it has."""
        self._worker = worker
        self.parallel = parallel
        self._pump()

    def fail_waiting(self, why: str) -> None:
        """Let go of everything that waits: no worker will come for it, and the cloud may still be in time."""
        heap, self._heap, self._queued_ms = self._heap, [], 0.0
        for *_, entry in heap:
            entry.pieces.put_nowait(Piece(ticket=0, code=ENDED, message=why))

    async def drain(self, worker: Worker) -> None:
        """Wait until a replaced worker has answered everything that it was given."""
        while any(entry.worker is worker for entry in self._serving):
            await self._drained.setdefault(worker, asyncio.Event()).wait()
        self._drained.pop(worker, None)

    async def answer(
        self, request: Request, deadline_at: float, predicted_ms: float, *, alone: bool = False
    ) -> AsyncGenerator[tuple[Piece, str], None]:
        """Yield the pieces of the answer and `name@version` of who gave them.

        Raises RequestError, or WorkerEndedError if the worker died with it.

        `alone` runs it with no other, as one must that was there when a worker died: if it kills the next one
        too, it harms nobody else.
        """
        entry = Entry(request, deadline_at, predicted_ms, alone=alone)
        heapq.heappush(self._heap, (-request.priority, deadline_at, next(self._order), entry))
        self._queued_ms += predicted_ms
        self._pump()
        finished = False
        try:
            while not finished:
                piece = await entry.pieces.get()
                finished = piece.final
                if piece.code == ENDED:
                    raise WorkerEndedError(piece.message)
                if piece.code:
                    raise RequestError(piece.code, piece.message)
                yield piece, entry.worker.version.label if entry.worker is not None else self.name
        finally:
            if not finished:
                self._abandon(entry)

    def _pump(self) -> None:
        """Give the worker what it has room for; what can no longer be in time is not begun."""
        while self._heap and (worker := self.worker) is not None and worker.in_flight < worker.capacity:
            if worker.in_flight and (self._heap[0][3].alone or any(entry.alone for entry in self._serving)):
                return
            entry = heapq.heappop(self._heap)[3]
            self._queued_ms = max(0.0, self._queued_ms - entry.predicted_ms) if self._heap else 0.0
            now = self._clock()
            if now >= entry.deadline_at:
                late = Piece(ticket=0, code="deadline_exceeded", message="the deadline passed while it waited")
                entry.pieces.put_nowait(late)
                continue
            self._begin(entry, worker, now)

    def _begin(self, entry: Entry, worker: Worker, now: float) -> None:
        entry.worker, entry.started_at = worker, now
        self._serving.add(entry)

        def on_piece(piece: Piece) -> None:
            if piece.final:
                self._done(entry, piece)
            entry.pieces.put_nowait(piece)

        try:
            entry.ticket = worker.ask(entry.request, (entry.deadline_at - now) * 1e3, on_piece)
        except WorkerEndedError as error:
            on_piece(Piece(ticket=0, code=ENDED, message=str(error)))

    def _done(self, entry: Entry, piece: Piece) -> None:
        self._serving.discard(entry)
        if not piece.code:
            self.law.observe(piece.tokens_in, piece.tokens_out, piece.compute_ms / max(1, piece.batch))
        worker = entry.worker
        if worker in self._drained and not any(other.worker is worker for other in self._serving):
            self._drained[worker].set()
        self._pump()

    def _abandon(self, entry: Entry) -> None:
        """Nobody waits for this entry any more: leave the queue, or tell the worker to stop."""
        waiting = [item for item in self._heap if item[3] is not entry]
        if len(waiting) < len(self._heap):
            heapq.heapify(waiting)
            self._heap = waiting
            self._queued_ms = max(0.0, self._queued_ms - entry.predicted_ms)
        if entry.worker is not None and entry in self._serving:
            try:
                entry.worker.cancel(entry.ticket)
            except WorkerEndedError:
                self._serving.discard(entry)
                return
            patience_s = self._hang_grace_s + entry.predicted_ms / 100
            asyncio.get_running_loop().call_later(patience_s, self._give_up_if_hung, entry, entry.worker)

    def _give_up_if_hung(self, entry: Entry, worker: Worker) -> None:
        """End a worker that long after nobody waited for it still holds a request: it serves nobody any more."""
        if entry in self._serving:
            worker.give_up("it did not come back from a request that was over")
