"""What commands say to people: answers as text, tables. Pure: no I/O, no clock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec


def text_of(value: Any) -> str:
    """Return the text in an answer's JSON, where its form has one; else its outputs as JSON."""
    match value:
        case {"choices": [{"delta": dict(delta)}, *_]}:
            return str(delta.get("content") or "")
        case (
            {"choices": [{"message": {"content": str(text)}}, *_]}
            | {"outputs": {"generated_text": str(text)}}
            | {"error": str(text)}
        ):
            return text
        case {"outputs": outputs}:
            return msgspec.json.encode(outputs).decode()
        case {"error": {"code": code, "message": message}}:
            return f"{code}: {message}"
    return msgspec.json.encode(value).decode()


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return lines with even columns; what is a number stands to the right."""
    cells = [list(heads), *map(list, rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(heads))]
    right = [bool(rows) and all(_is_figure(row[at]) for row in rows) for at in range(len(heads))]
    lines = (
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        )
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def _is_figure(text: str) -> bool:
    return text in {"", "-"} or text[0].isdigit() or (text[0] == "-" and text[1:2].isdigit())
