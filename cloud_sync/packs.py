"""Writing a pack: many stored frames in one object, named by its SHA-256."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

from cloud_sync.frames import encode_frame, sha256_of
from cloud_sync.sources import Entry


class PackWriter:
    """Collects the frames of one version in a file; a frame that comes twice is stored once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO = path.open("wb")
        self._hash = hashlib.sha256()
        self._offset = 0
        self._entries: dict[str, tuple[int, int, str, str]] = {}

    def add(self, frame: bytes) -> str:
        """Store a frame and return its SHA-256."""
        sha256 = sha256_of(frame)
        if sha256 not in self._entries:
            codec, stored = encode_frame(frame)
            self._file.write(stored)
            self._hash.update(stored)
            self._entries[sha256] = (self._offset, len(stored), sha256_of(stored), codec)
            self._offset += len(stored)
        return sha256

    @property
    def stored_bytes(self) -> int:
        """How long the pack is so far."""
        return self._offset

    def close(self) -> tuple[str, dict[str, list[Entry]]]:
        """End the file; return the pack's SHA-256 and the entries of its frames."""
        self._file.close()
        pack = self._hash.hexdigest()
        entries = {
            frame: [Entry(pack=pack, offset=offset, stored=stored, sha256=sha256, codec=codec)]
            for frame, (offset, stored, sha256, codec) in self._entries.items()
        }
        return pack, entries
