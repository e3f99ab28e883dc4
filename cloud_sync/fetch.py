"""Fetching frames: ranged requests, each frame checked before and after its decoder, resumed where one broke off."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from cloud_sync.errors import FetchError, TrustError
from cloud_sync.frames import CODECS, WITHOUT_BASE, decode_frame, sha256_of
from cloud_sync.objects import Objects
from cloud_sync.retry import Retry
from cloud_sync.sources import Base, Part, Range, Sources, choose_parts, pack_key, plan_ranges


class Fetched(NamedTuple):
    """A part and its verified frame; None where the box's own copy of its base is not what it should be."""

    part: Part
    frame: bytes | None


def fetch_frames(
    objects: Objects, sources: Sources, wanted: dict[str, int], bases: Mapping[str, Path], retry: Retry
) -> Iterator[tuple[str, bytes]]:
    """Yield the verified frames that are wanted (SHA-256 to length), in the fewest bytes that these bases allow.

    `bases` says where files of earlier versions lie, by their SHA-256. One that is damaged costs its frames a second
    request, without a base. Raises as `fetch_parts` does, and TrustError `missing_target`.
    """
    whole: dict[str, int] = {}
    for part, frame in fetch_parts(objects, choose_parts(sources, wanted, CODECS, bases), retry, bases):
        if frame is None:
            whole[part.frame] = part.length
        else:
            yield part.frame, frame
    for part, frame in fetch_parts(objects, choose_parts(sources, whole, WITHOUT_BASE), retry):
        if frame is not None:
            yield part.frame, frame


def fetch_parts(
    objects: Objects, parts: list[Part], retry: Retry, bases: Mapping[str, Path] = MappingProxyType({})
) -> Iterator[Fetched]:
    """Yield each part with its verified frame, in pack order.

    A request that breaks off is made again from the first part that is still missing; progress resets the
    count of failures. Raises FetchError when they are too many, TrustError `arbitrary_software` where the
    bytes stay wrong.
    """
    for wanted in plan_ranges(parts):
        todo = wanted
        failures = 0
        while todo.parts:
            try:
                for part, stored in _fetch_range(objects, todo):
                    frame = _open_part(part, stored, bases)
                    todo = _rest(todo)
                    failures = 0
                    yield Fetched(part, frame)
            except FetchError as error:
                failures += 1
                if not error.retryable or failures >= retry.attempts:
                    raise _judged(error) from error
                retry.pause(failures)


def _rest(todo: Range) -> Range:
    parts = todo.parts[1:]
    return Range(todo.pack, parts[0].entry.offset if parts else todo.end, todo.end, parts)


def _judged(error: FetchError) -> FetchError | TrustError:
    if error.code == "corrupt_transfer":
        return TrustError("arbitrary_software", error.message)
    return error


def _fetch_range(objects: Objects, wanted: Range) -> Iterator[tuple[Part, bytes]]:
    blob = objects.get(pack_key(wanted.pack), start=wanted.start, length=wanted.end - wanted.start)
    with contextlib.closing(blob.chunks) as chunks:
        buffer = bytearray()
        at = wanted.start
        for part in wanted.parts:
            entry = part.entry
            end = entry.offset + entry.stored
            while at + len(buffer) < end:
                chunk = next(chunks, None)
                if chunk is None:
                    raise FetchError("truncated", f"pack {wanted.pack} ends at {at + len(buffer)}, not at {end}")
                buffer += chunk
            stored = bytes(buffer[entry.offset - at : end - at])
            del buffer[: end - at]
            at = end
            yield part, stored


def _open_part(part: Part, stored: bytes, bases: Mapping[str, Path]) -> bytes | None:
    """Check the stored bytes before any decoder sees them, and the frame after."""
    entry = part.entry
    if sha256_of(stored) != entry.sha256:
        raise FetchError("corrupt_transfer", f"the stored bytes of frame {part.frame} are not what was signed")
    base = b"" if entry.base is None else _read_base(entry.base, bases)
    if base is None:
        return None
    try:
        frame = decode_frame(entry.codec, stored, part.length, base, entry.exponent_bits)
        if sha256_of(frame) == part.frame:
            return frame
    except TrustError:
        # The stored bytes are as signed, so it may be our copy of the base that is not.
        if entry.base is None:
            raise
    if entry.base is None:
        raise TrustError("arbitrary_software", f"frame {part.frame} is not what was signed")
    return None


def _read_base(base: Base, bases: Mapping[str, Path]) -> bytes | None:
    try:
        with bases[base.sha256].open("rb") as file:
            file.seek(base.offset)
            data = file.read(base.length)
    except OSError:
        return None
    return data if len(data) == base.length else None
