"""Takes names and notes that only debuggers read out of an ONNX graph; what it computes stays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx


def slim(path: Path) -> None:
    """Rewrite a graph file with short inner names; its inputs and outputs keep theirs."""
    model = onnx.load(str(path))
    kept = {value.name for value in [*model.graph.input, *model.graph.output]}
    names: dict[str, str] = {"": ""} | {name: name for name in kept}
    for graph in _graphs(model.graph):
        _shorten(graph, names)
    model.doc_string = ""
    del model.metadata_props[:]
    onnx.save(model, str(path))


def _graphs(graph: Any) -> Iterator[Any]:
    """Give a graph and those inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)


def _shorten(graph: Any, names: dict[str, str]) -> None:
    def short(name: str) -> str:
        return names.setdefault(name, f"v{len(names)}")

    for node in graph.node:
        node.name = node.doc_string = ""
        del node.metadata_props[:]
        node.input[:] = [short(name) for name in node.input]
        node.output[:] = [short(name) for name in node.output]
    for value in [*graph.initializer, *graph.input, *graph.output]:
        value.name = short(value.name)
        value.doc_string = ""
    del graph.value_info[:]
    graph.doc_string = ""
