"""What a repository's storage must do, whichever it is; `objects_file` and `objects_s3` do it."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import msgspec

from cloud_sync.errors import FetchError

CHUNK_BYTES: Final = 32 << 10
"""How much of an object is handed on at a time; small, so that a slow link is seen to move."""


class StorageSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How S3 is reached: endpoint URL ("" for AWS), region, and an AWS credentials file.

    `credentials` "" takes the environment's, "anonymous" signs nothing.
    """

    endpoint: str = ""
    region: str = ""
    credentials: str = ""
    profile: str = "default"


class Blob(NamedTuple):
    """An object, or a range of one, on its way; `chunks` raises FetchError. Close it, read to its end or not."""

    etag: str
    chunks: Generator[bytes]


class Objects(Protocol):
    """A bucket or folder. Every method raises FetchError; keys are relative, with `/` between parts."""

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> Blob:
        """Return the object, or `length` bytes of it from `start`; raises NotFoundError."""
        ...

    def put(self, key: str, data: bytes | Path, *, only_new: bool = False, if_match: str | None = None) -> str:
        """Write an object whole and return its etag; raises ConflictError where the condition does not hold."""
        ...

    def exists(self, key: str) -> bool:
        """Whether there is such an object."""
        ...

    def names(self, prefix: str) -> Iterator[str]:
        """Yield the keys that begin with `prefix`."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object, if it is there."""
        ...


def read(objects: Objects, key: str, max_bytes: int) -> tuple[bytes, str]:
    """Return a whole object of at most `max_bytes` and its etag; raises FetchError `endless_data` above that."""
    blob = objects.get(key)
    data = bytearray()
    with contextlib.closing(blob.chunks) as chunks:
        for chunk in chunks:
            data += chunk
            if len(data) > max_bytes:
                raise FetchError("endless_data", f"{key} is over its limit of {max_bytes} bytes")
    return bytes(data), blob.etag
