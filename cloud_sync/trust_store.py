"""The signed metadata last trusted, kept through power cuts, with a version floor for each role kept twice.

`trust/` holds the metadata files as received, `floor.a` and `floor.b` (each: a SHA-256 in hex, a
newline, JSON), and `targets/` with the small signed files by their digests. A damaged file counts as missing.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Final
from urllib.parse import quote

import msgspec

from cloud_sync.disk import make_folder, read_whole, write_durably

MAX_FILE_BYTES: Final = 16 << 20
FLOORS: Final = ("floor.a", "floor.b")


class Floor(msgspec.Struct, frozen=True):
    """The highest version accepted under a name, which keys of which role vouched for it, and when it was issued.

    A floor binds while those keys still make the role's threshold, so that a rotation of keys ends a
    fast-forward attack (TUF 1.0, 5.3.11) and nothing less does.
    """

    name: str
    version: int
    role: str
    signers: list[str]
    issued: str = ""


class TrustStore:
    """The folder `trust/`; every write is durable before it returns and raises StoreError."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._targets = folder / "targets"
        make_folder(self._targets)
        copies = [_read_floors(folder / name) for name in FLOORS]
        self._whole = copies[0] == copies[1]
        self._floors: dict[str, list[Floor]] = {}
        for floor in _merged(copies):
            self._floors.setdefault(floor.name, []).append(floor)

    def load(self, role: str) -> bytes | None:
        """Return the metadata last trusted for a role, unverified, or None."""
        return read_whole(self._path(role), MAX_FILE_BYTES)

    def save(self, role: str, data: bytes) -> None:
        """Keep a role's metadata; call it after the data was verified."""
        if self.load(role) != data:
            write_durably(self._path(role), data)

    def floors(self, name: str) -> list[Floor]:
        """Return the floors known under a name; two where a cut came between the two copies."""
        return self._floors.get(name, [])

    def all_floors(self) -> list[Floor]:
        """Return every floor."""
        return [floor for floors in self._floors.values() for floor in floors]

    def put_floors(self, floors: Iterable[Floor]) -> None:
        """Replace the floors under their names, in both copies, one after the other."""
        changed = [floor for floor in floors if self._floors.get(floor.name) != [floor]]
        if not changed and self._whole:
            return
        self._floors.update({floor.name: [floor] for floor in changed})
        payload = msgspec.json.encode(self.all_floors())
        for name in FLOORS:
            write_durably(self._folder / name, hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)
        self._whole = True

    def target(self, digest: str, algorithm: str = "sha256") -> bytes | None:
        """Return a signed file kept by its digest in hex, checked, or None."""
        data = read_whole(self._targets / digest, MAX_FILE_BYTES)
        return data if data is not None and hashlib.new(algorithm, data).hexdigest() == digest else None

    def keep_target(self, digest: str, data: bytes) -> None:
        """Keep a verified signed file for the next pass."""
        write_durably(self._targets / digest, data)

    def forget_targets(self, keep: set[str]) -> None:
        """Remove the kept files that the last pass did not use."""
        for path in self._targets.iterdir():
            if path.name not in keep:
                with contextlib.suppress(OSError):
                    path.unlink()

    def _path(self, role: str) -> Path:
        return self._folder / f"{quote(role, safe='')}.json"


def _read_floors(path: Path) -> list[Floor]:
    raw = read_whole(path, MAX_FILE_BYTES) or b""
    checksum, _, payload = raw.partition(b"\n")
    if hashlib.sha256(payload).hexdigest().encode() != checksum:
        return []
    return msgspec.json.decode(payload, type=list[Floor])


def _merged(copies: list[list[Floor]]) -> list[Floor]:
    floors: list[Floor] = []
    for copy in copies:
        floors.extend(floor for floor in copy if floor not in floors)
    return floors
