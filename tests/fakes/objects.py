"""A repository's storage in memory, and the ways in which a real one goes wrong."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

from cloud_sync.errors import ConflictError, FetchError, NotFoundError
from cloud_sync.objects import Blob


class MemoryObjects:
    """Implements `Objects`. `faults` maps a key to what happens instead of the next reads of it, in order."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}
        self.faults: dict[str, list[Callable[[Blob], Blob]]] = {}
        self.asked: list[tuple[str, int, int | None]] = []
        self.chunk_bytes = 1000

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> Blob:
        self.asked.append((key, start, length))
        if key not in self.held:
            raise NotFoundError(key)
        data = self.held[key]
        wanted = data[start:] if length is None else data[start : start + length]
        if length is not None and len(wanted) < length:
            raise FetchError("out_of_range", f"{key} ends early")
        blob = Blob(_etag(data), self._chunks(wanted))
        fault = self.faults.get(key, [])
        return fault.pop(0)(blob) if fault else blob

    def put(self, key: str, data: bytes | Path, *, only_new: bool = False, if_match: str | None = None) -> str:
        now = self.held.get(key)
        if (only_new and now is not None) or (if_match is not None and (now is None or _etag(now) != if_match)):
            raise ConflictError(key)
        self.held[key] = data if isinstance(data, bytes) else data.read_bytes()
        return _etag(self.held[key])

    def exists(self, key: str) -> bool:
        return key in self.held

    def names(self, prefix: str) -> Iterator[str]:
        return iter(sorted(key for key in self.held if key.startswith(prefix)))

    def delete(self, key: str) -> None:
        self.held.pop(key, None)

    def _chunks(self, data: bytes) -> Generator[bytes]:
        for at in range(0, len(data), self.chunk_bytes):
            yield data[at : at + self.chunk_bytes]


def breaks_off(after_bytes: int, error: FetchError) -> Callable[[Blob], Blob]:
    """The read fails once it has given so many bytes."""

    def fault(blob: Blob) -> Blob:
        def chunks() -> Generator[bytes]:
            left = after_bytes
            for chunk in blob.chunks:
                if left <= 0:
                    break
                yield chunk[:left]
                left -= len(chunk)
            raise error

        return Blob(blob.etag, chunks())

    return fault


def gives(data: bytes) -> Callable[[Blob], Blob]:
    """The read gives other bytes."""
    return lambda blob: Blob(blob.etag, (chunk for chunk in [data]))


def fails(error: FetchError) -> Callable[[Blob], Blob]:
    """The read is refused."""

    def fault(blob: Blob) -> Blob:
        raise error

    return fault


def endless(blob: Blob) -> Blob:
    """The read never ends."""

    def chunks() -> Generator[bytes]:
        while True:
            yield bytes(1 << 16)

    return Blob(blob.etag, chunks())


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
