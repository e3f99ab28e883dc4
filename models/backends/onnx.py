"""ONNX graphs on ONNX Runtime: the graph from bytes that we opened ourselves, its weights mapped from their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from models.artifact import Artifact
from models.backend_settings import OnnxSettings, option_texts
from models.backends.external import external_files
from models.backends.face import Tensors, TensorSpec
from models.errors import ModelError

MAX_GRAPH_BYTES: Final = (2 << 30) - 1
"""Protocol buffers end here; larger models keep their weights outside the graph."""

_PROCESSOR: Final = "cpu"
_SUFFIX: Final = "ExecutionProvider"
_WEIGHTS_FOLDER: Final = "session.model_external_initializers_file_folder_path"
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

_MAPS: Final = frozenset({"seq(map(int64,tensor(float)))", "seq(map(string,tensor(float)))"})
"""What scikit-learn's converter makes of probabilities unless it is told not to (ZipMap)."""

Provider = tuple[str, dict[str, str]]


class OnnxBackend:
    """One inference session; `inputs` and `outputs` are the graph's, `fallbacks` the providers that it has not got."""

    def __init__(
        self, graph: bytes, *, threads: int, weights: Path | None = None, settings: OnnxSettings | None = None
    ) -> None:
        settings = settings or OnnxSettings()
        # Nothing leaves a box but what its owner sends.
        ort.disable_telemetry_events()
        # Errors are raised; only why an accelerator does not start stands in the log alone.
        ort.set_default_logger_severity(3 if settings.providers else 4)
        options = _options(threads)
        if weights is not None:
            options.add_session_config_entry(_WEIGHTS_FOLDER, str(weights))
        self._session, self.fallbacks = _open(graph, options, settings)
        try:
            self.inputs = [_spec(node) for node in self._session.get_inputs()]
            self.outputs = [_spec(node) for node in self._session.get_outputs()]
        except ValueError as error:
            raise ModelError("the graph has an input or output whose name is no text") from error
        self._names = [spec.name for spec in self.outputs]

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Tensors:
        """Run the graph once; raises ModelError."""
        try:
            results = self._session.run(self._names, dict(feeds))
        except Exception as error:  # the runtime's exceptions share no base class
            raise ModelError(f"ONNX Runtime: {_first_line(error)}") from error
        return {name: _tabled(result) for name, result in zip(self._names, results, strict=True)}

    def close(self) -> None:
        """Free the session's memory."""
        del self._session


def open_backend(
    artifact: Artifact, *, threads: int, settings: OnnxSettings | None = None, graph: str | None = None
) -> OnnxBackend:
    """Open a graph (the artifact's only one, or the file named) with the weights that lie in files beside it."""
    path = graph or artifact.named("model.onnx", "onnx/model.onnx", suffix=".onnx")
    data = artifact.read(path, MAX_GRAPH_BYTES)
    beside = path[: path.rfind("/") + 1]
    names = external_files(data)
    # ONNX Runtime maps weights that it opens itself and copies what it is handed, so each file is checked here and
    # opened there; nobody but the owner of the box can change the folder in between.
    for name in sorted(names):
        artifact.check(beside + name)
    weights = artifact.folder / beside if names else None
    return OnnxBackend(data, threads=threads, weights=weights, settings=settings)


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    # A box has other work for its cores than waiting for the next batch.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    # The arena keeps the most that any shape has ever needed, and gains nothing over malloc on the processor.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    return options


def _open(
    graph: bytes, options: ort.SessionOptions, settings: OnnxSettings
) -> tuple[ort.InferenceSession, Sequence[str]]:
    """Open the graph with the first of the preferred providers that takes it; return also why others were passed."""
    wanted, passed = _available(settings)
    while True:
        providers = [*wanted, (_full_name(_PROCESSOR), option_texts(settings.options.get(_PROCESSOR, {})))]
        try:
            # Its own way to fall back prints to the terminal and tells nobody else.
            session = ort.InferenceSession(graph, options, providers=providers, enable_fallback=0)
        except Exception as error:  # the runtime's exceptions share no base class
            if not wanted:
                raise ModelError(f"ONNX Runtime refuses the graph: {_first_line(error)}") from error
            passed.append(f"{_short_name(wanted.pop(0)[0])}: {_first_line(error)}")
        else:
            session._model_bytes = None  # noqa: SLF001 - it would keep a second copy of the model for as long as it lives
            return session, passed + _missing(wanted, session)


def _available(settings: OnnxSettings) -> tuple[list[Provider], list[str]]:
    """Return the wanted providers before the processor that this build has, and a note on each that it has not."""
    built = {_short_name(name): name for name in ort.get_available_providers()}
    chosen: list[Provider] = []
    passed: list[str] = []
    for name in settings.providers:
        if name == _PROCESSOR:
            break
        if name in built:
            chosen.append((built[name], option_texts(settings.options.get(name, {}))))
        else:
            passed.append(f"{name}: this ONNX Runtime ({ort.__version__}) is built without it")
    return chosen, passed


def _missing(wanted: Sequence[Provider], session: ort.InferenceSession) -> list[str]:
    """Return a note on each provider that the session left out though it was opened with it."""
    used = session.get_providers()
    return [
        f"{_short_name(name)}: it could not be started; ONNX Runtime's log line above says why"
        for name, _ in wanted
        if name not in used
    ]


def _full_name(name: str) -> str:
    """Return the name by which ONNX Runtime knows the processor and its like."""
    return name.upper() + _SUFFIX


def _short_name(name: str) -> str:
    return name.removesuffix(_SUFFIX).lower()


def _spec(node: ort.NodeArg) -> TensorSpec:
    """Return a node's description; what is no tensor of numpy's keeps the runtime's own word for its type."""
    shape = tuple(size if isinstance(size, int) and size >= 0 else None for size in node.shape or ())
    if node.type in _MAPS:
        return TensorSpec(name=node.name, dtype="float32", shape=(None, None))
    return TensorSpec(name=node.name, dtype=_DTYPES.get(node.type, node.type), shape=shape)


def _tabled(result: Any) -> Any:
    """Return the probabilities that scikit-learn's converter gives by class as a table, in the order of classes."""
    if not isinstance(result, list) or not result or not isinstance(result[0], dict):
        return result
    return np.asarray([list(row.values()) for row in result], np.float32)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
