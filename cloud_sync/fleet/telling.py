"""What a command found or did, as lines for people. Pure: no I/O, no clock."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from cloud_sync.deployment import WHOLE_SHARE
from cloud_sync.fleet.table import variants_table


def lines_of(report: Mapping[str, Any], indent: str = "") -> list[str]:
    """Return a report line by line: what is empty is left out, a share is told in percent."""
    lines: list[str] = []
    for name, item in report.items():
        if item in ({}, [], ""):
            continue
        if name == "variants" and item and all("p95_ms" in figures for figures in item.values()):
            lines += ["", *variants_table(item), ""]
            continue
        if isinstance(item, dict):
            lines += [f"{indent}{name}:", *lines_of(item, indent + "  ")]
        else:
            lines.append(f"{indent}{name}: {_text(name, item)}")
    return lines


def _text(name: str, item: object) -> str:
    if name == "share" and isinstance(item, int):
        return f"{item * 100 / WHOLE_SHARE:g} %"
    return item if isinstance(item, str) else msgspec.json.encode(item).decode()
