"""What changed since an earlier version, frame by frame, in the fewest bytes (PROTOCOL 6)."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

from cloud_sync.fleet.cutting import Cut, Run
from cloud_sync.frames import FRAME_BYTES, Encoded, Numbers, encode_delta
from cloud_sync.sources import Base

CLOSE_BYTES: Final = FRAME_BYTES
"""How much of an earlier file a frame without numbers is compared with, around where it would lie."""


class Earlier(NamedTuple):
    """An earlier version that lies whole in a folder: its files' lengths and SHA-256, its runs, its frames."""

    folder: Path
    files: dict[str, tuple[int, str]]
    runs: dict[str, Run]
    frames: frozenset[str]


class Change(NamedTuple):
    """A frame as it follows from its base."""

    encoded: Encoded
    base: Base


def run_lengths(earlier: list[Earlier]) -> dict[str, int]:
    """Return the length of every run of the newest of these versions that has it."""
    lengths: dict[str, int] = {}
    for version in earlier:
        for name, run in version.runs.items():
            lengths.setdefault(name, run.end - run.offset)
    return lengths


def change_since(earlier: Earlier, path: str, length: int, cut: Cut, frame: bytes) -> Change | None:
    """Return a frame of the file `path` of `length` bytes as a change of the earlier version; None without a base."""
    place = _in_run(earlier, cut) or _beside(earlier, path, length, cut)
    if place is None:
        return None
    source, offset, size, numbers = place
    base = _read(earlier.folder / source, offset, size)
    return Change(encode_delta(frame, base, numbers), Base(earlier.files[source][1], offset, size))


def _in_run(earlier: Earlier, cut: Cut) -> tuple[str, int, int, Numbers | None] | None:
    run = earlier.runs.get(cut.run)
    if run is None or run.numbers != cut.numbers or run.offset + cut.place + cut.length > run.end:
        return None
    return run.path, run.offset + cut.place, cut.length, cut.numbers


def _beside(earlier: Earlier, path: str, length: int, cut: Cut) -> tuple[str, int, int, Numbers | None] | None:
    """Return the bytes of the earlier file of this name around the same relative place."""
    before, _ = earlier.files.get(path, (0, ""))
    if not before:
        return None
    size = min(before, CLOSE_BYTES)
    middle = (cut.offset + cut.length // 2) * before // max(1, length)
    return path, max(0, min(middle - size // 2, before - size)), size, None


def _read(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)
