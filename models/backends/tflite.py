"""TensorFlow Lite graphs on LiteRT, or on tflite-runtime where LiteRT is not installed.

Quantised inputs and outputs are numbers with a scale and a zero point; tasks see them as the float32 they stand for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.artifact import Artifact
from models.backends.face import Tensors, TensorSpec
from models.errors import ModelError

try:
    from ai_edge_litert.interpreter import Interpreter
except ImportError:
    from tflite_runtime.interpreter import Interpreter

MAX_GRAPH_BYTES: Final = (2 << 30) - 1
"""Flat buffers end here."""


class _Slot(msgspec.Struct, frozen=True):
    """One input or output of the interpreter; `scale` 0 means that it is not quantised."""

    index: int
    dtype: Any
    scale: float
    zero: int
    spec: TensorSpec


class TfliteBackend:
    """One interpreter; it runs in one thread at a time."""

    def __init__(self, graph: bytes, *, threads: int) -> None:
        try:
            self._interpreter = Interpreter(model_content=graph, num_threads=threads)
            self._interpreter.allocate_tensors()
        except Exception as error:  # the runtime raises whatever its C++ side meets
            raise ModelError(f"LiteRT refuses the graph: {str(error)[:300]}") from error
        self._entering = [_slot(detail) for detail in self._interpreter.get_input_details()]
        self._leaving = [_slot(detail) for detail in self._interpreter.get_output_details()]
        self.inputs = [slot.spec for slot in self._entering]
        self.outputs = [slot.spec for slot in self._leaving]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Tensors:
        """Run the graph once; raises ModelError."""
        try:
            self._resize(feeds)
            for slot in self._entering:
                self._interpreter.set_tensor(slot.index, _quantise(feeds[slot.spec.name], slot))
            self._interpreter.invoke()
            return {slot.spec.name: _restore(self._interpreter.get_tensor(slot.index), slot) for slot in self._leaving}
        except Exception as error:  # as above
            raise ModelError(f"LiteRT: {str(error)[:300]}") from error

    def close(self) -> None:
        """Free the interpreter's memory."""
        del self._interpreter

    def _resize(self, feeds: Mapping[str, NDArray[Any]]) -> None:
        """Give the interpreter this run's shapes where they are not those of the run before."""
        changed = False
        details = self._interpreter.get_input_details()
        for slot, detail in zip(self._entering, details, strict=True):
            shape = feeds[slot.spec.name].shape
            if tuple(detail["shape"]) != shape:
                self._interpreter.resize_tensor_input(slot.index, list(shape), strict=True)
                changed = True
        if changed:
            self._interpreter.allocate_tensors()


def open_backend(artifact: Artifact, *, threads: int) -> TfliteBackend:
    """Open the artifact's graph."""
    graph = artifact.read(artifact.named("model.tflite", suffix=".tflite"), MAX_GRAPH_BYTES)
    return TfliteBackend(graph, threads=threads)


def _slot(detail: Mapping[str, Any]) -> _Slot:
    dtype = np.dtype(detail["dtype"])
    scale, zero = detail["quantization"]
    if len(detail["quantization_parameters"]["scales"]) > 1:
        raise ModelError(f"{detail['name']}: an input or output quantised by channel cannot be read here")
    shape = tuple(int(size) if size > 0 else None for size in detail["shape_signature"])
    name = "float32" if scale else ("object" if dtype.kind in "SU" else dtype.name)
    return _Slot(detail["index"], dtype, float(scale), int(zero), TensorSpec(detail["name"], name, shape))


def _quantise(values: NDArray[Any], slot: _Slot) -> NDArray[Any]:
    if not slot.scale:
        return values
    bounds = np.iinfo(slot.dtype)
    return np.clip(np.round(values / slot.scale) + slot.zero, bounds.min, bounds.max).astype(slot.dtype)


def _restore(values: NDArray[Any], slot: _Slot) -> NDArray[Any]:
    """Return a copy, since the interpreter overwrites its own at the next run."""
    if not slot.scale:
        return values.copy()
    return (values.astype(np.float32) - slot.zero) * np.float32(slot.scale)
