"""Reads what memory the box and the service's limit leave; files of /proc and /sys, so not for the event loop."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from agent.admission import Memory, group_folders, limit_free_mb, parse_kb, stalled_percent

GROUP_FILES: Final = (
    "memory.max",
    "memory.current",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    "memory.stat",
)


def read_memory(root: Path = Path("/")) -> Memory:
    """Return the box's memory now; a file that a kernel does not have counts as no bound."""
    proc = root / "proc"
    figures = parse_kb(_text(proc / "meminfo"), ("MemTotal", "MemAvailable"))
    return Memory(
        total_mb=figures["MemTotal"],
        free_mb=figures["MemAvailable"],
        limit_free_mb=_limit_free_mb(root),
        stalled_percent=stalled_percent(_text(proc / "pressure" / "memory")),
    )


def _limit_free_mb(root: Path) -> float | None:
    """Return what the tightest of the limits around this process leaves free, in MiB."""
    own, mounts = _text(root / "proc" / "self" / "cgroup"), _text(root / "proc" / "self" / "mountinfo")
    free = [
        limit_free_mb(version, {name: _text(root / folder.lstrip("/") / name) for name in GROUP_FILES})
        for folder, version in group_folders(own, mounts)
    ]
    return min((mb for mb in free if mb is not None), default=None)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""
