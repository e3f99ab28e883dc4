"""Where the frames of a version can be had, and in what order to ask for them. Pure: no I/O, no clock."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Final

import msgspec

from cloud_sync.errors import TrustError
from models.manifest import is_sha256

SCHEMA: Final = 1
MAX_SOURCES_BYTES: Final = 16 << 20
MAX_STORED_BYTES: Final = (4 << 20) + (64 << 10)
MAX_BASE_BYTES: Final = 4 << 20
GAP_BYTES: Final = 64 << 10
"""Bytes between two wanted frames that are cheaper to read than to ask around."""
RANGE_BYTES: Final = 32 << 20
"""How much one ranged request asks for."""


class Base(msgspec.Struct, frozen=True):
    """Bytes of an earlier version's file, by the file's SHA-256."""

    sha256: str
    offset: int
    length: int


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One way to have a frame: `stored` bytes at `offset` of a pack; `sha256` is of the stored bytes.

    Codecs that tell a frame by its difference name their `base`; the sorted ones the `exponent_bits` of its floats.
    """

    pack: str
    offset: int
    stored: int
    sha256: str
    codec: str
    base: Base | None = None
    exponent_bits: int = 0


class Sources(msgspec.Struct, frozen=True):
    """The entries for each frame, by the frame's SHA-256; `manifest` is the digest they belong to."""

    schema: int
    manifest: str
    frames: dict[str, list[Entry]]


class Part(msgspec.Struct, frozen=True):
    """A frame to fetch: its SHA-256 and length in bytes, and the entry that gives it."""

    frame: str
    length: int
    entry: Entry


class Range(msgspec.Struct, frozen=True):
    """One ranged request: bytes `start` to `end` of a pack, which hold `parts` in order."""

    pack: str
    start: int
    end: int
    parts: list[Part]


class _Schema(msgspec.Struct):
    schema: int


def sources_bytes(sources: Sources) -> bytes:
    """Return the canonical bytes of sources."""
    return msgspec.json.encode(sources, order="sorted")


def parse_sources(raw: bytes) -> Sources:
    """Return what `raw` holds; raises TrustError `bad_metadata` naming what is wrong."""
    try:
        schema = msgspec.json.decode(raw, type=_Schema).schema
        if schema != SCHEMA:
            raise TrustError("unknown_schema", f"sources: schema {schema} is not known")
        sources = msgspec.json.decode(raw, type=Sources)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise TrustError("bad_metadata", f"sources: {error}") from error
    for frame, entries in sources.frames.items():
        if not is_sha256(frame) or not all(_sound(entry) for entry in entries):
            raise TrustError("bad_metadata", f"sources: the entries of frame {frame[:64]!r} are malformed")
    return sources


def _sound(entry: Entry) -> bool:
    whole = is_sha256(entry.pack) and is_sha256(entry.sha256) and 0 <= entry.exponent_bits < 16
    bounded = 0 <= entry.offset < 1 << 62 and 0 < entry.stored <= MAX_STORED_BYTES
    return whole and bounded and (entry.base is None or _sound_base(entry.base))


def _sound_base(base: Base) -> bool:
    return is_sha256(base.sha256) and 0 <= base.offset < 1 << 62 and 0 < base.length <= MAX_BASE_BYTES


def pack_key(pack: str) -> str:
    """Return where a pack lies in a repository."""
    return f"packs/{pack[:2]}/{pack}"


def choose_parts(
    sources: Sources, wanted: dict[str, int], codecs: Iterable[str], bases: Container[str] = ()
) -> list[Part]:
    """Return the smallest usable entry for each frame (SHA-256 to length); raises TrustError `missing_target`.

    `bases` are the files at hand, by their SHA-256.
    """
    known = frozenset(codecs)
    parts: list[Part] = []
    for frame, length in wanted.items():
        entries = [entry for entry in sources.frames.get(frame, []) if entry.codec in known]
        usable = [entry for entry in entries if entry.base is None or entry.base.sha256 in bases]
        if not usable:
            raise TrustError("missing_target", f"no source that this version can read gives frame {frame}")
        parts.append(Part(frame, length, min(usable, key=lambda entry: entry.stored)))
    return parts


def plan_ranges(parts: list[Part]) -> list[Range]:
    """Join neighbouring parts of the same pack into requests of at most about 32 MiB."""
    ranges: list[Range] = []
    for part in sorted(parts, key=lambda part: (part.entry.pack, part.entry.offset)):
        entry = part.entry
        end = entry.offset + entry.stored
        last = ranges[-1] if ranges else None
        if last and _joins(last, entry):
            last.parts.append(part)
            ranges[-1] = Range(last.pack, last.start, end, last.parts)
        else:
            ranges.append(Range(entry.pack, entry.offset, end, [part]))
    return ranges


def _joins(last: Range, entry: Entry) -> bool:
    near = last.pack == entry.pack and last.end <= entry.offset <= last.end + GAP_BYTES
    return near and entry.offset + entry.stored - last.start <= RANGE_BYTES
