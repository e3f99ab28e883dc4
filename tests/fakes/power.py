"""Kills and power cuts at every step of a program that changes the disk, without a disk to break.

A step is a call that opens a file for writing, renames, removes, makes, truncates or syncs. A kill keeps what was
written. A power cut keeps every name, as a journal that was flushed does, and of the bytes only what was synced:
the cruel case of a real one. What a cut may do besides is to keep fewer names, which is an earlier step's state.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link"}


class Watch:
    """Follows a process of its own (the hook never goes away) and ends it at the n-th step under `root`."""

    def __init__(self, root: Path, at: int, report: int) -> None:
        self.root = str(root.resolve())
        self.at = at
        self.report = report
        self.steps = 0
        self.armed = True
        self.opened: list[str] = []
        self.unsynced_files: set[int] = set()
        self.unsynced_folders: dict[int, str] = {}

    def arm(self) -> None:
        """Watch from now on."""
        sys.addaudithook(self._audit)
        for name in ("fsync", "fdatasync"):
            setattr(os, name, self._wrapped(getattr(os, name), self._synced))
        os.posix_fallocate = self._wrapped(os.posix_fallocate, None)

    def tell(self) -> None:
        """Write what a power cut would lose now."""
        self._note_opened()
        facts = {"steps": self.steps, "files": [*self.unsynced_files], "folders": [*self.unsynced_folders.values()]}
        os.write(self.report, json.dumps(facts).encode())

    def _step(self) -> None:
        self._note_opened()
        self.steps += 1
        if self.steps == self.at:
            self.tell()
            os.kill(os.getpid(), signal.SIGKILL)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed or not (event == "open" or event in CHANGES):
            return
        path = os.fspath(arguments[0]) if not isinstance(arguments[0], int) else ""
        if event == "open":
            writes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if writes and self._ours(path):
                self._quietly(lambda: self._open(str(path)))
        elif self._ours(path) or event == "os.truncate":
            self._quietly(lambda: self._change(event, arguments))

    def _open(self, path: str) -> None:
        self._step()
        self.opened.append(path)
        if not os.path.lexists(path):
            self._name_changed(path)

    def _change(self, event: str, arguments: tuple[Any, ...]) -> None:
        self._step()
        named = arguments[:2] if event in {"os.rename", "os.link"} else arguments[:1]
        for path in named:
            if not isinstance(path, int):
                self._name_changed(os.fspath(path))

    def _ours(self, path: str | bytes) -> bool:
        return os.path.realpath(os.fsdecode(path)).startswith(self.root + "/")

    def _name_changed(self, path: str) -> None:
        folder = Path(path).absolute().parent
        self.unsynced_folders[folder.stat().st_ino] = str(folder)

    def _note_opened(self) -> None:
        for path in self.opened:
            if Path(path).exists():
                self.unsynced_files.add(Path(path).stat().st_ino)
        self.opened.clear()

    def _synced(self, handle: int) -> None:
        self._note_opened()
        found = os.fstat(handle)
        if stat.S_ISDIR(found.st_mode):
            self.unsynced_folders.pop(found.st_ino, None)
        else:
            self.unsynced_files.discard(found.st_ino)

    def _quietly(self, work: Callable[[], None]) -> None:
        self.armed = False
        try:
            work()
        finally:
            self.armed = True

    def _wrapped(self, call: Callable[..., Any], then: Callable[[int], None] | None) -> Callable[..., Any]:
        def wrapped(handle: int, *arguments: Any) -> Any:
            self._quietly(self._step)
            done = call(handle, *arguments)
            if then is not None:
                self._quietly(lambda: then(handle))
            return done

        return wrapped


class Ended:
    """How a watched process ended: whether it was killed, its steps, and what was not synced."""

    def __init__(self, code: int, facts: dict[str, Any]) -> None:
        self.killed = code == -signal.SIGKILL
        self.code = code
        self.steps: int = facts.get("steps", 0)
        self.files: set[int] = set(facts.get("files", ()))
        self.folders: set[str] = set(facts.get("folders", ()))


def run_watched(work: Callable[[], object], root: Path, at: int = 0) -> Ended:
    """Run work in a child that is killed at its n-th step under `root`; 0: it runs to its end."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            watch = Watch(root, at, writing)
            watch.arm()
            work()
            watch.armed = False
            watch.tell()
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        facts = json.loads(pipe.read() or b"{}")
    return Ended(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), facts)


def lose_unsynced(root: Path, ended: Ended, damage: Callable[[bytes], bytes]) -> int:
    """Do to a folder what the cut did: files that were not synced lose their bytes. Return how many."""
    lost = 0
    for path in root.rglob("*"):
        if path.is_file() and path.stat().st_ino in ended.files:
            path.write_bytes(damage(path.read_bytes()))
            lost += 1
    return lost


def emptied(data: bytes) -> bytes:
    """The name with no bytes."""
    return b""


def zeroed(data: bytes) -> bytes:
    """The length with no bytes."""
    return bytes(len(data))


def halved(data: bytes) -> bytes:
    """A torn file."""
    return data[: len(data) // 2]
