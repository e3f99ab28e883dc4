"""The parent's side of worker processes: start one, ask it, see it end."""

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

from models import channel
from models.errors import ModelError, RequestError
from models.request import Request

log = logging.getLogger(__name__)

OnPiece = Callable[[channel.Piece], None]
LOAD_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 2.0
MAX_TOLD = 16
MAX_TOLD_LETTERS = 120


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


class WorkerEndedError(Exception):
    """The worker's process ended with this ticket unanswered."""


class _Channel(asyncio.Protocol):
    """Cuts the worker's byte stream into messages; a frame that is not ours ends the worker."""

    def __init__(self, on_message: Callable[[channel.FromWorker], None], on_end: Callable[[str], None]) -> None:
        self._on_message = on_message
        self._on_end = on_end
        self._buffer = bytearray()

    def data_received(self, data: bytes) -> None:
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
            payload = bytes(memoryview(self._buffer)[start + header : start + header + length])
            start += header + length
            try:
                message = channel.from_worker.decode(payload)
            except (msgspec.DecodeError, RecursionError) as error:
                self._on_end(f"not a message: {error}")
                return
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
        self._asks: dict[int, OnPiece] = {}
        self._counts: dict[int, asyncio.Future[channel.Counted]] = {}
        self._tickets = 0
        self._transport: asyncio.Transport | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._memory: BinaryIO | None = None

    @property
    def in_flight(self) -> int:
        """Asks that have no final piece yet."""
        return len(self._asks)

    @property
    def capacity(self) -> int:
        """How many asks it takes at once; 0 until it is ready."""
        return self.ready.result().capacity if self.serving else 0

    @property
    def unprotected(self) -> list[str]:
        """What its kernel lacks to confine it, in a few words each; empty until it is ready."""
        told = self.ready.result().unprotected if self.serving else []
        return [words[:MAX_TOLD_LETTERS] for words in told[:MAX_TOLD]]

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

    @property
    def serving(self) -> bool:
        """Whether it is ready and has not ended."""
        return self.ready.done() and not self.ready.cancelled() and not self.ready.exception() and not self.ended.done()

    async def start(self, *, threads: int, slots: int) -> channel.Ready:
        """Start the process and wait until its session is open and warm; raises ModelError."""
        ours, theirs = socket.socketpair()
        try:
            environment = {k: v for k, v in os.environ.items() if k in ("PATH", "LANG", "LD_LIBRARY_PATH", "TMPDIR")}
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-I",
                "-m",
                "models.worker",
                str(theirs.fileno()),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                env=environment,
            )
        finally:
            theirs.close()
        self.pid = self._process.pid
        self._memory = _memory_of(self.pid)
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
        self._send(channel.Ask(self._tickets, request, budget_ms))
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
        counted = self._counts[ticket] = asyncio.get_running_loop().create_future()
        self._send(channel.Count(ticket, request))
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

    def _kill_process(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGKILL)

    def _send(self, message: channel.ToWorker) -> None:
        if self._transport is None or self._transport.is_closing() or self.ended.done():
            raise WorkerEndedError(f"the worker of {self.version.label} is gone")
        self._transport.write(channel.frame(message))

    def _receive(self, message: channel.FromWorker) -> None:
        match message:
            case channel.Piece():
                on_piece = self._asks.pop(message.ticket, None) if message.final else self._asks.get(message.ticket)
                if on_piece is not None:
                    on_piece(message)
            case channel.Counted():
                counted = self._counts.get(message.ticket)
                if counted is not None and not counted.done():
                    counted.set_result(message)
            case channel.Ready():
                if not self.ready.done():
                    self.ready.set_result(message)
                    self._warn()
            case channel.Broken():
                if not self.ready.done():
                    self.ready.set_exception(ModelError(message.message))

    def _warn(self) -> None:
        if self.unprotected:
            log.warning("the worker of %s is not confined in full: %s", self.version.label, "; ".join(self.unprotected))

    def _end(self, why: str) -> None:
        """Let everything that waits for the worker learn, once, that it is gone."""
        if self.ended.done():
            return
        self.ended.set_result(why)
        if self._transport is not None:
            self._transport.abort()
        if self._memory is not None:
            self._memory.close()
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


def _memory_of(pid: int) -> BinaryIO | None:
    """Open a process's memory figures while it still lets us: a confined worker shows them to nobody new."""
    try:
        return Path(f"/proc/{pid}/smaps_rollup").open("rb", buffering=0)
    except OSError:
        return None


ENDED = "worker_ended"
"""Code of the piece that stands for an answer the worker can no longer give; never leaves the box."""
