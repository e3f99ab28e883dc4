"""A model that does what no model should: a session for a real worker whose every request is an attack."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from models.channel import Broken, Counted, Piece, Ready, frame
from models.request import Request
from tests.fakes.worker_process import ROOT

# Imported before the worker confines itself, as a runtime that is already inside would be; one thread, as it must be.
START = (
    f"import os, sys; os.environ['OPENBLAS_NUM_THREADS'] = '1'; sys.path.insert(0, {str(ROOT)!r});"
    "import models.session, tests.fakes.hostile as hostile; models.session.open_session = hostile.HostileSession;"
    "from models.worker import main; main()"
)

GARBAGE = (
    b"\xff" * 64,  # a frame of 4 GiB
    b"\x00\x00\x00\x03\xc1\xc1\xc1",  # no msgpack
    frame(Broken("I was ready before")),
    frame(Piece(ticket=4711, body=b"an answer to nobody")),
    frame(Counted(ticket=4711, tokens_in=-1)),
    frame(Ready(load_ms=-1.0, capacity=1 << 40)),
)
"""What no sound worker says."""

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: Any) -> str:
    if getattr(_libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return "done"


def _use(path: str) -> str:
    descriptor = os.open(path, os.O_RDWR)
    os.write(descriptor, b"x")
    os.close(descriptor)
    return "done"


def _allocate(size: int) -> str:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.close()
    return "done"


_leaked: list[bytes] = []


def _leak(size: int) -> str:
    _leaked.append(os.urandom(1 << 10) * (size >> 10))
    return "done"


def _threads(number: int) -> str:
    for _ in range(number):
        threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()
    return "done"


def _spin(seconds: float) -> str:
    """Take so much of a processor, however long that takes."""
    ends_at = time.process_time() + seconds
    while time.process_time() < ends_at:
        pass
    return "done"


def _fork_bomb(times: int) -> str:
    denied = 0
    for _ in range(times):
        try:
            if os.fork() == 0:
                os._exit(0)
        except OSError:
            denied += 1
    return f"{denied} denied"


def _say(raw: bytes) -> str:
    """Write to the agent past the worker's own channel; the socket is the worker's only argument."""
    os.write(int(sys.argv[-1]), raw)
    return "done"


ATTACKS: dict[str, Callable[[str], object]] = {
    "read": lambda path: Path(path).read_bytes()[:8].hex(),
    "write": lambda path: Path(path).write_bytes(b"x"),
    "use": _use,
    "remove": os.unlink,
    "mode": lambda path: Path(path).chmod(0o777),
    "folder": os.mkdir,
    "list": os.listdir,
    "connect": lambda port: socket.create_connection(("127.0.0.1", int(port)), timeout=5),
    "local": lambda path: socket.socket(socket.AF_UNIX).connect(path),
    "fork": lambda _: os.fork() or os._exit(0),
    "spawn": lambda path: os.posix_spawn(path, [path], {}),
    "exec": lambda path: os.execv(path, [path]),
    "trace": lambda pid: _call("ptrace", 16, int(pid), None, None),
    "peek": lambda pid: Path(f"/proc/{pid}/environ").read_bytes(),
    "kill": lambda pid: os.kill(int(pid), signal.SIGTERM),
    "limit": lambda _: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)),
    "unshare": lambda _: _call("unshare", 0x10000000),
    "type": lambda _: _call("ioctl", 0, 0x5412, b"x"),
    "memory": lambda size: _allocate(int(size)),
    "files": lambda path: [os.open(path, os.O_RDONLY) for _ in range(10_000)],
    "eat": lambda size: bytearray(int(size)),
    "nothing": lambda _: "done",
    "leak": lambda size: _leak(int(size)),
    "threads": lambda number: _threads(int(number)),
    "bomb": lambda times: _fork_bomb(int(times)),
    "hang": lambda seconds: time.sleep(float(seconds)),
    "spin": lambda seconds: _spin(float(seconds)),
    "crash": lambda _: ctypes.string_at(0),
    "garbage": lambda number: _say(GARBAGE[int(number)]),
}


class HostileSession:
    """Runs the attack that a request's text names, and answers with its outcome or the error's name."""

    capacity = 1
    context_tokens = longest_token_bytes = extra_tokens = default_max_tokens = 0
    fallbacks: tuple[str, ...] = ()

    def __init__(self, *_: object, **__: object) -> None:
        self._jobs: list[tuple[int, Request]] = []

    @property
    def room(self) -> int:
        return 1 - len(self._jobs)

    @property
    def busy(self) -> bool:
        return bool(self._jobs)

    def count(self, request: Request) -> tuple[int, int]:
        return len(request.body), 0

    def submit(self, ticket: int, request: Request) -> None:
        self._jobs.append((ticket, request))

    def cancel(self, ticket: int) -> bool:
        del ticket
        return False

    def step(self) -> list[Piece]:
        ticket, request = self._jobs.pop()
        attack, _, target = request.body.decode().partition(" ")
        try:
            outcome = str(ATTACKS[attack](target))
        except OSError as error:
            outcome = errno.errorcode.get(error.errno or 0, str(error))
        except MemoryError:
            outcome = "MemoryError"
        return [Piece(ticket=ticket, body=msgspec.json.encode({"outputs": outcome}))]

    def close(self) -> None:
        pass
