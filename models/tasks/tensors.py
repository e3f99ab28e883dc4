"""tensors: any graph by the Open Inference Protocol v2 in JSON (https://github.com/kserve/open-inference-protocol)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.artifact import Artifact
from models.backends.face import Backend, Tensors, TensorSpec
from models.body import parse_failure, type_errors
from models.errors import RequestError
from models.manifest import Manifest
from models.request import Dialect, Request
from models.tasks.task import Prepared, TokenlessTask, check_finite

MAX_ELEMENTS: Final = 1 << 28
_DTYPES: Final = {
    "BOOL": "bool",
    "UINT8": "uint8",
    "UINT16": "uint16",
    "UINT32": "uint32",
    "UINT64": "uint64",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
    "BYTES": "object",
}
_DATATYPES: Final = {dtype: datatype for datatype, dtype in _DTYPES.items()}
_KINDS: Final = {"b": "b", "i": "iu", "u": "iu", "f": "iuf", "O": "U"}
"""numpy's kind of a tensor -> the kinds of JSON values that it takes."""


class _Tensor(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    data: list[Any]


class _Wanted(msgspec.Struct):
    name: str


class _Inference(msgspec.Struct):
    inputs: list[_Tensor]
    outputs: list[_Wanted] = []
    id: str | None = None


class _Options(msgspec.Struct, frozen=True):
    outputs: list[str]
    ident: str | None


_inference = msgspec.json.Decoder(_Inference)
_encoder = msgspec.json.Encoder()


class TensorsTask(TokenlessTask):
    """The graph's own inputs and outputs, by name; each request is one run."""

    def __init__(self, backend: Backend, name: str, version: str) -> None:
        self._backend = backend
        self._inputs = {spec.name: spec for spec in backend.inputs}
        self._outputs = [spec.name for spec in backend.outputs]
        self._head = {"model_name": name, "model_version": version}

    def prepare(self, request: Request) -> Prepared:
        """Check every tensor against the graph; raises RequestError that names it, what it takes and what came."""
        if request.dialect is not Dialect.OPEN_INFERENCE:
            raise RequestError("bad_request", "inputs: this model takes tensors with name, shape and datatype")
        try:
            asked = _inference.decode(request.body)
        except type_errors as error:
            raise parse_failure("body", error) from None
        options = _Options(outputs=self._wanted(asked.outputs), ident=asked.id)
        return Prepared(items=[self._feeds(asked.inputs)], options=options)

    def run(self, items: Sequence[Tensors]) -> list[Tensors]:
        """Run each request's tensors as they are."""
        return [self._backend.run(item) for item in items]

    def interpret(self, prepared: Prepared, results: Sequence[Tensors]) -> bytes:
        """Return the protocol's inference response."""
        options: _Options = prepared.options
        answer: dict[str, object] = dict(self._head)
        if options.ident is not None:
            answer["id"] = options.ident
        answer["outputs"] = [_render(name, results[0][name]) for name in options.outputs]
        return _encoder.encode(answer)

    def _wanted(self, outputs: Sequence[_Wanted]) -> list[str]:
        for at, output in enumerate(outputs):
            if output.name not in self._outputs:
                message = f"outputs[{at}].name: {output.name[:80]!r} is none of {', '.join(self._outputs)}"
                raise RequestError("bad_request", message)
        return [output.name for output in outputs] or self._outputs

    def _feeds(self, tensors: Sequence[_Tensor]) -> Tensors:
        feeds: Tensors = {}
        for at, tensor in enumerate(tensors):
            field = f"inputs[{at}]"
            if tensor.name not in self._inputs or tensor.name in feeds:
                message = f"{field}.name: {tensor.name[:80]!r} is unknown or twice; expected {', '.join(self._inputs)}"
                raise RequestError("bad_request", message)
            feeds[tensor.name] = _array(tensor, self._inputs[tensor.name], field)
        if missing := self._inputs.keys() - feeds.keys():
            raise RequestError("bad_request", f"inputs: {min(missing)!r} is missing")
        return feeds


def _array(tensor: _Tensor, spec: TensorSpec, field: str) -> NDArray[Any]:
    """Return a tensor's numbers in the graph's type and shape; raises RequestError."""
    expected = _DATATYPES[spec.dtype]
    if tensor.datatype != expected:
        raise RequestError("bad_request", f"{field}.datatype: expected {expected}, got {tensor.datatype[:40]!r}")
    _check_shape(tensor.shape, spec, field)
    values = _values(tensor, spec.dtype, field)
    elements = math.prod(tensor.shape)
    if values.size != elements:
        message = f"{field}.data: expected {elements} values for the shape {tensor.shape}, got {values.size}"
        raise RequestError("bad_request", message)
    return values.reshape(tensor.shape)


def _check_shape(shape: Sequence[int], spec: TensorSpec, field: str) -> None:
    fits = len(shape) == len(spec.shape) and all(
        got >= 0 and wanted in {None, got} for wanted, got in zip(spec.shape, shape, strict=True)
    )
    if not fits:
        wanted = ["any" if size is None else size for size in spec.shape]
        raise RequestError("bad_request", f"{field}.shape: expected {wanted}, got {list(shape)[:16]}".replace("'", ""))
    if math.prod(shape) > MAX_ELEMENTS:
        raise RequestError("too_large", f"{field}.shape: more than {MAX_ELEMENTS} elements")


def _values(tensor: _Tensor, dtype: str, field: str) -> NDArray[Any]:
    """Return the data, flat or nested, in the graph's type; a value that does not fit into it is refused."""
    wanted = np.dtype(dtype)
    try:
        values = np.asarray(tensor.data)
    except ValueError as error:
        raise RequestError("bad_request", f"{field}.data: the nested lists differ in length") from error
    if values.size and values.dtype.kind not in _KINDS[wanted.kind]:
        raise RequestError("bad_request", f"{field}.data: holds values that are no {tensor.datatype}")
    if wanted.kind in "iu" and values.size:
        bounds = np.iinfo(wanted)
        if values.min() < bounds.min or values.max() > bounds.max:
            raise RequestError("bad_request", f"{field}.data: a value lies outside {bounds.min} to {bounds.max}")
    with np.errstate(over="ignore"):
        converted = values.astype(wanted)
    if wanted.kind == "f" and not np.isfinite(converted).all():
        raise RequestError("bad_request", f"{field}.data: a value is too large for {tensor.datatype}")
    return converted.ravel()


def _render(name: str, values: NDArray[Any]) -> dict[str, object]:
    datatype = _DATATYPES.get(values.dtype.name)
    if datatype is None:
        raise RequestError("model_failed", f"output {name} is of a type that the protocol has no name for")
    data = check_finite(values).ravel().tolist()
    return {"name": name, "datatype": datatype, "shape": list(values.shape), "data": data}


def build(artifact: Artifact, backend: Backend, manifest: Manifest) -> TensorsTask:
    """Make the task for an opened graph."""
    del artifact
    return TensorsTask(backend, manifest.name, manifest.version)
