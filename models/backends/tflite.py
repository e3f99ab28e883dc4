"""TensorFlow Lite graphs on LiteRT, or on tflite-runtime where LiteRT is not installed.

Quantised inputs and outputs are numbers with a scale and a zero point; tasks see them as the float32 they stand for.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.artifact import Artifact
from models.backend_settings import Delegate, TfliteSettings, option_texts
from models.backends.face import Tensors, TensorSpec
from models.errors import ModelError

try:
    from ai_edge_litert.interpreter import Interpreter, OpResolverType, load_delegate
except ImportError:
    from tflite_runtime.interpreter import Interpreter, OpResolverType, load_delegate

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
    """One interpreter; it runs in one thread at a time. `fallbacks` says why delegates were left out."""

    def __init__(self, graph: str, *, threads: int, settings: TfliteSettings | None = None) -> None:
        settings = settings or TfliteSettings()
        self.fallbacks: list[str] = []
        delegates = [made for delegate in settings.delegates if (made := self._delegate(delegate)) is not None]
        try:
            self._interpreter = _open(graph, threads, delegates, xnnpack=settings.xnnpack)
        except Exception as error:  # the runtime raises whatever its C++ side meets
            if not delegates:
                raise ModelError(f"LiteRT refuses the graph: {str(error)[:300]}") from error
            self.fallbacks.append(f"delegates: the graph does not open with them: {str(error)[:300]}")
            self._interpreter = _open_plain(graph, threads, xnnpack=settings.xnnpack)
        try:
            self._entering = [_slot(detail) for detail in self._interpreter.get_input_details()]
            self._leaving = [_slot(detail) for detail in self._interpreter.get_output_details()]
        except (AttributeError, TypeError, ValueError) as error:  # a name that is no text, a type that numpy has not
            raise ModelError(f"LiteRT: an input or output cannot be read: {str(error)[:300]}") from error
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

    def _delegate(self, delegate: Delegate) -> object | None:
        """Load a delegate; None, and a note why, where it cannot be."""
        try:
            ctypes.CDLL(delegate.library)  # LiteRT's own error for a library that does not load comes with a second one
            loaded: object = load_delegate(delegate.library, option_texts(delegate.options))
        except Exception as error:  # noqa: BLE001 - whatever the library and its loader meet
            self.fallbacks.append(f"{delegate.library}: {str(error)[:300]}")
            return None
        return loaded

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


def open_backend(
    artifact: Artifact, *, threads: int, settings: TfliteSettings | None = None, graph: str | None = None
) -> TfliteBackend:
    """Open a graph: the artifact's only one, or the file named."""
    path = graph or artifact.named("model.tflite", suffix=".tflite")
    # LiteRT maps a file that it opens itself, so it is checked here and opened there.
    artifact.check(path, MAX_GRAPH_BYTES)
    return TfliteBackend(str(artifact.folder / path), threads=threads, settings=settings)


def _open_plain(graph: str, threads: int, *, xnnpack: bool) -> Interpreter:
    """Open a graph without delegates; raises ModelError."""
    try:
        return _open(graph, threads, [], xnnpack=xnnpack)
    except Exception as error:  # the runtime raises whatever its C++ side meets
        raise ModelError(f"LiteRT refuses the graph: {str(error)[:300]}") from error


def _open(graph: str, threads: int, delegates: list[object], *, xnnpack: bool) -> Interpreter:
    kernels = OpResolverType.AUTO if xnnpack else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = Interpreter(
        model_path=graph,
        num_threads=threads,
        experimental_delegates=delegates or None,
        experimental_op_resolver_type=kernels,
    )
    interpreter.allocate_tensors()
    return interpreter


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
