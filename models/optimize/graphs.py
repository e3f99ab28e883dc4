"""An ONNX graph's tensors and the files they lie in, read without trusting a name that the graph gives."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import onnx
from google.protobuf.message import DecodeError
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from models.artifact import Artifact
from models.errors import ModelError

_SUB_BYTE: Final = frozenset({"INT4", "UINT4", "FLOAT4E2M1", "INT2", "UINT2"})
"""Types of which a byte holds several, and whose typed fields are not laid out as the bytes are."""


class GraphError(ModelError):
    """A file that is no ONNX graph at all."""


class Place:
    """Where a tensor's bytes lie outside its graph: a file's name beside it, offset and length in bytes."""

    def __init__(self, tensor: TensorProto) -> None:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        self.file = entries.get("location", "")
        try:
            self.offset = int(entries.get("offset", 0))
            self.length = int(entries["length"]) if "length" in entries else None
        except ValueError as error:
            raise ModelError(f"the tensor {tensor.name!r} lies at no number: {error}") from error


def load_graph(path: Path) -> ModelProto:
    """Read a graph without the weights that lie outside it; raises ModelError."""
    try:
        model = onnx.load_model(path, load_external_data=False)
    except DecodeError as error:
        raise GraphError(f"{path.name} is no ONNX graph") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    if not model.graph.node:
        raise GraphError(f"{path.name} is no ONNX graph, or one that computes nothing")
    return model


def initialisers(graph: GraphProto) -> Iterator[TensorProto]:
    """Give every weight of a graph and of the graphs inside its nodes, in order."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from initialisers(attribute.g)
            for inner in attribute.graphs:
                yield from initialisers(inner)


def nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """Give every node of a graph and of the graphs inside its nodes."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs:
                yield from nodes(inner)


def external_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Give the weights that lie in other files."""
    return (tensor for tensor in initialisers(graph) if is_external(tensor))


def is_external(tensor: TensorProto) -> bool:
    """Whether a tensor's bytes lie in another file."""
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def check_beside(name: str) -> None:
    """Raise ModelError unless a file that a graph names lies beside it or below."""
    parts = name.split("/")
    if not name or name.startswith("/") or "\\" in name or any(part in {"", ".", ".."} for part in parts):
        raise ModelError(f"the graph keeps weights in {name!r}, which leads out of its folder")


def bytes_of(tensor: TensorProto, beside: Artifact) -> bytes | None:
    """Return a tensor's bytes as ONNX lays them out raw, from wherever they are; None for texts and the like."""
    if is_external(tensor):
        return _read(Place(tensor), tensor.name, beside)
    if tensor.HasField("raw_data"):
        return bytes(tensor.raw_data)
    name = TensorProto.DataType.Name(tensor.data_type)
    if name == "STRING" or name in _SUB_BYTE:
        return None
    return bytes(numpy_helper.to_array(tensor).tobytes())


def sha256_of(data: bytes) -> str:
    """Return the SHA-256 of a tensor's bytes in hex."""
    return hashlib.sha256(data).hexdigest()


def _read(place: Place, name: str, beside: Artifact) -> bytes:
    data = beside.map(place.file)
    end = len(data) if place.length is None else place.offset + place.length
    if not 0 <= place.offset <= end <= len(data):
        raise ModelError(f"the tensor {name!r} lies outside {place.file!r}, which has {len(data)} bytes")
    return bytes(memoryview(data)[place.offset : end])
