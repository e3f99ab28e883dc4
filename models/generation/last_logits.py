"""Makes a decoder's graph give the logits of the last token only. Pure: no I/O, no clock.

Exporters give the logits of every token of a prompt, of which only the last are drawn from; with a large vocabulary
the rest are a third of the work and most of the memory. A Gather is put before the last product, by rewriting two
messages of the graph's wire format (https://protobuf.dev/programming-guides/encoding/, fields of onnx.proto3).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec

MAX_BYTES: Final = 256 << 20
"""Graphs with weights inside are left as they are above this: the change makes a copy."""

_GRAPH: Final = 7
_NODE: Final = 1
_INPUT, _OUTPUT, _OPERATOR = 1, 2, 4
_INITIALIZER: Final = 5
_LAST: Final = b"spillway.last"
_INDEX: Final = b"spillway.last_index"
_PRODUCTS: Final = frozenset({b"MatMul", b"MatMulNBits"})
_SHAPELESS: Final = frozenset({b"Cast", b"Div", b"Identity", b"Mul", b"Tanh"})
"""What may stand between the product and the logits: each number by itself."""
_MAX_STEPS: Final = 8


class _Field(msgspec.Struct, frozen=True):
    """One length-delimited field: from `start` to `stop` as a whole, its content from `inner` on."""

    number: int
    start: int
    inner: int
    stop: int


def with_last_logits(model: bytes) -> bytes | None:
    """Return the model with logits of shape (batch, 1, vocabulary); None where its end is not of a known form."""
    if len(model) > MAX_BYTES:
        return None
    try:
        return _changed(model)
    except (IndexError, ValueError):  # no graph: the runtime will say so better
        return None


def _changed(model: bytes) -> bytes | None:
    graphs = [field for field in _fields(model, 0, len(model)) if field.number == _GRAPH]
    if len(graphs) != 1:
        return None
    graph = graphs[0]
    nodes = [field for field in _fields(model, graph.inner, graph.stop) if field.number == _NODE]
    makers = {output: node for node in nodes for output in _texts(model, node, _OUTPUT)}
    product = _product(model, makers)
    if product is None:
        return None
    hidden = _texts(model, product, _INPUT)[0]
    body = b"".join((
        model[graph.inner : product.start],
        _delimited(_NODE, _gather(hidden)),
        _delimited(_NODE, _fed_by(model, product, _LAST)),
        model[product.stop : graph.stop],
        _delimited(_INITIALIZER, _index()),
    ))  # fmt: skip
    return b"".join((model[: graph.start], _delimited(_GRAPH, body), model[graph.stop :]))


def _product(model: bytes, makers: dict[bytes, _Field]) -> _Field | None:
    """Return the node that multiplies the hidden states by the vocabulary's table."""
    name = b"logits"
    for _ in range(_MAX_STEPS):
        node = makers.get(name)
        inputs = _texts(model, node, _INPUT) if node else []
        if node is None or not inputs:
            return None
        operator = b"".join(_texts(model, node, _OPERATOR))
        if operator in _PRODUCTS:
            return node
        if operator not in _SHAPELESS:
            return None
        name = inputs[0]
    return None


def _fed_by(model: bytes, node: _Field, name: bytes) -> bytes:
    """Return a node's content with another first input."""
    first = next(field for field in _fields(model, node.inner, node.stop) if field.number == _INPUT)
    return model[node.inner : first.start] + _delimited(_INPUT, name) + model[first.stop : node.stop]


def _gather(hidden: bytes) -> bytes:
    """Return a node that takes the last place of the second axis."""
    axis = _delimited(1, b"axis") + b"\x18\x01" + b"\xa0\x01\x02"  # i = 1, type = INT
    inputs = _delimited(_INPUT, hidden) + _delimited(_INPUT, _INDEX)
    return inputs + _delimited(_OUTPUT, _LAST) + _delimited(_OPERATOR, b"Gather") + _delimited(5, axis)


def _index() -> bytes:
    """Return the tensor [-1] of int64."""
    return b"\x08\x01\x10\x07" + _delimited(8, _INDEX) + _delimited(9, b"\xff" * 8)


def _texts(model: bytes, node: _Field, number: int) -> list[bytes]:
    inner = _fields(model, node.inner, node.stop)
    return [model[field.inner : field.stop] for field in inner if field.number == number]


def _fields(model: bytes, at: int, end: int) -> Iterator[_Field]:
    """Give the length-delimited fields of a message; raises IndexError, ValueError."""
    while at < end:
        start = at
        key, at = _varint(model, at)
        kind = key & 7
        if kind == 0:
            _, at = _varint(model, at)
        elif kind in {1, 5}:
            at += 8 if kind == 1 else 4
        elif kind == 2:
            length, at = _varint(model, at)
            if at + length > end:
                raise ValueError("cut short")
            yield _Field(key >> 3, start, at, at + length)
            at += length
        else:
            raise ValueError("no such kind of field")


def _varint(model: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = model[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _delimited(number: int, content: bytes) -> bytes:
    return _written(number << 3 | 2) + _written(len(content)) + content


def _written(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
