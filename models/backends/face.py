"""What every backend looks like to a task: named tensors in, named tensors out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import msgspec
from numpy.typing import NDArray

Tensors = dict[str, NDArray[Any]]

CARRIED: Final = frozenset(
    {
        "bool",
        "float16",
        "float32",
        "float64",
        "int16",
        "int32",
        "int64",
        "int8",
        "object",
        "uint16",
        "uint32",
        "uint64",
        "uint8",
    }
)
"""numpy's names for the types that requests and answers can carry; `object` holds strings."""


class TensorSpec(msgspec.Struct, frozen=True):
    """One input or output of a graph, a free dimension is None.

    `dtype` is numpy's name for its type, or the runtime's word for what is no tensor of numpy's.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]


class Backend(Protocol):
    """A graph opened on a runtime. `run` raises ModelError when the runtime refuses or fails."""

    @property
    def inputs(self) -> Sequence[TensorSpec]:
        """What the graph takes."""

    @property
    def outputs(self) -> Sequence[TensorSpec]:
        """What the graph gives."""

    @property
    def fallbacks(self) -> Sequence[str]:
        """Which of the owner's accelerators the graph was opened without, and why, in a few words each."""

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Tensors:
        """Run the graph once; `feeds` names every input."""

    def close(self) -> None:
        """Free the graph's memory."""
