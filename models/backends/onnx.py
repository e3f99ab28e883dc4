"""ONNX graphs on ONNX Runtime, from bytes that we opened ourselves."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from typing import Any, Final

import onnxruntime as ort
from numpy.typing import NDArray

from models.artifact import Artifact
from models.backends.external import external_files
from models.backends.face import Tensors, TensorSpec
from models.errors import ModelError

MAX_GRAPH_BYTES: Final = (2 << 30) - 1
"""Protocol buffers end here; larger models keep their weights outside the graph."""

_PROVIDERS: Final = ["CPUExecutionProvider"]
_DTYPES: Final = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(int8)": "int8",
    "tensor(int16)": "int16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(uint8)": "uint8",
    "tensor(uint16)": "uint16",
    "tensor(uint32)": "uint32",
    "tensor(uint64)": "uint64",
    "tensor(bool)": "bool",
    "tensor(string)": "object",
}


class OnnxBackend:
    """One inference session; `outputs` and `inputs` are the graph's."""

    def __init__(self, graph: bytes, external: Mapping[str, bytes | mmap.mmap], *, threads: int) -> None:
        # Nothing leaves a box but what its owner sends.
        ort.disable_telemetry_events()
        ort.set_default_logger_severity(3)
        options = _options(threads)
        if external:
            buffers = [memoryview(data) for data in external.values()]
            sizes = [len(data) for data in external.values()]
            options.add_external_initializers_from_files_in_memory(list(external), buffers, sizes)
        try:
            self._session = ort.InferenceSession(graph, sess_options=options, providers=_PROVIDERS)
        except Exception as error:  # the runtime's exceptions share no base class
            raise ModelError(f"ONNX Runtime refuses the graph: {_first_line(error)}") from error
        self.inputs = [_spec(node) for node in self._session.get_inputs()]
        self.outputs = [_spec(node) for node in self._session.get_outputs()]
        self._names = [spec.name for spec in self.outputs]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Tensors:
        """Run the graph once; raises ModelError."""
        try:
            results = self._session.run(self._names, dict(feeds))
        except Exception as error:  # the runtime's exceptions share no base class
            raise ModelError(f"ONNX Runtime: {_first_line(error)}") from error
        return dict(zip(self._names, results, strict=True))

    def close(self) -> None:
        """Free the session's memory."""
        del self._session


def open_backend(artifact: Artifact, *, threads: int) -> OnnxBackend:
    """Open the artifact's graph, with the weights that it keeps in other files of the same artifact."""
    path = artifact.named("model.onnx", "onnx/model.onnx", suffix=".onnx")
    graph = artifact.read(path, MAX_GRAPH_BYTES)
    beside = path[: path.rfind("/") + 1]
    external = {name: artifact.map(beside + name) for name in sorted(external_files(graph))}
    return OnnxBackend(graph, external, threads=threads)


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    # A box has other work for its cores than waiting for the next batch.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    return options


def _spec(node: ort.NodeArg) -> TensorSpec:
    if node.type not in _DTYPES:
        raise ModelError(f"{node.name}: {node.type} cannot be given or read here")
    shape = tuple(size if isinstance(size, int) and size >= 0 else None for size in node.shape)
    return TensorSpec(name=node.name, dtype=_DTYPES[node.type], shape=shape)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
