"""A picture of what each variant gives for what it costs: an SVG of a few lines. Pure: no I/O, no clock."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final
from xml.sax.saxutils import escape

from cloud_sync.fleet.gate import Judged

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 72, 24, 48, 56
_MIN_RADIUS: Final = 5.0
_MAX_RADIUS: Final = 22.0
_TICKS: Final = 5
_STYLE: Final = (
    "text{font:12px sans-serif;fill:#222}.grid{stroke:#ddd}.axis{stroke:#444}"
    "circle{fill:#2a6f97;fill-opacity:.55;stroke:#14405a}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.grid{stroke:#444}.axis{stroke:#aaa}}"
)


def plot(judged: Sequence[Judged], task: str) -> str:
    """Return an SVG: across the 95th percentile in ms, up the measure that decides, each disc's area its bytes."""
    measure = next(iter(judged[0].scores))
    across = _Scale([one.p95_ms for one in judged], LEFT, WIDTH - RIGHT, from_zero=True)
    up = _Scale([one.scores[measure] for one in judged], HEIGHT - BOTTOM, TOP)
    largest = max(one.bytes for one in judged)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{escape(task)}: {escape(measure)} and latency of each variant</title><style>{_STYLE}</style>",
        *(_vertical(value, across.place(value)) for value in across.ticks()),
        *(_horizontal(value, up.place(value)) for value in up.ticks()),
        f'<path class="axis" fill="none" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>',
        _label(measure.replace("_", " "), 12, TOP - 20),
        _label("95th percentile, ms; a disc's area is the size", WIDTH - RIGHT, HEIGHT - 12, anchor="end"),
    ]
    for one in judged:
        radius = max(_MIN_RADIUS, _MAX_RADIUS * math.sqrt(one.bytes / largest))
        x, y = across.place(one.p95_ms), up.place(one.scores[measure])
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"/>')
        parts.append(_label(f"{one.name}, {one.bytes / (1 << 20):.1f} MiB", x, y - radius - 4, anchor="middle"))
    return "\n".join([*parts, "</svg>\n"])


class _Scale:
    """Numbers to places between two borders, with some room around them."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, from_zero: bool = False) -> None:
        low, high = (0.0 if from_zero else min(values)), max(values)
        room = (high - low) * 0.15 or abs(high) * 0.05 or 1.0
        self._low, self._high = low - (0.0 if from_zero else room), high + room
        self._start, self._end = start, end

    def place(self, value: float) -> float:
        """Return where a value lies."""
        return self._start + (value - self._low) / (self._high - self._low) * (self._end - self._start)

    def ticks(self) -> list[float]:
        """Return round values inside the scale, about five."""
        rough = (self._high - self._low) / _TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
        first = math.ceil(self._low / step)
        return [number * step for number in range(first, math.floor(self._high / step) + 1)]


def _vertical(value: float, x: float) -> str:
    line = f'<path class="grid" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>'
    return line + _label(f"{value:g}", x, HEIGHT - BOTTOM + 18, anchor="middle")


def _horizontal(value: float, y: float) -> str:
    line = f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
    return line + _label(f"{value:.4g}", LEFT - 8, y + 4, anchor="end")


def _label(text: str, x: float, y: float, *, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
