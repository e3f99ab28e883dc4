"""Writes small ONNX graphs, for the tests that need one no trainer would make (fields of onnx.proto3)."""

from __future__ import annotations

from collections.abc import Sequence

FLOAT = 1
INT64 = 7
BOOL = 9
GRAPH = 5
"""AttributeProto.type of a graph."""


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def part(field: int, data: bytes | str) -> bytes:
    raw = data.encode() if isinstance(data, str) else data
    return varint(field << 3 | 2) + varint(len(raw)) + raw


def value_info(name: str, shape: Sequence[int | str], dtype: int = FLOAT) -> bytes:
    """Return a ValueInfoProto; a name in the shape is a free dimension."""
    sizes = b"".join(part(1, number(1, size) if isinstance(size, int) else part(2, size)) for size in shape)
    return part(1, name) + part(2, part(1, number(1, dtype) + part(2, sizes)))


def external_tensor(name: str, shape: Sequence[int], location: str, length: int) -> bytes:
    """Return a TensorProto whose floats lie in another file."""
    entries = [("location", location), ("offset", "0"), ("length", str(length))]
    head = b"".join(number(1, size) for size in shape) + number(2, FLOAT) + part(8, name)
    return head + b"".join(part(13, part(1, key) + part(2, value)) for key, value in entries) + number(14, 1)


def node(
    kind: str, inputs: Sequence[str], outputs: Sequence[str], attributes: Sequence[bytes] = (), domain: str = ""
) -> bytes:
    names = b"".join(part(1, name) for name in inputs) + b"".join(part(2, name) for name in outputs)
    return names + part(4, kind) + b"".join(part(5, attribute) for attribute in attributes) + part(7, domain)


def graph_of(
    nodes: Sequence[bytes], inputs: Sequence[bytes], outputs: Sequence[bytes], tensors: Sequence[bytes] = ()
) -> bytes:
    body = b"".join(part(1, data) for data in nodes) + part(2, "g") + b"".join(part(5, data) for data in tensors)
    return body + b"".join(part(11, data) for data in inputs) + b"".join(part(12, data) for data in outputs)


def model_of(graph: bytes) -> bytes:
    """Return a ModelProto of operator set 17."""
    return number(1, 8) + part(7, graph) + part(8, part(1, "") + number(2, 17))


def added_weights(location: str, size: int = 4) -> bytes:
    """Return a model that adds weights, kept in the file `location`, to its rows."""
    row: list[int | str] = ["batch", size]
    graph = graph_of(
        [node("Add", ["x", "w"], ["y"])],
        [value_info("x", row)],
        [value_info("y", row)],
        [external_tensor("w", [size], location, 4 * size)],
    )
    return model_of(graph)


def not_a_number(width: int = 1) -> bytes:
    """Return a model whose answer is log(x): not a number below zero."""
    row: list[int | str] = ["batch", width]
    return model_of(graph_of([node("Log", ["x"], ["y"])], [value_info("x", row)], [value_info("y", row)]))


def endless() -> bytes:
    """Return a model whose answer takes 2^62 rounds of a loop."""
    body = graph_of(
        [node("Identity", ["c"], ["co"]), node("Add", ["s", "s"], ["so"])],
        [value_info("i", [], INT64), value_info("c", [], BOOL), value_info("s", [1])],
        [value_info("co", [], BOOL), value_info("so", [1])],
    )
    again = part(1, "body") + part(6, body) + number(20, GRAPH)
    rounds = number(2, INT64) + part(8, "m") + part(9, (1 << 62).to_bytes(8, "little"))
    true = number(2, BOOL) + part(8, "t") + part(9, b"\1")
    loop = node("Loop", ["m", "t", "x"], ["y"], [again])
    return model_of(graph_of([loop], [value_info("x", [1])], [value_info("y", [1])], [rounds, true]))


def fill_asked() -> bytes:
    """Return a model whose answer has as many zeros as it is asked for."""
    filling = node("ConstantOfShape", ["x"], ["y"])
    return model_of(graph_of([filling], [value_info("x", [1], INT64)], [value_info("y", ["n"])]))


def fill(size: int) -> bytes:
    """Return a model whose answer has `size` zeros, whatever it is asked."""
    shape = number(1, 1) + number(2, INT64) + part(8, "sh") + part(9, size.to_bytes(8, "little"))
    filling = node("ConstantOfShape", ["sh"], ["y"])
    return model_of(graph_of([filling], [value_info("x", [1])], [value_info("y", ["n"])], [shape]))
