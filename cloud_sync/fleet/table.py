"""Figures side by side, for a terminal. Pure: no I/O, no clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

_MEBIBYTE: Final = 1 << 20


def variants_table(variants: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the lines of a table with a row for each variant and a column for each figure."""
    columns = list(dict.fromkeys(name for figures in variants.values() for name in figures))
    rows = [["variant", *(_head(column) for column in columns)]]
    rows += [[name, *(_cell(column, figures.get(column)) for column in columns)] for name, figures in variants.items()]
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return [_line(row, widths) for row in rows]


def _head(column: str) -> str:
    return "MiB" if column == "bytes" else column.replace("_", " ")


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if column == "bytes":
        return f"{value / _MEBIBYTE:.1f}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = row
    cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
    return "  ".join(cells).rstrip()
