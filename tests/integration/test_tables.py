"""Classifiers as scikit-learn's converter writes them, on ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import onnx
import pytest
from onnx import TensorProto, helper

from models.body import parse_body
from models.manifest import Limits
from models.record import answer_alone
from models.request import Request
from models.session import open_session
from tests.fakes.artifacts import manifest_of


def classifier(*, zipmap: bool, names: list[str] | None = None) -> bytes:
    """Return a linear classifier of two columns, the first class where the first column is larger."""
    said = {"classlabels_strings": names} if names else {"classlabels_ints": [30, 10]}
    linear = helper.make_node(
        "LinearClassifier",
        ["X"],
        ["label", "raw"],
        domain="ai.onnx.ml",
        coefficients=[1.0, 0.0, 0.0, 1.0],
        intercepts=[0.0, 0.0],
        post_transform="SOFTMAX",
        **said,
    )
    kind = TensorProto.STRING if names else TensorProto.INT64
    outputs = [helper.make_tensor_value_info("label", kind, [None])]
    nodes = [linear]
    if zipmap:
        keys = {"classlabels_strings": names} if names else {"classlabels_int64s": [30, 10]}
        nodes.append(helper.make_node("ZipMap", ["raw"], ["probabilities"], domain="ai.onnx.ml", **keys))
        table = helper.make_map_type_proto(kind, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
        outputs.append(helper.make_value_info("probabilities", helper.make_sequence_type_proto(table)))
    else:
        nodes.append(helper.make_node("Identity", ["raw"], ["probabilities"]))
        outputs.append(helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [None, 2]))
    inputs = [helper.make_tensor_value_info("X", TensorProto.FLOAT, [None, 2])]
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString())


def answers(folder: Path, graph: bytes, inputs: object) -> Any:
    files = {"model.onnx": graph, "config.json": b'{"id2label": {"30": "left", "10": "right"}}'}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    manifest = msgspec.structs.replace(manifest_of(files), task="tabular-classification", limits=Limits(batch=8))
    session = open_session(folder, manifest, manifest.variants[0], threads=1, slots=1)
    try:
        body = parse_body("application/json", json.dumps({"inputs": inputs}).encode())
        request = Request(model="m", content_type=body.content_type, body=body.body, dialect=body.dialect)
        piece = answer_alone(session, request)
    finally:
        session.close()
    assert not piece.code, piece.message
    return json.loads(piece.body)["outputs"]


@pytest.mark.parametrize("zipmap", [True, False])
def test_probabilities_in_a_table_or_in_maps_are_one_answer(tmp_path: Path, zipmap: bool) -> None:
    graph = classifier(zipmap=zipmap)
    onnx.checker.check_model(graph)
    left, right = answers(tmp_path, graph, [[2, 0], [0, 3]])
    assert left == {"label": "left", "score": pytest.approx(0.8808, abs=1e-4)}
    assert right == {"label": "right", "score": pytest.approx(0.9526, abs=1e-4)}


def test_classes_that_are_texts_are_the_labels(tmp_path: Path) -> None:
    graph = classifier(zipmap=True, names=["cat", "dog"])
    assert answers(tmp_path, graph, [0, 2]) == {"label": "dog", "score": pytest.approx(0.8808, abs=1e-4)}
