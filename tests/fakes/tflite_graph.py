"""Writes TensorFlow Lite graphs that no converter would make, and bends those that one made (fields of schema.fbs)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

Bend = Callable[[Any], None]


def bent(source: Path, bend: Bend) -> bytes:
    """Return a graph with its first subgraph's model changed by `bend`."""
    model = schema.ModelT.InitFromPackedBuf(source.read_bytes())
    bend(model)
    return packed(model)


def packed(model: Any) -> bytes:
    """Return a model's bytes."""
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def endless() -> bytes:
    """Return a graph whose loop asks a condition that is always true."""
    model = schema.ModelT()
    model.version = 3
    model.buffers = [_buffer(b""), _buffer(b"\1")]
    model.operatorCodes = [_code(schema.BuiltinOperator.WHILE), _code(schema.BuiltinOperator.ADD)]
    loop = schema.OperatorT()
    loop.opcodeIndex, loop.inputs, loop.outputs = 0, [0], [1]
    loop.builtinOptionsType, loop.builtinOptions = schema.BuiltinOptions.WhileOptions, schema.WhileOptionsT()
    loop.builtinOptions.condSubgraphIndex, loop.builtinOptions.bodySubgraphIndex = 1, 2
    add = schema.OperatorT()
    add.opcodeIndex, add.inputs, add.outputs = 1, [0, 0], [1]
    add.builtinOptionsType, add.builtinOptions = schema.BuiltinOptions.AddOptions, schema.AddOptionsT()
    true = _tensor("true", schema.TensorType.BOOL, buffer=1)
    model.subgraphs = [
        _graph([_tensor("x"), _tensor("y")], [0], [1], [loop]),
        _graph([_tensor("a"), true], [0], [1], []),
        _graph([_tensor("b"), _tensor("c")], [0], [1], [add]),
    ]
    return packed(model)


def _graph(tensors: list[Any], inputs: list[int], outputs: list[int], operators: list[Any]) -> Any:
    graph = schema.SubGraphT()
    graph.tensors, graph.inputs, graph.outputs, graph.operators = tensors, inputs, outputs, operators
    return graph


def _tensor(name: str, kind: int = schema.TensorType.FLOAT32, buffer: int = 0) -> Any:
    tensor = schema.TensorT()
    tensor.name, tensor.type, tensor.buffer, tensor.shape = name, kind, buffer, [1]
    return tensor


def _buffer(data: bytes) -> Any:
    buffer = schema.BufferT()
    buffer.data = np.frombuffer(data, dtype="u1") if data else None
    return buffer


def _code(kind: int) -> Any:
    code = schema.OperatorCodeT()
    code.builtinCode, code.deprecatedBuiltinCode, code.version = kind, kind, 1
    return code
