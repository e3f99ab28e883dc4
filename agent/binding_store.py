"""Windows, states and last answers of bindings over a restart: one small file, written whole.

Times in it are of the saving agent's clock; the wall clock tells how long the box was away. Where that went back,
what has a `max_age_s` is forgotten, since nobody knows its age.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from agent.binding_settings import Binding
from agent.binding_source import Source
from cloud_sync.disk import read_whole, write_durably
from models.manifest import digest_of

FILE: Final = "bindings.state"
MAX_BYTES: Final = 16 << 20
MAX_VALUES: Final = 100_000
"""Values of all windows that are written; of more, a binding's are left out."""
_SHAPING: Final = ("topic", "take", "time", "columns", "scale", "offset", "words", "window", "tensor", "state", "model")
"""What a window's content depends on: changed, it begins anew."""


class Kept(msgspec.Struct):
    """What was kept: sensors by binding, and the filters that the broker was asked for."""

    sources: dict[str, list[Source]] = {}
    filters: list[str] = []


class _Saved(msgspec.Struct):
    """The file: `at` on the agent's clock and `wall_s` on the wall's are one moment."""

    at: float
    wall_s: float
    filters: list[str]
    shapes: dict[str, str]
    sources: dict[str, list[Source]]


_decoder = msgspec.msgpack.Decoder(_Saved)


def save_sources(
    file: Path, bindings: Sequence[Binding], sources: Mapping[str, list[Source]], now: float, *, wall_s: float = 0.0
) -> None:
    """Write what is kept of every sensor; raises StoreError. `now` is the clock of the sources' times."""
    room = MAX_VALUES
    chosen: dict[str, list[Source]] = {}
    for binding in bindings:
        values = sum(len(source.series) for source in sources[binding.name]) * len(binding.cells)
        if values <= room:
            chosen[binding.name] = sources[binding.name]
            room -= values
    saved = _Saved(
        at=now,
        wall_s=wall_s or time.time(),
        filters=[pattern for binding in bindings for pattern in binding.filters],
        shapes={binding.name: shape_of(binding) for binding in bindings},
        sources=chosen,
    )
    write_durably(file, msgspec.msgpack.encode(saved), mode=0o600)


def load_sources(file: Path, bindings: Sequence[Binding], now: float, *, wall_s: float = 0.0) -> Kept:
    """Return what was kept, its times on the clock of `now`."""
    raw = read_whole(file, MAX_BYTES)
    if raw is None:
        return Kept()
    try:
        saved = _decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Kept()
    away_s = (wall_s or time.time()) - saved.wall_s
    shift = now - saved.at - max(0.0, away_s)
    kept = Kept(filters=saved.filters)
    for binding in bindings:
        if saved.shapes.get(binding.name) == shape_of(binding) and (away_s >= 0 or not binding.max_age_s):
            kept.sources[binding.name] = [_shifted(source, shift) for source in saved.sources.get(binding.name, [])]
    return kept


def shape_of(binding: Binding) -> str:
    """Return a digest of what a binding's windows are made of."""
    return digest_of(msgspec.json.encode([getattr(binding, name) for name in _SHAPING]))


def _shifted(source: Source, by: float) -> Source:
    for row in source.series:
        row.at += by
    source.cells = {column: (at + by, value) for column, (at, value) in source.cells.items()}
    source.since += by
    source.heard_at += by
    source.asked_at += by
    return source
