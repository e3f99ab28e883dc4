"""Which other files an ONNX graph takes its weights from. Pure: no I/O, no clock.

Walks the protocol buffer's wire format (https://protobuf.dev/programming-guides/encoding/) along the fields of
onnx.proto3 under which a tensor can lie, so that every such name is known before any runtime sees the graph.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Final

from models.errors import ModelError

MAX_DEPTH: Final = 64
_TENSOR: Final = "tensor"
_ENTRY: Final = "entry"
# message -> field number -> the message that stands there
_FIELDS: Final[dict[str, dict[int, str]]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: _TENSOR, 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: _TENSOR, 6: "graph", 10: _TENSOR, 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: _TENSOR, 2: _TENSOR},
    _TENSOR: {13: _ENTRY},
}


def external_files(graph: bytes | mmap.mmap) -> set[str]:
    """Return the paths that the graph's tensors name; raises ModelError for bytes that are no graph."""
    found: set[str] = set()
    with memoryview(graph) as view:
        _search(view, "model", 0, found)
    return found


def _search(view: memoryview, message: str, depth: int, found: set[str]) -> None:
    if depth > MAX_DEPTH:
        raise ModelError(f"the graph is nested more than {MAX_DEPTH} messages deep")
    wanted = _FIELDS[message]
    for number, part in _parts(view):
        inner = wanted.get(number)
        if inner == _ENTRY:
            found.update(_location(part))
        elif inner is not None:
            _search(part, inner, depth + 1, found)


def _location(entry: memoryview) -> Iterator[str]:
    """Give the value of a key-value entry whose key is `location`."""
    pair = {number: bytes(part) for number, part in _parts(entry)}
    if pair.get(1) == b"location":
        # ONNX Runtime takes its own mark for an address in memory.
        if b"_ORT_MEM_ADDR_" in pair.get(2, b""):
            raise ModelError("the graph names memory in place of a file")
        try:
            yield pair.get(2, b"").decode()
        except UnicodeDecodeError as error:
            raise ModelError("the graph names a file whose name is not UTF-8") from error


def _parts(view: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Give the length-delimited fields of one message."""
    at = 0
    while at < len(view):
        key, at = _varint(view, at)
        kind = key & 7
        if kind == 0:
            _, at = _varint(view, at)
        elif kind == 1:
            at += 8
        elif kind == 5:
            at += 4
        elif kind == 2:
            length, at = _varint(view, at)
            if length > len(view) - at:
                raise ModelError("the graph is cut short")
            yield key >> 3, view[at : at + length]
            at += length
        else:
            raise ModelError("the graph is not an ONNX file")


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(view):
            raise ModelError("the graph is cut short")
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ModelError("the graph is not an ONNX file")
