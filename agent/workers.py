"""The parent's side of worker processes: start one, ask it, see it end."""

# Long because a process's life is one thing: how it is started, asked, looked at and ended hangs together.

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import msgspec

from agent.admission import parse_kb
from models import channel
from models.backend_settings import BackendSettings
from models.errors import ModelError, RequestError
from models.request import Request
from models.shelf import Shelf

log = logging.getLogger(__name__)

OnPiece = Callable[[channel.Piece], None]
LOAD_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 2.0
COUNT_TIMEOUT_S = 30.0
"""How long a worker may count nothing while counts wait for it; it counts even while a batch runs."""
READ_BYTES = 128 << 10
LAID_FROM_BYTES = 64 << 10
"""From here on a body crosses by shared memory: below, its copies through the socket cost less than its pages."""
SWEEP_AFTER_S = 2.0
MAX_TOLD = 16
MAX_TOLD_LETTERS = 120
_AS_SHIPPED = BackendSettings()


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """A whole, verified version on this box's disk: what a worker opens."""

    name: str
    version: str
    digest: str
    folder: Path
    variant: str
    manifest: bytes

    @property
    def label(self) -> str:
        """`name@version`, as replies and logs say it."""
        return f"{self.name}@{self.version}"


class Holding(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker's process holds now, in MiB: memory of its own, all that is resident, the most that ever was."""

    own_mb: float = 0.0
    resident_mb: float = 0.0
    peak_mb: float = 0.0
    threads: int = 0


class WorkerEndedError(Exception):
    """The worker's process ended with this ticket unanswered."""


class _Channel(asyncio.BufferedProtocol):
    """Cuts the worker's byte stream into messages; a frame that is not ours ends the worker."""

    def __init__(self, on_message: Callable[[channel.FromWorker], None], on_end: Callable[[str], None]) -> None:
        self._on_message = on_message
        self._on_end = on_end
        self._place = memoryview(bytearray(READ_BYTES))
        self._buffer = bytearray()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where bytes are read to: the same place each time, for memory of this size is dear to come by."""
        del sizehint
        return self._place

    def buffer_updated(self, nbytes: int) -> None:
        """Take what was read."""
        self.take(self._place[:nbytes])

    def take(self, data: bytes | memoryview) -> None:
        """Take bytes; deliver each whole message."""
        self._buffer += data
        start, header = 0, channel.HEADER.size
        while len(self._buffer) - start >= header:
            (length,) = channel.HEADER.unpack_from(self._buffer, start)
            if length > channel.MAX_FRAME_BYTES:
                self._on_end(f"a frame of {length} bytes")
                return
            if len(self._buffer) - start - header < length:
                break
            end = start + header + length
            try:
                with memoryview(self._buffer) as view, view[start + header : end] as payload:
                    message = channel.from_worker.decode(payload)
            except (msgspec.DecodeError, RecursionError) as error:
                self._on_end(f"not a message: {error}")
                return
            start = end
            self._on_message(message)
        del self._buffer[:start]

    def connection_lost(self, exc: Exception | None) -> None:
        """Take note that the worker closed its end: it is gone."""
        self._on_end(str(exc) if exc else "its socket closed")


class Worker:
    """One process that answers for one version; `ended` is done when it is gone."""

    def __init__(self, version: Version) -> None:
        loop = asyncio.get_running_loop()
        self.version = version
        self.ready: asyncio.Future[channel.Ready] = loop.create_future()
        self.ended: asyncio.Future[str] = loop.create_future()
        self.stopping = False
        self.pid = 0
        self.settled_mb = self.settled_resident_mb = 0.0
        """What it held once it was loaded and warm: its share, and all that was resident."""
        self._told: channel.Ready | None = None
        """What it said of itself, while it serves."""
        self._shelf: Shelf | None = None
        self._laid: dict[int, int] = {}
        self._asks: dict[int, OnPiece] = {}
        self._counts: dict[int, asyncio.Future[channel.Counted]] = {}
        self._tickets = 0
        self._transport: asyncio.Transport | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._memory: BinaryIO | None = None
        self._status: BinaryIO | None = None
        self._counting: asyncio.TimerHandle | None = None
        self._counted = 0

    @property
    def in_flight(self) -> int:
        """Asks that have no final piece yet."""
        return len(self._asks)

    @property
    def capacity(self) -> int:
        """How many asks it takes at once; 0 until it is ready."""
        return self._told.capacity if self._told is not None else 0

    @property
    def unprotected(self) -> list[str]:
        """What its kernel lacks to confine it, in a few words each; empty until it is ready."""
        return _told(self.ready.result().unprotected) if self.serving else []

    @property
    def fallbacks(self) -> list[str]:
        """Which of the owner's accelerators it runs without, and why, in a few words each."""
        return _told(self.ready.result().fallbacks) if self.serving else []

    def memory_mb(self) -> float:
        """Return the process's proportional set size in MiB, 0 where it is gone; reads a file, so not in the loop."""
        try:
            if self._memory is None:
                return 0.0
            self._memory.seek(0)
            lines = self._memory.read().decode().splitlines()
        except (OSError, ValueError):
            return 0.0
        return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:")), 0.0)

    def holding(self) -> Holding:
        """Return what the process holds; nothing where it is gone."""
        try:
            if self._status is None:
                return Holding()
            self._status.seek(0)
            text = self._status.read().decode("utf-8", "replace")
        except (OSError, ValueError):
            return Holding()
        figures = parse_kb(text, ("RssAnon", "VmRSS", "VmHWM"))
        threads = next((int(line.split()[1]) for line in text.splitlines() if line.startswith("Threads:")), 0)
        return Holding(
            own_mb=figures["RssAnon"], resident_mb=figures["VmRSS"], peak_mb=figures["VmHWM"], threads=threads
        )

    @property
    def serving(self) -> bool:
        """Whether it is ready and has not ended."""
        return self._told is not None

    async def start(self, *, threads: int, slots: int, backends: BackendSettings = _AS_SHIPPED) -> channel.Ready:
        """Start the process and wait until its session is open and warm; raises ModelError."""
        ours, theirs = socket.socketpair()
        self._shelf = _new_shelf()
        given = (theirs.fileno(), self._shelf.reader) if self._shelf is not None else (theirs.fileno(),)
        try:
            environment = {k: v for k, v in os.environ.items() if k in ("PATH", "LANG", "LD_LIBRARY_PATH", "TMPDIR")}
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-I",
                "-m",
                "models.worker",
                *map(str, given),
                pass_fds=given,
                stdin=asyncio.subprocess.DEVNULL,
                env=environment,
            )
        finally:
            theirs.close()
            if self._shelf is not None:
                self._shelf.close_reader()
        self.pid = self._process.pid
        self._memory = _figures_of(self.pid, "smaps_rollup")
        self._status = _figures_of(self.pid, "status")
        loop = asyncio.get_running_loop()
        ours.setblocking(False)  # noqa: FBT003 - as the socket has it
        transport, _ = await loop.create_connection(lambda: _Channel(self._receive, self._end), sock=ours)
        self._transport = transport
        version = self.version
        self._send(
            channel.Open(
                folder=str(version.folder),
                manifest=version.manifest,
                variant=version.variant,
                threads=threads,
                slots=slots,
                backends=backends,
            )
        )
        try:
            async with asyncio.timeout(LOAD_TIMEOUT_S):
                return await asyncio.shield(self.ready)
        except TimeoutError as error:
            await self.kill()
            raise ModelError(f"{version.label} was not loaded within {LOAD_TIMEOUT_S:.0f} s") from error

    def ask(self, request: Request, budget_ms: float, on_piece: OnPiece) -> int:
        """Give a request to the worker; `on_piece` is called until a final piece. Returns its ticket."""
        self._tickets += 1
        bare, laid = self._lay(self._tickets, request)
        self._send(channel.Ask(self._tickets, bare, budget_ms, laid))
        self._asks[self._tickets] = on_piece
        return self._tickets

    def cancel(self, ticket: int) -> None:
        """Tell the worker that nobody waits for this ticket any more."""
        if ticket in self._asks:
            self._send(channel.Cancel(ticket))

    async def count(self, request: Request) -> channel.Counted:
        """Return what the request costs in tokens; raises RequestError where it cannot be counted."""
        self._tickets += 1
        ticket = self._tickets
        loop = asyncio.get_running_loop()
        counted = self._counts[ticket] = loop.create_future()
        self._send(channel.Count(ticket, *self._lay(ticket, request)))
        if self._counting is None:
            self._counting = loop.call_later(COUNT_TIMEOUT_S, self._look_at_counts, self._counted)
        try:
            answer: channel.Counted = await counted
        finally:
            self._counts.pop(ticket, None)
        if answer.code:
            raise RequestError(answer.code, answer.message)
        return answer

    async def stop(self) -> None:
        """End the process: its socket first, then SIGTERM's harder sister if it does not go."""
        self.stopping = True
        if self._transport is not None:
            self._transport.close()
        if self._process is None:
            return
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self._process.wait()
        except TimeoutError:
            await self.kill()
        self._end("stopped")

    async def kill(self) -> None:
        """End the process at once."""
        self._kill_process()
        if self._process is not None:
            await self._process.wait()
        self._end("killed")

    def give_up(self, why: str) -> None:
        """End a worker that does not do what a worker must; those who wait for it learn so."""
        self._end(why)

    def _look_at_counts(self, counted_before: int) -> None:
        """End a worker that has counted nothing for so long: its counting thread hangs, and all who ask with it."""
        self._counting = None
        if not self._counts or self.ended.done():
            return
        if self._counted == counted_before:
            self.give_up(f"it counted nothing for {COUNT_TIMEOUT_S:.0f} s")
            return
        loop = asyncio.get_running_loop()
        self._counting = loop.call_later(COUNT_TIMEOUT_S, self._look_at_counts, self._counted)

    def _kill_process(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGKILL)

    def _send(self, message: channel.ToWorker) -> None:
        if self._transport is None or self._transport.is_closing() or self.ended.done():
            raise WorkerEndedError(f"the worker of {self.version.label} is gone")
        self._transport.write(channel.frame(message))

    def _lay(self, ticket: int, request: Request) -> tuple[Request, channel.Laid | None]:
        """Lay a large body on the shelf; return the request without it, and where it lies."""
        if self._shelf is None or len(request.body) < LAID_FROM_BYTES:
            return request, None
        at = self._shelf.put(request.body)
        if at is None:
            return request, None
        self._laid[ticket] = at
        return msgspec.structs.replace(request, body=b""), channel.Laid(at, len(request.body))

    def _take_back(self, ticket: int) -> None:
        """Free what lay on the shelf for a ticket; once nothing has come for a while its memory is given back."""
        at = self._laid.pop(ticket, None)
        if at is None or self._shelf is None:
            return
        self._shelf.free(at)
        if self._shelf.empty:
            asyncio.get_running_loop().call_later(SWEEP_AFTER_S, self._sweep)

    def _sweep(self) -> None:
        if self._shelf is not None:
            self._shelf.sweep()

    def _close_shelf(self) -> None:
        if self._shelf is not None:
            self._shelf.close()
        self._shelf = None

    def _close_figures(self) -> None:
        for figures in (self._memory, self._status):
            if figures is not None:
                figures.close()
        if self._counting is not None:
            self._counting.cancel()

    def _receive(self, message: channel.FromWorker) -> None:
        match message:
            case channel.Piece():
                if message.final:
                    self._take_back(message.ticket)
                on_piece = self._asks.pop(message.ticket, None) if message.final else self._asks.get(message.ticket)
                if on_piece is not None:
                    on_piece(message)
            case channel.Counted():
                self._counted += 1
                self._take_back(message.ticket)
                counted = self._counts.get(message.ticket)
                if counted is not None and not counted.done():
                    counted.set_result(message)
            case channel.Ready():
                if not self.ready.done():
                    self.ready.set_result(message)
                    self._told = None if self.ended.done() else message
                    self._warn()
            case channel.Broken():
                if not self.ready.done():
                    self.ready.set_exception(ModelError(message.message))

    def _warn(self) -> None:
        if self.unprotected:
            log.warning("the worker of %s is not confined in full: %s", self.version.label, "; ".join(self.unprotected))
        for words in self.fallbacks:
            log.warning("%s runs without %s", self.version.label, words)

    def _end(self, why: str) -> None:
        """Let everything that waits for the worker learn, once, that it is gone."""
        if self.ended.done():
            return
        self.ended.set_result(why)
        self._told = None
        if self._transport is not None:
            self._transport.abort()
        self._close_figures()
        self._close_shelf()
        if not self.stopping:
            self._kill_process()  # it may live on, hung or hostile
            log.warning("worker of %s ended: %s", self.version.label, why)
        if not self.ready.done():
            self.ready.set_exception(ModelError(f"the worker of {self.version.label} ended while loading: {why}"))
        self.ready.exception()  # looked at, so that nobody is warned of an exception never retrieved
        for counted in self._counts.values():
            if not counted.done():
                counted.set_exception(WorkerEndedError(why))
        asks, self._asks = self._asks, {}
        for on_piece in asks.values():
            on_piece(channel.Piece(ticket=0, code=ENDED, message=why))


def _told(words: list[str]) -> list[str]:
    """Bound what a worker tells of itself."""
    return [word[:MAX_TOLD_LETTERS] for word in words[:MAX_TOLD]]


def _new_shelf() -> Shelf | None:
    """Return memory to share with a worker; without it large bodies go through the socket, as they would anyway."""
    try:
        return Shelf()
    except OSError as error:
        log.warning("large bodies cross to workers without shared memory: %s", error)
        return None


def _figures_of(pid: int, name: str) -> BinaryIO | None:
    """Open a process's own figures while it still lets us: a confined worker shows them to nobody new."""
    try:
        return Path(f"/proc/{pid}/{name}").open("rb", buffering=0)
    except OSError:
        return None


ENDED = "worker_ended"
"""Code of the piece that stands for an answer the worker can no longer give; never leaves the box."""
