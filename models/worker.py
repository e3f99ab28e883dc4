"""The process around a session: `python -I -m models.worker FD` answers what comes through the socket FD.

One thread reads the socket and counts tokens at once; the main thread steps the session. The process ends when the
other side closes the socket, or dies.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

import msgspec

from models.channel import (
    HEADER,
    MAX_FRAME_BYTES,
    Ask,
    Broken,
    Cancel,
    Count,
    Counted,
    FromWorker,
    Open,
    Piece,
    Ready,
    ToWorker,
    frame,
    to_worker,
)
from models.errors import ModelError, failure_of
from models.manifest import parse_manifest
from models.sandbox import confine

if TYPE_CHECKING:
    from models.session import Session

_PR_SET_PDEATHSIG: Final = 1


class Channel:
    """The worker's end of the socket; `receive` belongs to one thread, `send` to any."""

    def __init__(self, connection: socket.socket) -> None:
        self._reader = connection.makefile("rb", buffering=1 << 16)
        self._connection = connection
        self._sending = threading.Lock()

    def receive(self) -> ToWorker | None:
        """Return the next message; None once the other side has closed."""
        header = self._reader.read(HEADER.size)
        if len(header) < HEADER.size:
            return None
        (length,) = HEADER.unpack(header)
        if length > MAX_FRAME_BYTES:
            raise ValueError(f"a frame of {length} bytes is over the limit")
        payload = self._reader.read(length)
        return to_worker.decode(payload) if len(payload) == length else None

    def close(self) -> None:
        """Close the socket."""
        self._reader.close()
        self._connection.close()

    def send(self, *messages: FromWorker) -> None:
        """Write messages, whole and in order."""
        data = b"".join(_frame(message) for message in messages)
        with self._sending:
            self._connection.sendall(data)


def _frame(message: FromWorker) -> bytes:
    """Frame a message; an answer that no frame holds becomes an error."""
    try:
        return frame(message)
    except ValueError:
        if not isinstance(message, Piece):
            raise
        return frame(Piece(ticket=message.ticket, code="model_failed", message="the answer is too large to send"))


class _Waiting(msgspec.Struct):
    """An ask that no step has taken; `deadline` is on the monotonic clock, in seconds."""

    ask: Ask
    deadline: float


class Inbox:
    """What the reading thread hands to the stepping one."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._asks: dict[int, _Waiting] = {}
        self._cancels: deque[int] = deque()

    def ask(self, ask: Ask) -> None:
        """Queue an ask; its budget runs from now."""
        with self._changed:
            self._asks[ask.ticket] = _Waiting(ask, time.monotonic() + ask.budget_ms / 1000)
            self._changed.notify()

    def cancel(self, ticket: int) -> bool:
        """Take a waiting ask out, or pass the wish on to the session (False)."""
        with self._changed:
            if self._asks.pop(ticket, None) is not None:
                return True
            self._cancels.append(ticket)
            self._changed.notify()
            return False

    def take(self, room: int, *, wait: bool) -> tuple[list[_Waiting], list[int]]:
        """Return up to `room` asks and every cancelled ticket; `wait` until there is one of them."""
        with self._changed:
            while wait and not self._asks and not self._cancels:
                self._changed.wait()
            tickets = list(self._asks)[: max(0, room)]
            cancels = list(self._cancels)
            self._cancels.clear()
            return [self._asks.pop(ticket) for ticket in tickets], cancels


class Worker:
    """Drives one session from its inbox."""

    def __init__(self, channel: Channel, session: Session) -> None:
        self._channel = channel
        self._session = session
        self._inbox = Inbox()

    def run(self) -> NoReturn:
        """Answer until the process ends."""
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        while True:
            self.turn(wait=not self._session.busy)

    def turn(self, *, wait: bool) -> None:
        """Take what has come and make one step."""
        asks, cancels = self._inbox.take(self._session.room, wait=wait)
        failures = [piece for waiting in asks if (piece := self._submit(waiting)) is not None]
        failures += [_cancelled(ticket) for ticket in cancels if self._session.cancel(ticket)]
        pieces = self._session.step() if self._session.busy else []
        if failures or pieces:
            self._channel.send(*failures, *pieces)

    def _submit(self, waiting: _Waiting) -> Piece | None:
        """Hand an ask to the session; return its error if it has one already."""
        ticket = waiting.ask.ticket
        if time.monotonic() >= waiting.deadline:
            return Piece(ticket=ticket, code="deadline_exceeded", message="the deadline passed before it could begin")
        try:
            self._session.submit(ticket, waiting.ask.request)
        except Exception as error:  # noqa: BLE001 - one request, whatever it trips over, must cost only itself
            failure = failure_of(error)
            return Piece(ticket=ticket, code=failure.code, message=failure.message)
        return None

    def _read(self) -> None:
        """Read the socket until it closes; the end of the agent's interest is the end of this process."""
        status = 1
        try:
            while (message := self._channel.receive()) is not None:
                self.handle(message)
            status = 0
        finally:
            os._exit(status)

    def handle(self, message: ToWorker) -> None:
        """Take one message; a count is answered here and now."""
        if isinstance(message, Ask):
            self._inbox.ask(message)
        elif isinstance(message, Count):
            self._channel.send(self._count(message))
        elif isinstance(message, Cancel) and self._inbox.cancel(message.ticket):
            self._channel.send(_cancelled(message.ticket))

    def _count(self, message: Count) -> Counted:
        try:
            tokens_in, max_tokens = self._session.count(message.request)
        except Exception as error:  # noqa: BLE001 - as in _submit
            failure = failure_of(error)
            return Counted(ticket=message.ticket, code=failure.code, message=failure.message)
        return Counted(ticket=message.ticket, tokens_in=tokens_in, max_tokens=max_tokens)


