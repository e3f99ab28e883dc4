"""One bounded queue for each model, by priority and deadline; its worker takes what it has room for.

A batch is what waits at the moment the worker is free: asks go to the worker up to its capacity, which is a batch
beside the one that runs, and it takes together whatever has come when it begins. Nothing waits for company.
"""

from __future__ import annotations

import asyncio
import collections
import heapq
import itertools
from collections.abc import AsyncGenerator, Callable

from agent.estimator import ServiceLaw
from agent.workers import ENDED, Worker, WorkerEndedError
from models.channel import Piece
from models.errors import RequestError
from models.request import Request

MAX_PIECES = 10_000
"""Pieces of one answer that may wait for its asker; a worker that floods is ended."""
HUNG_AFTER_S = 5.0
"""How long a worker may go on with a request that is over, beside ten times what it was predicted to take."""


class Pieces:
    """Pieces on their way to the one that waits for them."""

    __slots__ = ("_pieces", "_waiter")

    def __init__(self) -> None:
        self._pieces: collections.deque[Piece] = collections.deque()
        self._waiter: asyncio.Future[None] | None = None

    def put_nowait(self, piece: Piece) -> None:
        """Add a piece."""
        self._pieces.append(piece)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def qsize(self) -> int:
        """Return how many wait."""
        return len(self._pieces)

    async def get(self) -> Piece:
        """Return the next piece, once it is there."""
        while not self._pieces:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._pieces.popleft()


class Work:
    """What one worker has of a queue: predicted ms in all, and since when (`clock` seconds) it is at the first."""

    __slots__ = ("alone", "ms", "number", "since")

    def __init__(self) -> None:
        self.number = 0
        self.alone = 0
        self.ms = 0.0
        self.since = 0.0


class Entry:
    """One request in a queue or in service; its pieces arrive in `pieces`."""

    __slots__ = ("alone", "deadline_at", "pieces", "predicted_ms", "request", "started_at", "ticket", "worker")

    def __init__(self, request: Request, deadline_at: float, predicted_ms: float, *, alone: bool) -> None:
        self.request = request
        self.alone = alone
        self.deadline_at = deadline_at
        self.predicted_ms = predicted_ms
        self.pieces = Pieces()
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
        self._work: collections.defaultdict[Worker, Work] = collections.defaultdict(Work)
        self._queued_ms = 0.0
        self._drained: dict[Worker, asyncio.Event] = {}
        self.starting = False
        """Whether a worker is being started, so that waiting in the queue has a point."""
        self.parallel = False
        """Whether the worker answers its asks side by side (generation) rather than as one batch."""
        self.why_not = ""
        """Why there is no worker and none on its way, for those who ask; empty where nothing more is known."""
        self.on_wanted: Callable[[], None] | None = None
        """Told when a request finds no worker."""
        self.on_answer: Callable[[Worker, Request, Piece], None] | None = None
        """Told of every final piece."""

    @property
    def worker(self) -> Worker | None:
        """The worker that takes new requests, if one is ready."""
        return self._worker if self._worker is not None and self._worker.serving else None

    @property
    def expecting(self) -> bool:
        """Whether a worker is on its way, or has just died and is not given up yet."""
        return self.starting or (self._worker is not None and not self._worker.serving)

    def want(self) -> None:
        """Tell whoever loads models that somebody asks for this one."""
        if self.on_wanted is not None:
            self.on_wanted()

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
        if not self.parallel:  # one after the other, whatever the batch
            work = self._work[worker]
            return max(0.0, work.ms - (now - work.since) * 1e3) + self._queued_ms
        begun = [entry for entry in self._serving if entry.worker is worker]
        serving = sum(max(0.0, entry.predicted_ms - (now - entry.started_at) * 1e3) for entry in begun)
        return (serving + self._queued_ms) / worker.capacity

    def replace_worker(self, worker: Worker | None, *, parallel: bool = False) -> None:
        """Let a new worker take over at once; the old one finishes what it has."""
        if self._worker is not None and not self._work[self._worker].number:
            del self._work[self._worker]
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
        while self._work[worker].number:
            await self._drained.setdefault(worker, asyncio.Event()).wait()
        self._drained.pop(worker, None)
        self._work.pop(worker, None)

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
            if worker.in_flight and (self._heap[0][3].alone or self._work[worker].alone):
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
        work = self._work[worker]
        if not work.number:
            work.since = now
        work.number += 1
        work.alone += entry.alone
        work.ms += entry.predicted_ms

        def on_piece(piece: Piece) -> None:
            if piece.final:
                self._done(entry, piece)
            elif entry.pieces.qsize() >= MAX_PIECES:
                worker.give_up(f"over {MAX_PIECES} pieces of one answer wait for its asker")
                return
            entry.pieces.put_nowait(piece)

        try:
            entry.ticket = worker.ask(entry.request, (entry.deadline_at - now) * 1e3, on_piece)
        except WorkerEndedError as error:
            on_piece(Piece(ticket=0, code=ENDED, message=str(error)))

    def _done(self, entry: Entry, piece: Piece) -> None:
        self._leave(entry)
        if not piece.code:
            self.law.observe(piece.tokens_in, piece.tokens_out, piece.compute_ms / max(1, piece.batch))
        worker = entry.worker
        if worker is not None and self.on_answer is not None:
            self.on_answer(worker, entry.request, piece)
        if worker in self._drained and not self._work[worker].number:
            self._drained[worker].set()
        self._pump()

    def _leave(self, entry: Entry) -> None:
        """Take an entry out of service."""
        if entry.worker is None or entry not in self._serving:
            return
        self._serving.discard(entry)
        work = self._work[entry.worker]
        work.number -= 1
        work.alone -= entry.alone
        work.ms = max(0.0, work.ms - entry.predicted_ms) if work.number else 0.0
        work.since = self._clock()
        if not work.number and entry.worker is not self._worker:
            del self._work[entry.worker]

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
                self._leave(entry)
                return
            patience_s = self._hang_grace_s + entry.predicted_ms / 100
            asyncio.get_running_loop().call_later(patience_s, self._give_up_if_hung, entry, entry.worker)

    def _give_up_if_hung(self, entry: Entry, worker: Worker) -> None:
        """End a worker that long after nobody waited for it still holds a request: it serves nobody any more."""
        if entry in self._serving:
            worker.give_up("it did not come back from a request that was over")
