"""Where a file is cut into frames: at the borders of tensors, so that numbers lie against their own kind.

Pure: no I/O, no clock. A cut is by PROTOCOL 6 at most 4 MiB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Final, NamedTuple

from cloud_sync.fleet.tensors import Tensor
from cloud_sync.frames import FRAME_BYTES, Numbers

MIN_RUN_BYTES: Final = 16 << 10
"""Tensors in a shorter run are not worth a frame of their own, which costs 300 bytes of signed description."""
MAX_PADDING_BYTES: Final = 4096
"""Between two tensors of one run, at most: what their alignment takes."""


class Run(NamedTuple):
    """Neighbouring tensors of one kind: bytes `offset` to `end` of a file; `name` is the first tensor's."""

    name: str
    path: str
    offset: int
    end: int
    numbers: Numbers


class Cut(NamedTuple):
    """One frame of a file. In a run, `place` is where it begins there and `numbers` what it holds."""

    offset: int
    length: int
    run: str = ""
    place: int = 0
    numbers: Numbers | None = None


def find_runs(tensors: Iterable[Tensor]) -> list[Run]:
    """Join neighbouring tensors of one kind; runs that are too short, or overlap another, are left out."""
    runs: list[Run] = []
    for tensor in sorted(tensors, key=lambda tensor: (tensor.path, tensor.offset)):
        end = tensor.offset + tensor.length
        last = runs[-1] if runs else None
        if last is not None and last.path == tensor.path and tensor.offset < last.end:
            continue  # two names for the same bytes
        if last is not None and _joins(last, tensor):
            runs[-1] = last._replace(end=end)
        else:
            runs.append(Run(tensor.name, tensor.path, tensor.offset, end, tensor.numbers))
    return [run for run in runs if run.end - run.offset >= MIN_RUN_BYTES]


def _joins(last: Run, tensor: Tensor) -> bool:
    gap = tensor.offset - last.end
    small = last.end - last.offset < MIN_RUN_BYTES or tensor.length < MIN_RUN_BYTES
    whole = (tensor.offset - last.offset) % last.numbers.width == 0
    return small and whole and last.path == tensor.path and last.numbers == tensor.numbers and gap <= MAX_PADDING_BYTES


def cut_file(length: int, runs: Iterable[Run], earlier: Mapping[str, int]) -> list[Cut]:
    """Return the frames of a file of `length` bytes with these runs, in order.

    `earlier` says how long the runs were in the version before: where one has grown, a cut lies at its old end, so
    that what was there before still stands against its own kind.
    """
    cuts: list[Cut] = []
    at = 0
    for run in sorted(runs, key=lambda run: run.offset):
        cuts += [Cut(start, size) for start, size in _pieces(at, run.offset, FRAME_BYTES)]
        borders = sorted({run.offset, min(run.offset + earlier.get(run.name, 0), run.end), run.end})
        step = FRAME_BYTES - FRAME_BYTES % run.numbers.width
        for start, end in pairwise(borders):
            pieces = _pieces(start, end, step)
            cuts += [Cut(begin, size, run.name, begin - run.offset, run.numbers) for begin, size in pieces]
        at = run.end
    return [*cuts, *(Cut(start, size) for start, size in _pieces(at, length, FRAME_BYTES))]


def _pieces(start: int, end: int, step: int) -> Iterator[tuple[int, int]]:
    for at in range(start, end, step):
        yield at, min(step, end - at)
