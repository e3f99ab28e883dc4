"""Whether a measured variant may be published. Pure: no I/O, no clock."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from cloud_sync.fleet.description import Gate
from models.accuracy import ERRORS, IN_UNITS, drop
from models.evaluate import judge_cost
from models.manifest import Budget


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """What a variant scored and what it cost here; `failed` counts questions that it had no answer for."""

    name: str
    bytes: int
    scores: dict[str, float]
    samples: int
    failed: int
    p50_ms: float
    p95_ms: float
    cpu_ms: float
    open_ms: float
    memory_mb: float


def refusals(judged: Sequence[Judged], gate: Gate, budget: Budget) -> dict[str, list[str]]:
    """Return what is wrong with each variant that may not be published, every problem with its figure."""
    problems = {one.name: _problems(one, judged[0], gate, budget) for one in judged}
    return {name: found for name, found in problems.items() if found}


def _problems(one: Judged, first: Judged, gate: Gate, budget: Budget) -> list[str]:
    found = judge_cost(budget, one.p95_ms, one.memory_mb)
    if one.failed:
        found.append(f"{one.failed} of {one.samples} samples had no answer")
    for measure, bound in gate.least.items():
        if measure not in one.scores:
            found.append(f"gate.least.{measure}: is not measured; there is {', '.join(one.scores)}")
        elif (one.scores[measure] > bound) if measure in ERRORS else (one.scores[measure] < bound):
            side = "over" if measure in ERRORS else "under"
            found.append(f"gate.least.{measure}: {one.scores[measure]:.4g} is {side} {bound:g}")
    if gate.max_drop is not None:
        found += _fallen(one, first, gate.max_drop)
    return found


def _fallen(one: Judged, first: Judged, most: float) -> list[str]:
    measure = next(iter(first.scores))
    lost = drop(measure, one.scores[measure], first.scores[measure])
    if lost <= most:
        return []
    how = f"{lost:.1%} worse" if measure in IN_UNITS else f"{lost:.4f} worse"
    against = f"{first.scores[measure]:.4g} of {first.name}"
    return [f"gate.max_drop: {measure} {one.scores[measure]:.4g} is {how} than the {against}, over {most:g}"]
