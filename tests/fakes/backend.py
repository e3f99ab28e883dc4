"""An in-memory twin of a backend: a graph whose function is plain Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.backends.face import Tensors, TensorSpec
from models.errors import ModelError

Function = Callable[[Mapping[str, NDArray[Any]]], Tensors]


class MemoryBackend:
    """Checks feeds as a runtime would, counts its runs and computes with `function`."""

    fallbacks: Sequence[str] = ()

    def __init__(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], function: Function) -> None:
        self.inputs = list(inputs)
        self.outputs = list(outputs)
        self.batches: list[int] = []
        self.closed = False
        self._function = function

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Tensors:
        for spec in self.inputs:
            values = feeds[spec.name]
            fits = len(values.shape) == len(spec.shape) and all(
                want in {None, got} for want, got in zip(spec.shape, values.shape, strict=True)
            )
            if not fits or (values.dtype.name != spec.dtype):
                raise ModelError(f"{spec.name}: {values.dtype} {values.shape} is not {spec.dtype} {spec.shape}")
        self.batches.append(len(feeds[self.inputs[0].name]))
        return self._function(feeds)

    def close(self) -> None:
        self.closed = True


def summing(width: int = 2, *, poison: float = 666.0, crash: float = 777.0) -> MemoryBackend:
    """Return a graph that sums rows; a row with `poison` gives NaN, one with `crash` fails its whole batch."""

    def function(feeds: Mapping[str, NDArray[Any]]) -> Tensors:
        rows = feeds["features"]
        if (rows == crash).any():
            raise ModelError("index out of range")
        sums = rows.sum(axis=1, keepdims=True, dtype=np.float32)
        sums[(rows == poison).any(axis=1)] = np.nan
        return {"prediction": sums}

    return MemoryBackend(
        [TensorSpec("features", "float32", (None, width))], [TensorSpec("prediction", "float32", (None, 1))], function
    )
