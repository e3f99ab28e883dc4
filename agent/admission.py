"""Which models may be in memory together: what one needs, what is free, who makes room. Pure: no I/O, no clock.

A model is loaded only where the most that it is known to hold fits into what is free beyond a reserve, so that loading
neither swaps nor kills. Where it does not, models that have been idle longest are unloaded for it, as few as will do;
where even that is not enough, nothing is unloaded and the load is put off.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec

IDLE_S: Final = 30.0
"""A model that was asked or loaded a shorter while ago is not unloaded for another, so that two do not chase round."""
RESERVE_SHARE: Final = 0.05
RESERVE_MB: Final = 64.0
MAX_RESERVE_MB: Final = 1024.0
MEASURED_FACTOR: Final = 1.1
FILES_FACTOR: Final = 2.5
RUNTIME_MB: Final = 64.0
STALL_PERCENT: Final = 10.0
"""Share of time in which everything waits for memory (PSI `full`), from which on nothing more is loaded."""
LEAK_FACTOR: Final = 1.5
LEAK_MB: Final = 64.0
UNKNOWN_FACTOR: Final = 3.0
UNKNOWN_MB: Final = 256.0
"""Wider where no budget is named: what golden samples need says little of the largest input."""
MAX_THREADS: Final = 256


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """What the box has, in MiB: `free_mb` can be had without swapping, `limit_free_mb` is left of the service's limit.

    None is no limit. `stalled_percent` of the last 10 s everything waited for memory.
    """

    total_mb: float
    free_mb: float
    limit_free_mb: float | None = None
    stalled_percent: float = 0.0


class Held(msgspec.Struct, frozen=True):
    """A loaded model: what it holds, how long it has been idle, and whether it may be unloaded at all now."""

    name: str
    mb: float
    idle_s: float
    movable: bool = True


class Plan(msgspec.Struct, frozen=True):
    """What is to be unloaded before the load; `short_mb` more than 0: it does not fit, whatever is unloaded."""

    unload: list[str] = []
    short_mb: float = 0.0
    why: str = ""


def needed_mb(*, measured_mb: float, budget_mb: float, files_mb: float) -> float:
    """Return what a version will hold at its most: as measured here before, else its budget, else by its files."""
    if measured_mb > 0:
        return measured_mb * MEASURED_FACTOR
    return budget_mb or files_mb * FILES_FACTOR + RUNTIME_MB


def leak_bound_mb(*, measured_mb: float, budget_mb: float) -> float:
    """Return how much a worker may hold of its own before a fresh one takes its place; 0 where nothing is known."""
    if budget_mb:
        return budget_mb * LEAK_FACTOR + LEAK_MB
    return measured_mb * UNKNOWN_FACTOR + UNKNOWN_MB if measured_mb else 0.0


def usable_mb(memory: Memory, promised_mb: float = 0.0) -> float:
    """Return what a load may take, beyond the reserve and what loads under way will take."""
    reserve_mb = min(MAX_RESERVE_MB, max(RESERVE_MB, memory.total_mb * RESERVE_SHARE))
    free_mb = memory.free_mb - reserve_mb
    if memory.limit_free_mb is not None:
        free_mb = min(free_mb, memory.limit_free_mb - min(reserve_mb, RESERVE_MB))
    return free_mb - promised_mb


def plan_load(need_mb: float, memory: Memory, held: Sequence[Held], *, promised_mb: float = 0.0) -> Plan:
    """Return what makes room for a load of `need_mb`: the longest idle first, and none where all would not do."""
    free_mb = usable_mb(memory, promised_mb)
    if memory.stalled_percent >= STALL_PERCENT:
        return Plan(short_mb=need_mb, why=f"the box waits for memory {memory.stalled_percent:.0f} % of the time")
    unload: list[str] = []
    for one in sorted(held, key=lambda held: held.idle_s, reverse=True):
        if free_mb >= need_mb:
            break
        if one.movable and one.idle_s >= IDLE_S:
            unload.append(one.name)
            free_mb += one.mb
    if free_mb >= need_mb:
        return Plan(unload=unload)
    return Plan(short_mb=need_mb - free_mb, why=f"it needs {need_mb:.0f} MiB and {max(0.0, free_mb):.0f} can be had")


def parse_kb(text: str, names: Iterable[str]) -> dict[str, float]:
    """Return the named members of /proc/meminfo or /proc/PID/status (`Name: 12 kB`), in MiB; what is absent is 0."""
    wanted = dict.fromkeys(names, 0.0)
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        if name in wanted and rest.split():
            wanted[name] = int(rest.split()[0]) / 1024
    return wanted


def stalled_percent(pressure: str) -> float:
    """Return `full avg10` of /proc/pressure/memory; 0 for a kernel that does not tell."""
    for line in pressure.splitlines():
        kind, *figures = line.split()
        if kind == "full" and figures and figures[0].startswith("avg10="):
            return float(figures[0].removeprefix("avg10="))
    return 0.0


def group_folders(own: str, mounts: str) -> list[tuple[str, int]]:
    """Return the folders whose limits hold a process, inmost first, each with its cgroup version (1 or 2).

    `own` is /proc/self/cgroup, `mounts` /proc/self/mountinfo.
    """
    points = _group_mounts(mounts)
    folders: list[tuple[str, int]] = []
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        version = 2 if not controllers else 1
        if version == 1 and "memory" not in controllers.split(","):
            continue
        point, root = points.get(version, ("", ""))
        if point:
            inside = path.removeprefix(root) if root != "/" else path
            parts = [part for part in inside.split("/") if part and part != ".."]
            folders += [("/".join([point, *parts[:depth]]), version) for depth in range(len(parts), -1, -1)]
    return folders


def limit_free_mb(version: int, files: Mapping[str, str]) -> float | None:
    """Return what a cgroup leaves free, in MiB, caches that the kernel would give back included; None: no limit."""
    limit, usage, cached = (
        ("memory.max", "memory.current", "inactive_file")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    )
    bound = files.get(limit, "").strip()
    if not bound.isdecimal() or int(bound) >= 1 << 60:
        return None
    used = files.get(usage, "").strip()
    stat = dict(line.split() for line in files.get("memory.stat", "").splitlines() if len(line.split()) == 2)
    return (int(bound) - (int(used) if used.isdecimal() else 0) + int(stat.get(cached, 0))) / (1 << 20)


def _group_mounts(mounts: str) -> dict[int, tuple[str, str]]:
    """Return where cgroups are mounted: version to (mount point, root within the hierarchy)."""
    found: dict[int, tuple[str, str]] = {}
    for line in mounts.splitlines():
        head, _, tail = line.partition(" - ")
        fields, kind = head.split(), tail.split()
        if kind[:1] == ["cgroup2"]:
            found[2] = (fields[4], fields[3])
        elif kind[:1] == ["cgroup"] and "memory" in kind[-1].split(","):
            found[1] = (fields[4], fields[3])
    return found
