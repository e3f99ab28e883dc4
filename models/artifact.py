"""Reads an artifact's files: only those that its manifest lists for the variant, inside its folder, through no link."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Self

import msgspec

from models.errors import ModelError

MAX_JSON_BYTES: Final = 16 << 20
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Without O_NONBLOCK the opening of a pipe would wait for its other end.
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Artifact:
    """The files of one variant in one folder; every reader raises ModelError."""

    def __init__(self, folder: Path, files: Iterable[str]) -> None:
        self.folder = folder
        self.files: Final = frozenset(files)
        try:
            self._root = os.open(folder, _FOLDER)
        except OSError as error:
            raise ModelError(f"the artifact's folder cannot be opened: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder; what was read or mapped stays."""
        os.close(self._root)

    def named(self, *names: str, suffix: str = "") -> str:
        """Return the first of `names` that is there, else the only file that ends in `suffix`."""
        for name in names:
            if name in self.files:
                return name
        found = sorted(path for path in self.files if suffix and path.endswith(suffix))
        if len(found) != 1:
            raise ModelError(f"the artifact needs {names[0]!r}; of files like it, it has {len(found)}")
        return found[0]

    def check(self, path: str, max_bytes: int | None = None) -> None:
        """Raise unless a file can be opened as one of the artifact's, for runtimes that insist on opening it."""
        descriptor = self._open(path)
        size = os.fstat(descriptor).st_size
        os.close(descriptor)
        if max_bytes is not None and size > max_bytes:
            raise ModelError(f"{path!r} is over its limit of {max_bytes} bytes")

    def read(self, path: str, max_bytes: int) -> bytes:
        """Return a file's bytes."""
        descriptor = self._open(path)
        with os.fdopen(descriptor, "rb") as file:
            size = os.fstat(descriptor).st_size
            if size > max_bytes:
                raise ModelError(f"{path!r} is over its limit of {max_bytes} bytes")
            # Asked for more, Python would lay out as much memory first.
            return file.read(size)

    def map(self, path: str) -> bytes | mmap.mmap:
        """Return a file's bytes as a read-only map, so that the kernel may share and drop them."""
        descriptor = self._open(path)
        try:
            empty = os.fstat(descriptor).st_size == 0
            return b"" if empty else mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)

    def read_json(self, path: str) -> dict[str, object]:
        """Return a JSON object's members; an artifact without the file gives none."""
        if path not in self.files:
            return {}
        try:
            return msgspec.json.decode(self.read(path, MAX_JSON_BYTES), type=dict[str, object])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ModelError(f"{path!r} is not a JSON object: {error}") from error

    def _open(self, path: str) -> int:
        """Open a listed file, following no link on the way to it and taking none for it."""
        if path not in self.files:
            raise ModelError(f"{path!r} is not among the artifact's files")
        try:
            descriptor = self._walk(path)
        except OSError as error:
            raise ModelError(f"{path!r} cannot be opened: {error.strerror}") from error
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode) or facts.st_nlink > 1:
            os.close(descriptor)
            raise ModelError(f"{path!r} is a link or no file")
        return descriptor

    def _walk(self, path: str) -> int:
        *folders, name = path.split("/")
        if "" in folders or ".." in folders or name in {"", ".."}:
            raise ModelError(f"{path!r} leaves the artifact's folder")
        here = os.dup(self._root)
        try:
            for folder in folders:
                inner = os.open(folder, _FOLDER, dir_fd=here)
                os.close(here)
                here = inner
            return os.open(name, _FILE, dir_fd=here)
        finally:
            os.close(here)
