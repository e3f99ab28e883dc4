"""The process around a session: `python -I -m models.worker FD [SHELF]` answers what comes through the socket FD.

The main thread steps the session. Where tokens are counted a second one reads the socket and counts at once, also while
a step runs; otherwise the main thread reads, too. The process ends when the other side closes the socket, or dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
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
from models.shelf import Reader

if TYPE_CHECKING:
    from models.session import Session

READ_BYTES: Final = 128 << 10
_PR_SET_PDEATHSIG: Final = 1
OOM_SCORE: Final = 500


class Channel:
    """The worker's end of the socket; receiving belongs to one thread, `send` to any."""

    def __init__(self, connection: socket.socket, shelf: Reader | None = None) -> None:
        self._connection = connection
        self._shelf = shelf
        self._place = memoryview(bytearray(READ_BYTES))  # one for all reads: memory of this size is dear to come by
        self._buffer = bytearray()
        self._received: deque[ToWorker] = deque()
        self._sending = threading.Lock()

    def receive(self) -> ToWorker | None:
        """Return the next message; None once the other side has closed."""
        while not self._received:
            if not self._fill(wait=True):
                return None
        return self._received.popleft()

    def receive_all(self, *, wait: bool) -> list[ToWorker] | None:
        """Return all messages that have come, at least one where `wait`; None once the other side has closed."""
        while not self._received:
            try:
                if not self._fill(wait=wait):
                    return None
            except BlockingIOError:
                break
        messages = list(self._received)
        self._received.clear()
        return messages

    def _fill(self, *, wait: bool) -> bool:
        """Take bytes from the socket; False once the other side has closed, BlockingIOError where there are none."""
        read = self._connection.recv_into(self._place, 0, 0 if wait else socket.MSG_DONTWAIT)
        self._buffer += self._place[:read]
        start = 0
        while len(self._buffer) - start >= HEADER.size:
            (length,) = HEADER.unpack_from(self._buffer, start)
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {length} bytes is over the limit")
            end = start + HEADER.size + length
            if len(self._buffer) < end:
                break
            with memoryview(self._buffer) as view, view[start + HEADER.size : end] as payload:
                self._received.append(self._whole(to_worker.decode(payload)))
            start = end
        del self._buffer[:start]
        return read > 0

    def _whole(self, message: ToWorker) -> ToWorker:
        """Return a message with the body that was laid on the shelf for it."""
        if not isinstance(message, Ask | Count) or message.laid is None:
            return message
        if self._shelf is None:
            raise ValueError("a body lies on a shelf that is not there")
        body = self._shelf.read(message.laid.at, message.laid.length)
        return msgspec.structs.replace(message, request=msgspec.structs.replace(message.request, body=body), laid=None)

    def close(self) -> None:
        """Close the socket."""
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

    @property
    def holds(self) -> bool:
        """Whether an ask waits."""
        return bool(self._asks)

    def ask(self, *asks: Ask) -> None:
        """Queue asks together, so that they can be one batch; their budgets run from now."""
        if not asks:
            return
        now = time.monotonic()
        with self._changed:
            for ask in asks:
                self._asks[ask.ticket] = _Waiting(ask, now + ask.budget_ms / 1000)
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
            tickets = self._first(max(0, room))
            cancels = list(self._cancels)
            self._cancels.clear()
            return [self._asks.pop(ticket) for ticket in tickets], cancels

    def _first(self, room: int) -> list[int]:
        """Return up to `room` tickets: those that matter most, then those due first, then those that came first."""
        if len(self._asks) <= room:
            return list(self._asks)
        return sorted(self._asks, key=self._urgency)[:room]

    def _urgency(self, ticket: int) -> tuple[int, float]:
        waiting = self._asks[ticket]
        return -waiting.ask.request.priority, waiting.deadline


class Worker:
    """Drives one session from its inbox."""

    def __init__(self, channel: Channel, session: Session) -> None:
        self._channel = channel
        self._session = session
        self._inbox = Inbox()

    def run(self) -> NoReturn:
        """Answer until the process ends."""
        if self._session.context_tokens:
            threading.Thread(target=self._read, name="reader", daemon=True).start()
            while True:
                self.turn(wait=not self._session.busy)
        # Nothing is counted while a step runs: one thread alone is faster, for it wakes nobody.
        while True:
            self._hear(wait=not self._session.busy and not self._inbox.holds)
            self.turn(wait=False)

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
        """Read the socket for as long as the process lives."""
        while True:
            self._hear(wait=True)

    def _hear(self, *, wait: bool) -> None:
        """Take what the socket has; the end of the agent's interest is the end of this process."""
        status = 1
        try:
            messages = self._channel.receive_all(wait=wait)
            if messages is not None:
                self.handle(*messages)
            status = 0
        finally:
            if status or messages is None:
                os._exit(status)

    def handle(self, *messages: ToWorker) -> None:
        """Take messages; a count is answered here and now, after the asks so that these need not wait for it."""
        self._inbox.ask(*(message for message in messages if isinstance(message, Ask)))
        for message in messages:
            if isinstance(message, Count):
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
        capacity=_capacity(session),
        context_tokens=session.context_tokens,
        longest_token_bytes=session.longest_token_bytes,
        extra_tokens=session.extra_tokens,
        default_max_tokens=session.default_max_tokens,
        unprotected=unprotected,
        fallbacks=list(session.fallbacks),
    )
    channel.send(ready)
    return session


def _capacity(session: Session) -> int:
    """Return how many asks the worker takes: where it runs batches the next one too, so that it never waits for it."""
    from models.session import BatchSession  # noqa: PLC0415 - loaded by now, and never before the process is confined

    return session.capacity * (2 if isinstance(session, BatchSession) else 1)


def _open(message: Open) -> tuple[Session, list[str]]:
    """Confine the process, then open what the message names; return what it could not be kept from, too."""
    manifest = parse_manifest(message.manifest)
    chosen = [variant for variant in manifest.variants if variant.name == message.variant]
    if not chosen:
        raise ModelError(f"the manifest has no variant {message.variant!r}")
    folder = Path(message.folder)
    backends = message.backends
    unprotected = confine(folder, memory_mb=manifest.budget.memory_mb, devices=backends.devices, reads=backends.reads)
    # Imported only now: numpy starts threads, and only those that start confined are.
    from models.record import warm  # noqa: PLC0415 - as above
    from models.session import open_session  # noqa: PLC0415 - as above

    session = open_session(folder, manifest, chosen[0], threads=message.threads, slots=message.slots, backends=backends)
    warm(session, manifest)
    return session, unprotected


def _settle() -> None:
    """Die with the parent, leave no core file with askers' inputs in it, and leave Ctrl-C to the parent."""
    # A runtime of Microsoft's keeps a file and a thread for telemetry otherwise; nothing leaves a box by itself.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):  # where the box runs out of memory all the same, a worker goes before the agent
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE), "ascii")
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to a whole group; the agent drains first, then closes
        signal.signal(number, signal.SIG_IGN)


def main() -> None:
    """Run the worker on the socket whose descriptor is the first argument; a second is the shelf's."""
    _settle()
    shelf = Reader(int(sys.argv[2])) if len(sys.argv) > 2 else None
    channel = Channel(socket.socket(fileno=int(sys.argv[1])), shelf)
    session = _load(channel)
    if session is None:
        sys.exit(1)
    gc.collect()
    gc.freeze()  # what is loaded stays: looking through it again and again would only hold answers up
    Worker(channel, session).run()


if __name__ == "__main__":
    main()
