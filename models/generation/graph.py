"""A decoder's graph on ONNX Runtime: its inputs and outputs by role, and runs over buffers that the caller owns.

Two kinds are known. Graphs of onnxruntime-genai's model builder (and of transformers.js since its version 3) attend
with GroupQueryAttention: the cache of each row stands from its first place on, the row's length is the sum of its
attention mask, and new keys and values are written in place where past and present are one buffer. Graphs that Optimum
exports give the whole cache out again, one place longer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

import msgspec
import numpy as np
import onnxruntime as ort
from numpy.typing import DTypeLike, NDArray

from models.artifact import Artifact
from models.backends.external import external_files
from models.errors import ModelError
from models.generation.last_logits import with_last_logits
from models.generation.layout import Layout

MAX_GRAPH_BYTES: Final = (2 << 30) - 1
"""Protocol buffers end here; larger models keep their weights outside the graph."""

_DTYPES: Final[dict[str, DTypeLike]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_INTEGERS: Final[dict[str, DTypeLike]] = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
_PAST: Final = re.compile(r"past_key_values\.(\d+)\.(key|value)")
# A node's field op_type (number 4) in the wire format, and its length.
_IN_PLACE: Final = b"\x22\x13GroupQueryAttention"
_KNOWN: Final = ("input_ids", "attention_mask", "position_ids", "use_cache_branch", "num_logits_to_keep")


class CacheShape(msgspec.Struct, frozen=True):
    """One token's place in the cache: `tensors` of (`heads`, `size`) numbers, a key and a value for each layer."""

    tensors: int
    heads: int
    size: int
    dtype: np.dtype[Any]

    @property
    def token_bytes(self) -> int:
        """What one token takes."""
        return self.tensors * self.heads * self.size * self.dtype.itemsize


class DecoderGraph:
    """A decoder opened; `past` and `present` name the cache's tensors in the same order. Raises ModelError."""

    def __init__(self, artifact: Artifact, layout: Layout, *, threads: int) -> None:
        data = artifact.read(layout.graph, MAX_GRAPH_BYTES)
        self.in_place: Final = _IN_PLACE in data
        shortened = with_last_logits(data)
        self._session = _open(shortened or data, artifact, layout.graph, threads)
        inputs = {node.name: node for node in self._session.get_inputs()}
        outputs = {node.name: node for node in self._session.get_outputs()}
        self.past: Final = [name for name in inputs if _PAST.fullmatch(name)]
        self.present: Final = [name.replace("past_key_values.", "present.") for name in self.past]
        _check_names(inputs, outputs, self.past, self.present)
        self.takes: Final = frozenset(inputs) - set(self.past)
        self.integers: Final = {name: np.dtype(_INTEGERS[inputs[name].type]) for name in self.takes & _whole(inputs)}
        self.shape: Final = _cache_shape(inputs[self.past[0]], len(self.past), layout)
        self.vocabulary: Final = _vocabulary(outputs["logits"], layout)
        self.logits_dtype: Final = np.dtype(_DTYPES[outputs["logits"].type])
        self.keeps_last: Final = shortened is not None or "num_logits_to_keep" in self.takes

    def binding(self) -> Any:
        """Return a new binding of this graph's names."""
        return self._session.io_binding()

    def run_bound(self, binding: Any) -> None:
        """Run on what is bound; raises ModelError."""
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # the runtime's exceptions share no base class
            raise ModelError(f"ONNX Runtime: {_first_line(error)}") from error

    def run(self, feeds: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Return logits and then the cache; raises ModelError."""
        try:
            results: list[NDArray[Any]] = self._session.run(["logits", *self.present], feeds)
        except Exception as error:  # as above
            raise ModelError(f"ONNX Runtime: {_first_line(error)}") from error
        return results

    def extras(self, *, past: int) -> dict[str, NDArray[Any]]:
        """Return the inputs beside tokens, mask and places; `past` tokens are in the cache."""
        extras: dict[str, NDArray[Any]] = {}
        if "use_cache_branch" in self.takes:
            extras["use_cache_branch"] = np.array([past > 0])
        if "num_logits_to_keep" in self.takes:
            extras["num_logits_to_keep"] = np.array(1, dtype=self.integers["num_logits_to_keep"])
        return extras


def _open(data: bytes, artifact: Artifact, path: str, threads: int) -> ort.InferenceSession:
    # Nothing leaves a box but what its owner sends.
    ort.disable_telemetry_events()
    ort.set_default_logger_severity(3)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    # What fails is raised as an error too.
    options.log_severity_level = 4
    # A box has other work for its cores than waiting for the next step.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    beside = path[: path.rfind("/") + 1]
    names = sorted(external_files(data))
    for name in names:
        artifact.check(beside + name)
    if names:
        folder = str(artifact.folder / beside)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    try:
        return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's exceptions share no base class
        raise ModelError(f"ONNX Runtime refuses the graph: {_first_line(error)}") from error


def _check_names(inputs: dict[str, Any], outputs: dict[str, Any], past: Sequence[str], present: Sequence[str]) -> None:
    """Raise for a graph that is no decoder with a cache, or takes what nobody here could give."""
    if unknown := sorted(set(inputs) - set(past) - set(_KNOWN)):
        raise ModelError(f"the decoder's input {unknown[0]!r} is not one that can be given here")
    if not past or "input_ids" not in inputs or "attention_mask" not in inputs:
        raise ModelError("the graph is no decoder with a cache: it needs input_ids, attention_mask, past_key_values.*")
    if lacking := [name for name in ("logits", *present) if name not in outputs]:
        raise ModelError(f"the decoder has no output {lacking[0]!r}")


def _whole(inputs: dict[str, Any]) -> set[str]:
    return {name for name, node in inputs.items() if node.type in _INTEGERS}


def _cache_shape(node: Any, tensors: int, layout: Layout) -> CacheShape:
    """Return the cache's shape, from the graph where it says it, else from the model's configuration."""
    sizes = [size if isinstance(size, int) and size > 0 else 0 for size in node.shape]
    if len(sizes) != 4 or node.type not in _DTYPES:
        raise ModelError(f"{node.name}: expected a cache of float32 or float16 in four dimensions")
    heads, size = sizes[1] or layout.heads, sizes[3] or layout.head_size
    if not heads or not size:
        raise ModelError(f"{node.name}: neither the graph nor the configuration says its heads and their size")
    return CacheShape(tensors, heads, size, np.dtype(_DTYPES[node.type]))


def _vocabulary(node: Any, layout: Layout) -> int:
    """Return how many tokens the logits are for, from the graph where it says it, else from the configuration."""
    if node.type not in _DTYPES or len(node.shape) != 3:
        raise ModelError("the decoder's logits are not float32 or float16 in three dimensions")
    size = node.shape[-1] if isinstance(node.shape[-1], int) else layout.vocabulary
    if size < 1:
        raise ModelError("logits: neither the graph nor the configuration says the vocabulary's size")
    return int(size)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
