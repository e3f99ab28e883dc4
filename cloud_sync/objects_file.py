"""A repository in a folder: `file:///path`. Several admins may write it at once; a reader sees whole objects."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

from cloud_sync.disk import sync_folder
from cloud_sync.errors import ConflictError, FetchError, NotFoundError
from cloud_sync.objects import CHUNK_BYTES, Blob

WORK = ".spillway"
"""The folder inside the repository for its lock and what is being written."""


class FileObjects:
    """Objects as files under a root folder; an etag is the content's SHA-256."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> Blob:
        """Return an object or a range of it. The etag is computed for whole objects alone."""
        path = self._path(key)
        whole = start == 0 and length is None
        try:
            etag = _etag(path) if whole else ""
            path.stat()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFoundError(key) from error
        except OSError as error:
            raise _fetch_error(key, error) from error
        return Blob(etag, _chunks(path, key, start, length))

    def put(self, key: str, data: bytes | Path, *, only_new: bool = False, if_match: str | None = None) -> str:
        """Write beside, fsync, then link (new) or rename (any) under the repository's lock."""
        path = self._path(key)
        try:
            with self._lock():
                if if_match is not None and self._current(path) != if_match:
                    raise ConflictError(key)
                path.parent.mkdir(parents=True, exist_ok=True)
                return self._place(path, key, data, only_new=only_new)
        except OSError as error:
            raise _fetch_error(key, error) from error

    def exists(self, key: str) -> bool:
        """Whether the file is there."""
        return self._path(key).is_file()

    def names(self, prefix: str) -> Iterator[str]:
        """Yield the keys under `prefix`, sorted."""
        for folder, folders, files in os.walk(self._root):
            folders[:] = sorted(name for name in folders if name != WORK)
            for name in sorted(files):
                key = Path(folder, name).relative_to(self._root).as_posix()
                if key.startswith(prefix):
                    yield key

    def delete(self, key: str) -> None:
        """Remove the file, if it is there."""
        try:
            self._path(key).unlink(missing_ok=True)
        except OSError as error:
            raise _fetch_error(key, error) from error

    def _path(self, key: str) -> Path:
        parts = key.split("/")
        if any(part in {"", ".", ".."} or "\0" in part for part in parts) or parts[0] == WORK:
            raise FetchError("bad_key", f"{key!r} is no key")
        return self._root.joinpath(*parts)

    def _current(self, path: Path) -> str | None:
        return _etag(path) if path.is_file() else None

    def _place(self, path: Path, key: str, data: bytes | Path, *, only_new: bool) -> str:
        handle, beside = tempfile.mkstemp(dir=self._root / WORK)
        try:
            with os.fdopen(handle, "wb") as file:
                etag = _copy(data, file.fileno())
                os.fchmod(file.fileno(), 0o644)
                os.fsync(file.fileno())
            if only_new:
                try:
                    os.link(beside, path)
                except FileExistsError as error:
                    raise ConflictError(key) from error
            else:
                Path(beside).replace(path)
            sync_folder(path.parent)
            return etag
        finally:
            Path(beside).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        work = self._root / WORK
        work.mkdir(parents=True, exist_ok=True)
        with (work / "lock").open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _fetch_error(key: str, error: OSError) -> FetchError:
    return FetchError("unreachable", f"{key}: {error.strerror or error}")


def _etag(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _copy(data: bytes | Path, handle: int) -> str:
    with os.fdopen(os.dup(handle), "wb") as target:
        if isinstance(data, bytes):
            target.write(data)
            return hashlib.sha256(data).hexdigest()
        with data.open("rb") as source:
            shutil.copyfileobj(source, target, 1 << 20)
    return _etag(data)


def _chunks(path: Path, key: str, start: int, length: int | None) -> Generator[bytes]:
    left = length
    try:
        with path.open("rb") as file:
            file.seek(start)
            while left is None or left > 0:
                chunk = file.read(CHUNK_BYTES if left is None else min(CHUNK_BYTES, left))
                if not chunk:
                    break
                left = None if left is None else left - len(chunk)
                yield chunk
    except FileNotFoundError as error:
        raise NotFoundError(key) from error
    except OSError as error:
        raise _fetch_error(key, error) from error
    if left:
        raise FetchError("truncated", f"{key} ends {left} bytes early")
