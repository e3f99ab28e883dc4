"""Fetching frames: ranged requests, each frame checked before and after its decoder, resumed where one broke off."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from cloud_sync.errors import FetchError, TrustError
from cloud_sync.frames import decode_frame, sha256_of
from cloud_sync.objects import Objects
from cloud_sync.retry import Retry
from cloud_sync.sources import Part, Range, pack_key, plan_ranges


def fetch_parts(objects: Objects, parts: list[Part], retry: Retry) -> Iterator[tuple[Part, bytes]]:
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
                for part, frame in _fetch_range(objects, todo):
                    todo = _rest(todo)
                    failures = 0
                    yield part, frame
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
            yield part, _open_part(part, stored)


def _open_part(part: Part, stored: bytes) -> bytes:
    """Check the stored bytes before any decoder sees them, and the frame after."""
    if sha256_of(stored) != part.entry.sha256:
        raise FetchError("corrupt_transfer", f"the stored bytes of frame {part.frame} are not what was signed")
    frame = decode_frame(part.entry.codec, stored, part.length)
    if sha256_of(frame) != part.frame:
        raise TrustError("arbitrary_software", f"frame {part.frame} is not what was signed")
    return frame
