"""A model that does what no model should: a session for a real worker whose every request is an attack."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from models.channel import Piece
from models.request import Request
from tests.fakes.worker_process import ROOT

# Imported before the worker confines itself, as a runtime that is already inside would be; one thread, as it must be.
START = (
    f"import os, sys; os.environ['OPENBLAS_NUM_THREADS'] = '1'; sys.path.insert(0, {str(ROOT)!r});"
    "import models.session, tests.fakes.hostile as hostile; models.session.open_session = hostile.HostileSession;"
    "from models.worker import main; main()"
)

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: Any) -> str:
    if getattr(_libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return "done"


def _allocate(size: int) -> str:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.close()
    return "done"


ATTACKS: dict[str, Callable[[str], object]] = {
    "read": lambda path: Path(path).read_bytes()[:8].hex(),
    "write": lambda path: Path(path).write_bytes(b"x"),
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
    "eat": lambda size: bytearray(int(size)),
    "nothing": lambda _: "done",
}


class HostileSession:
    """Runs the attack that a request's text names, and answers with its outcome or the error's name."""

    capacity = 1
    context_tokens = longest_token_bytes = extra_tokens = default_max_tokens = 0

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
