"""Packing a version: its files cut into frames, one complete pack, and a delta pack against each earlier version."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple, TypeVar

import msgspec

from cloud_sync.fleet.cutting import Cut, Run, cut_file, find_runs
from cloud_sync.fleet.deltas import Change, Earlier, change_since, run_lengths
from cloud_sync.fleet.tensors import find_tensors
from cloud_sync.frames import Encoded, encode_frame, sha256_of
from cloud_sync.packs import PackWriter
from cloud_sync.sources import Entry
from models.manifest import FileEntry

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")
WORTH_BYTES: Final = 512
"""What a delta must save to be listed: as much as its entry in the signed sources costs every box."""


class Packed(msgspec.Struct):
    """A version ready to be uploaded: `packs` by SHA-256; `bytes_from` is what each earlier version has to fetch."""

    files: list[FileEntry]
    packs: dict[str, Path]
    frames: dict[str, list[Entry]]
    complete_bytes: int
    bytes_from: dict[str, int]


def earlier_version(folder: Path, files: list[FileEntry]) -> Earlier:
    """Describe an earlier version whose files lie whole in a folder."""
    runs = find_runs(find_tensors(folder, [entry.path for entry in files]))
    frames = frozenset(sha256 for entry in files for _, sha256 in entry.frames)
    lengths = {entry.path: (entry.length, entry.sha256) for entry in files}
    return Earlier(folder, lengths, {run.name: run for run in runs}, frames)


def pack_files(
    folder: Path, paths: list[str], work: Path, earlier: dict[str, Earlier], advance: Callable[[int], object]
) -> Packed:
    """Pack files of a folder into objects under `work`; `earlier` are versions by name, the newest first."""
    packing = _Packing(folder, work, earlier)
    runs = find_runs(find_tensors(folder, paths))
    files = [packing.add_file(path, [run for run in runs if run.path == path], advance) for path in paths]
    return packing.close(files)


class _Encoded(NamedTuple):
    """A frame as it will be stored: whole, and as a change of each earlier version that it is worth it for."""

    sha256: str
    whole: Encoded
    changes: dict[str, Change]


class _Packing:
    def __init__(self, folder: Path, work: Path, earlier: dict[str, Earlier]) -> None:
        self._folder = folder
        self._earlier = earlier
        self._lengths = run_lengths(list(earlier.values()))
        self._complete = PackWriter(work / "complete")
        self._deltas = {version: PackWriter(work / f"since-{version}") for version in earlier}

    def add_file(self, path: str, runs: list[Run], advance: Callable[[int], object]) -> FileEntry:
        length = (self._folder / path).stat().st_size
        whole = hashlib.sha256()
        frames: list[tuple[int, str]] = []
        cuts = cut_file(length, runs, self._lengths)
        with (self._folder / path).open("rb") as file:

            def read() -> Iterator[tuple[Cut, bytes]]:
                for cut in cuts:
                    frame = _read(file, cut, path)
                    whole.update(frame)
                    yield cut, frame

            for cut, encoded in zip(cuts, _side_by_side(partial(self._encode, path, length), read()), strict=True):
                self._keep(encoded)
                frames.append((cut.length, encoded.sha256))
                advance(cut.length)
        return FileEntry(path, length, whole.hexdigest(), frames)

    def _encode(self, path: str, length: int, job: tuple[Cut, bytes]) -> _Encoded:
        cut, frame = job
        sha256 = sha256_of(frame)
        whole = encode_frame(frame, cut.numbers)
        changes: dict[str, Change] = {}
        for version, earlier in self._earlier.items():
            change = None if sha256 in earlier.frames else change_since(earlier, path, length, cut, frame)
            if change and len(change.encoded.stored) + WORTH_BYTES < len(whole.stored):
                changes[version] = change
        return _Encoded(sha256, whole, changes)

    def _keep(self, encoded: _Encoded) -> None:
        self._complete.add(encoded.sha256, encoded.whole)
        for version, change in encoded.changes.items():
            self._deltas[version].add(encoded.sha256, change.encoded, change.base)

    def close(self, files: list[FileEntry]) -> Packed:
        wanted = {sha256 for entry in files for _, sha256 in entry.frames}
        complete_bytes = self._complete.stored_bytes
        bytes_from = {version: self._bytes_from(version, wanted) for version in self._earlier}
        packs: dict[str, Path] = {}
        frames: dict[str, list[Entry]] = {sha256: [] for sha256 in wanted}
        for writer in (self._complete, *self._deltas.values()):
            pack, entries = writer.close()
            if entries:
                packs[pack] = writer.path
            for sha256, entry in entries.items():
                frames[sha256].append(entry)
        return Packed(files, packs, frames, complete_bytes, bytes_from)

    def _bytes_from(self, version: str, wanted: set[str]) -> int:
        delta = self._deltas[version]
        missing = wanted - self._earlier[version].frames
        return sum((delta if sha256 in delta else self._complete).stored(sha256) for sha256 in missing)


def _read(file: BinaryIO, cut: Cut, path: str) -> bytes:
    frame = file.read(cut.length)
    if len(frame) != cut.length:
        raise OSError(f"{path} became shorter while it was read")
    return frame


def _side_by_side(work: Callable[[_Job], _Result], jobs: Iterable[_Job]) -> Iterator[_Result]:
    """Yield what `work` makes of each job, in order, a few at a time: the compressor works without Python's lock."""
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[_Result]] = deque()
        for job in jobs:
            waiting.append(pool.submit(work, job))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
