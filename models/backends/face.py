"""What every backend looks like to a task: named tensors in, named tensors out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec
from numpy.typing import NDArray

Tensors = dict[str, NDArray[Any]]


class TensorSpec(msgspec.Struct, frozen=True):
    """One input or output of a graph; `dtype` is numpy's name for it, a free dimension is None."""

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

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Tensors:
        """Run the graph once; `feeds` names every input."""

    def close(self) -> None:
        """Free the graph's memory."""
