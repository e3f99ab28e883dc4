"""Writing a pack: many stored frames in one object, named by its SHA-256."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

import msgspec

from cloud_sync.frames import Encoded, sha256_of
from cloud_sync.sources import Base, Entry


class PackWriter:
    """Collects stored frames in a file; a frame that comes twice is stored once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO = path.open("wb")
        self._hash = hashlib.sha256()
        self._entries: dict[str, Entry] = {}
        self.stored_bytes = 0

    def __contains__(self, frame: str) -> bool:
        """Whether a frame, by its SHA-256, is here."""
        return frame in self._entries

    def add(self, frame: str, encoded: Encoded, base: Base | None = None) -> None:
        """Store a frame, by its SHA-256, as it was encoded."""
        if frame in self._entries:
            return
        stored = encoded.stored
        self._file.write(stored)
        self._hash.update(stored)
        self._entries[frame] = Entry(
            pack="",
            offset=self.stored_bytes,
            stored=len(stored),
            sha256=sha256_of(stored),
            codec=encoded.codec,
            base=base,
            exponent_bits=encoded.exponent_bits,
        )
        self.stored_bytes += len(stored)

    def stored(self, frame: str) -> int:
        """Return how many bytes a frame takes here; raises KeyError."""
        return self._entries[frame].stored

    def close(self) -> tuple[str, dict[str, Entry]]:
        """End the file; return the pack's SHA-256 and the entry of each frame."""
        self._file.close()
        pack = self._hash.hexdigest()
        return pack, {frame: msgspec.structs.replace(entry, pack=pack) for frame, entry in self._entries.items()}
