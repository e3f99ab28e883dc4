"""Writing so that a power cut leaves the old or the new, never neither (DESIGN 3)."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from cloud_sync.errors import StoreError

FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""What the system says when there is no room for a file."""


def store_error(error: OSError, path: Path) -> StoreError:
    """Return what an OSError on `path` means: `no_space`, `read_only` or `disk`."""
    if error.errno in FULL:
        return StoreError("no_space", f"{path}: {error.strerror}")
    if error.errno == errno.EROFS:
        return StoreError("read_only", f"{path}: {error.strerror}")
    return StoreError("disk", f"{path}: {error.strerror}")


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make a folder, its parents too, and the names of all that are new durable."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for one in reversed(missing):
        sync_folder(one.parent)


def sync_file(path: Path) -> None:
    """Make a file's bytes durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_durably(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replace a file: beside it, fsync, rename, fsync the folder; raises StoreError and leaves the old one."""
    beside = path.with_name(f".{path.name}.new")
    try:
        handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(handle)
        beside.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise store_error(error, path) from error


def read_whole(path: Path, max_bytes: int) -> bytes | None:
    """Return a file's bytes, or None where it is missing, unreadable or over `max_bytes`."""
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError:
        return None
    return data if len(data) <= max_bytes else None


def free_bytes(folder: Path) -> int:
    """Return what an unprivileged writer may still write under `folder`."""
    facts = os.statvfs(folder)
    return facts.f_bavail * facts.f_frsize


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file while the block runs; raises StoreError `locked` where another process holds it."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise store_error(error, path) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise StoreError("locked", f"{path} is held by another process") from error
    finally:
        os.close(handle)
