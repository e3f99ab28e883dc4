"""Memory that one process fills and another reads, so that a large input crosses without a copy through a socket.

The reader gets a descriptor that it cannot write through, and neither can change the size (memfd_create(2), seals): a
reader from strangers can do nothing to the one who fills it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Final

SHELF_BYTES: Final = 64 << 20
"""Address space; memory is taken where bytes lie, and given back by `sweep`."""
_PAGE: Final = mmap.PAGESIZE


class Shelf:
    """The filling end; `reader` is the descriptor for the other process. Raises OSError where the kernel has none."""

    def __init__(self, size: int = SHELF_BYTES) -> None:
        self._size = size
        self._used: dict[int, int] = {}
        self._reached = 0
        descriptor = os.memfd_create("spillway", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, size)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self.reader = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
            self._memory = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)

    @property
    def empty(self) -> bool:
        """Whether nothing lies here."""
        return not self._used

    def put(self, data: bytes) -> int | None:
        """Lay bytes down and return where; None where there is no room."""
        at = self._gap(len(data))
        if at is None:
            return None
        self._memory[at : at + len(data)] = data
        self._used[at] = len(data)
        self._reached = max(self._reached, at + len(data))
        return at

    def free(self, at: int) -> None:
        """Let other bytes lie where these did; more than once is harmless."""
        self._used.pop(at, None)

    def sweep(self) -> None:
        """Give the memory back to the system, if nothing lies in it."""
        if not self._used and self._reached:
            self._memory.madvise(mmap.MADV_REMOVE, 0, self._reached)
            self._reached = 0

    def close_reader(self) -> None:
        """Close the other process's descriptor here, once it has it."""
        if self.reader >= 0:
            os.close(self.reader)
            self.reader = -1

    def close(self) -> None:
        """Let go of the memory; the reader keeps what it has mapped."""
        self.close_reader()
        self._memory.close()

    def _gap(self, length: int) -> int | None:
        """Return the first place with so much room."""
        at = 0
        for start in sorted(self._used):
            if start - at >= length:
                return at
            at = -(-(start + self._used[start]) // _PAGE) * _PAGE
        return at if self._size - at >= length else None


class Reader:
    """The reading end, on a descriptor that came from elsewhere and is closed here."""

    def __init__(self, descriptor: int) -> None:
        try:
            self._memory = mmap.mmap(descriptor, 0, mmap.MAP_SHARED, mmap.PROT_READ)
        finally:
            os.close(descriptor)

    def read(self, at: int, length: int) -> bytes:
        """Return the bytes that lie there; raises ValueError beyond the end."""
        if at < 0 or length < 0 or at + length > len(self._memory):
            raise ValueError(f"{length} bytes at {at} lie beyond the shelf")
        return self._memory[at : at + length]
