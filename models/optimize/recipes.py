"""What can be done to a graph, by name. Pure: no I/O, no clock."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from models.errors import ModelError

STEPS: Final = {
    "graph": "operators joined offline by ONNX Runtime",
    "int8-dynamic": "weights in 8 bits, activations by each request",
    "int8-static": "weights and activations in 8 bits, ranges from the calibration set",
    "int4": "weights of matrix products in 4 bits, in blocks of 32",
    "float16": "weights and arithmetic in 16 bits, for accelerators; inputs and outputs stay as they were",
    "pruned": "the smallest weights set to zero; `pruned-30` is 30 %, `pruned` half",
}
"""What each step does, for people and for the manifest."""

DEFAULT_PRUNED_PERCENT: Final = 50

_PRUNED: Final = re.compile(r"pruned(?:-([1-9]\d?))?")


def parse_recipe(text: str) -> list[str]:
    """Return the steps of `pruned-30+int8-dynamic`, in order; raises ModelError naming one that is not known."""
    steps = text.split("+")
    for step in steps:
        if step not in STEPS and pruned_percent(step) is None:
            raise ModelError(f"{step!r} is none of {', '.join(STEPS)}, nor several joined by +")
    return steps


def pruned_percent(step: str) -> int | None:
    """Return how many percent of the weights a step prunes; None for another step."""
    match = _PRUNED.fullmatch(step)
    return None if match is None else int(match[1] or DEFAULT_PRUNED_PERCENT)


def needs_calibration(recipe: Sequence[str]) -> bool:
    """Whether a recipe asks for examples of what the graph is fed."""
    return "int8-static" in recipe