def _cancelled(ticket: int) -> Piece:
    return Piece(ticket=ticket, code="cancelled", message="cancelled by the asker")


def _load(channel: Channel) -> Session | None:
    """Open what the first message names, and say how it went."""
    message = channel.receive()
    if not isinstance(message, Open):
        return None
    started = time.perf_counter()
    try:
        session, unprotected = _open(message)
    except ModelError as error:
        channel.send(Broken(str(error)))
        return None
    except Exception as error:  # noqa: BLE001 - whatever a hostile artifact makes its runtime raise, the agent must hear
        channel.send(Broken(f"{type(error).__name__}: {str(error)[:200]}"))
        return None
    ready = Ready(
        load_ms=(time.perf_counter() - started) * 1000,
        capacity=session.capacity,
        context_tokens=session.context_tokens,
        longest_token_bytes=session.longest_token_bytes,
        extra_tokens=session.extra_tokens,
        default_max_tokens=session.default_max_tokens,
        unprotected=unprotected,
    )
    channel.send(ready)
    return session


def _open(message: Open) -> tuple[Session, list[str]]:
    """Confine the process, then open what the message names; return what it could not be kept from, too."""
    manifest = parse_manifest(message.manifest)
    chosen = [variant for variant in manifest.variants if variant.name == message.variant]
    if not chosen:
        raise ModelError(f"the manifest has no variant {message.variant!r}")
    folder = Path(message.folder)
    unprotected = confine(folder, memory_mb=manifest.budget.memory_mb)
    # Imported only now: numpy starts threads, and only those that start confined are.
    from models.record import warm  # noqa: PLC0415 - as above
    from models.session import open_session  # noqa: PLC0415 - as above

    session = open_session(folder, manifest, chosen[0], threads=message.threads, slots=message.slots)
    warm(session, manifest)
    return session, unprotected


def _settle() -> None:
    """Die with the parent, leave no core file with askers' inputs in it, and leave Ctrl-C to the parent."""
    # A runtime of Microsoft's keeps a file and a thread for telemetry otherwise; nothing leaves a box by itself.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to a whole group; the agent drains first, then closes
        signal.signal(number, signal.SIG_IGN)


def main() -> None:
    """Run the worker on the socket whose descriptor is the only argument."""
    _settle()
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    session = _load(channel)
    if session is None:
        sys.exit(1)
    Worker(channel, session).run()


if __name__ == "__main__":
    main()
