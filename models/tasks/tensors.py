"""tensors: any graph by the Open Inference Protocol v2 (https://github.com/kserve/open-inference-protocol).

Tensors stand in JSON, or after it as bytes: the protocol's binary extension. NaN and infinities are refused in
questions and are the model's failure in answers.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.artifact import Artifact
from models.backends.face import Backend, Tensors, TensorSpec
from models.body import JSON, OCTETS, framed_octets, parse_failure, split_octets, type_errors
from models.channel import MAX_FRAME_BYTES
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
_TEXT_SIZE: Final = struct.Struct("<I")
_DATATYPES: Final = {dtype: datatype for datatype, dtype in _DTYPES.items()}
_KINDS: Final = {"b": "b", "i": "iu", "u": "iu", "f": "iuf", "O": "U"}
"""numpy's kind of a tensor -> the kinds of JSON values that it takes."""


class _Size(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    binary_data_size: int | None = None


class _Form(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    binary_data: bool | None = None


class _Forms(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    binary_data_output: bool = False


class _Tensor(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    data: list[Any] | None = None
    parameters: _Size = _Size()


class _Wanted(msgspec.Struct):
    name: str
    parameters: _Form = _Form()


class _Inference(msgspec.Struct):
    inputs: list[_Tensor]
    outputs: list[_Wanted] = []
    parameters: _Forms = _Forms()
    id: str | None = None


class _Options(msgspec.Struct, frozen=True):
    outputs: dict[str, bool]
    """Each wanted output, and whether as bytes."""
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
        head, rest = split_octets(request.body) if request.content_type == OCTETS else (request.body, memoryview(b""))
        try:
            asked = _inference.decode(head)
        except type_errors as error:
            raise parse_failure("body", error) from None
        options = _Options(outputs=self._wanted(asked), ident=asked.id)
        kind = OCTETS if any(options.outputs.values()) else JSON
        return Prepared(items=[self._feeds(asked.inputs, rest)], options=options, content_type=kind)

    def run(self, items: Sequence[Tensors]) -> list[Tensors]:
        """Run each request's tensors as they are."""
        return [self._backend.run(item) for item in items]

    def interpret(self, prepared: Prepared, results: Sequence[Tensors]) -> bytes:
        """Return the protocol's inference response."""
        options: _Options = prepared.options
        answer: dict[str, object] = dict(self._head)
        if options.ident is not None:
            answer["id"] = options.ident
        raw: list[bytes] = []
        _check_answer(results[0], options.outputs)
        answer["outputs"] = [
            _render_raw(name, results[0][name], raw) if binary else _render(name, results[0][name])
            for name, binary in options.outputs.items()
        ]
        head = _encoder.encode(answer)
        return framed_octets(head, b"".join(raw)) if any(options.outputs.values()) else head

    def _wanted(self, asked: _Inference) -> dict[str, bool]:
        default = asked.parameters.binary_data_output
        for at, output in enumerate(asked.outputs):
            if output.name not in self._outputs:
                message = f"outputs[{at}].name: {output.name[:80]!r} is none of {', '.join(self._outputs)}"
                raise RequestError("bad_request", message)
        forms = {wanted.name: wanted.parameters.binary_data for wanted in asked.outputs}
        forms = forms or dict.fromkeys(self._outputs)
        return {name: default if binary is None else binary for name, binary in forms.items()}

    def _feeds(self, tensors: Sequence[_Tensor], rest: memoryview) -> Tensors:
        feeds: Tensors = {}
        for at, tensor in enumerate(tensors):
            field = f"inputs[{at}]"
            if tensor.name not in self._inputs or tensor.name in feeds:
                message = f"{field}.name: {tensor.name[:80]!r} is unknown or twice; expected {', '.join(self._inputs)}"
                raise RequestError("bad_request", message)
            raw, rest = _own_bytes(tensor, rest, field)
            feeds[tensor.name] = _array(tensor, self._inputs[tensor.name], field, raw)
        if len(rest):
            raise RequestError("bad_request", f"body: {len(rest)} bytes after the last tensor belong to none")
        if missing := self._inputs.keys() - feeds.keys():
            raise RequestError("bad_request", f"inputs: {min(missing)!r} is missing")
        return feeds


def _own_bytes(tensor: _Tensor, rest: memoryview, field: str) -> tuple[memoryview | None, memoryview]:
    """Return (a tensor's own bytes, what follows); None where its values stand in JSON."""
    size = tensor.parameters.binary_data_size
    if (size is None) == (tensor.data is None):
        message = f"{field}.data: expected either data or parameters.binary_data_size"
        raise RequestError("bad_request", message)
    if size is None:
        return None, rest
    if not 0 <= size <= len(rest):
        where = f"{field}.parameters.binary_data_size"
        raise RequestError("bad_request", f"{where}: {size} bytes are claimed, {len(rest)} are left in the body")
    return rest[:size], rest[size:]


def _array(tensor: _Tensor, spec: TensorSpec, field: str, raw: memoryview | None) -> NDArray[Any]:
    """Return a tensor's numbers in the graph's type and shape; raises RequestError."""
    expected = _DATATYPES[spec.dtype]
    if tensor.datatype != expected:
        raise RequestError("bad_request", f"{field}.datatype: expected {expected}, got {tensor.datatype[:40]!r}")
    _check_shape(tensor.shape, spec, field)
    elements = math.prod(tensor.shape)
    if raw is not None:
        return _unpacked(raw, spec.dtype, elements, field).reshape(tensor.shape)
    values = _values(tensor, spec.dtype, field)
    if values.size != elements:
        message = f"{field}.data: expected {elements} values for the shape {tensor.shape}, got {values.size}"
        raise RequestError("bad_request", message)
    return values.reshape(tensor.shape)


def _unpacked(raw: memoryview, dtype: str, elements: int, field: str) -> NDArray[Any]:
    """Return the values of raw bytes, little-endian and in the order of the shape."""
    if dtype == "object":
        return _texts(raw, elements, field)
    wanted = np.dtype(dtype).newbyteorder("<")
    if len(raw) != elements * wanted.itemsize:
        where = f"{field}.parameters.binary_data_size"
        raise RequestError("bad_request", f"{where}: expected {elements * wanted.itemsize}, got {len(raw)}")
    if wanted.kind == "b" and len(raw) and np.frombuffer(raw, np.uint8).max() > 1:
        raise RequestError("bad_request", f"{field}: a BOOL is one byte of 0 or 1")
    values = np.frombuffer(raw, wanted)
    if wanted.kind == "f" and not np.isfinite(values).all():
        raise RequestError("bad_request", f"{field}: a value is not a number or infinite")
    # A copy of its own: the runtimes ask for memory that is laid out for their type.
    return values.astype(dtype)


def _texts(raw: memoryview, elements: int, field: str) -> NDArray[Any]:
    """Return BYTES: each element's length (u32, little-endian), then its text in UTF-8."""
    texts: list[str] = []
    at = 0
    while at < len(raw) and len(texts) < elements:
        (size,) = _TEXT_SIZE.unpack_from(raw, at) if at + _TEXT_SIZE.size <= len(raw) else (len(raw),)
        at += _TEXT_SIZE.size
        if size > len(raw) - at:
            raise RequestError("bad_request", f"{field}: the text {len(texts)} ends beyond its bytes")
        try:
            texts.append(str(raw[at : at + size], "utf-8"))
        except UnicodeDecodeError as error:
            raise RequestError("bad_request", f"{field}: the text {len(texts)} is not UTF-8") from error
        at += size
    if len(texts) != elements or at != len(raw):
        raise RequestError("bad_request", f"{field}: the bytes hold not exactly {elements} texts")
    return np.asarray(texts, object)


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


def _check_answer(result: Tensors, forms: Mapping[str, bool]) -> None:
    """Refuse what no frame to the agent holds, before it is written out; in JSON an element has two letters or more."""
    least = sum(result[name].nbytes if binary else 2 * result[name].size for name, binary in forms.items())
    if least > MAX_FRAME_BYTES:
        message = f"the answer has {least} bytes or more, over the limit of {MAX_FRAME_BYTES}"
        raise RequestError("model_failed", message)


def _render_raw(name: str, values: NDArray[Any], raw: list[bytes]) -> dict[str, object]:
    """Describe an output and add its bytes."""
    datatype = _DATATYPES.get(values.dtype.name)
    if datatype is None:
        raise RequestError("model_failed", f"output {name} is of a type that the protocol has no name for")
    check_finite(values)
    if datatype == "BYTES":
        texts = [str(text).encode() for text in values.ravel()]
        data = b"".join(_TEXT_SIZE.pack(len(text)) + text for text in texts)
    else:
        data = values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()
    raw.append(data)
    shape, size = list(values.shape), {"binary_data_size": len(data)}
    return {"name": name, "datatype": datatype, "shape": shape, "parameters": size}


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
