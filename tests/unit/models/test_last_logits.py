"""Graphs that give the logits of the last token only, and those that are left as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from models.generation import last_logits
from models.generation.last_logits import with_last_logits

RECORDED = Path(__file__).resolve().parents[2] / "reference" / "recorded"
HIDDEN = np.random.default_rng(1).normal(size=(2, 5, 4)).astype(np.float32)


def model_of(*nodes: onnx.NodeProto) -> bytes:
    table = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["batch", "length", 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "length", 6])],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.array(2, np.float32), "two")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def run(model: bytes) -> np.ndarray:
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    logits: np.ndarray = session.run(["logits"], {"hidden": HIDDEN})[0]
    return logits


PRODUCT = helper.make_node("MatMul", ["hidden", "table"], ["logits"])
SCALED = (
    helper.make_node("MatMul", ["hidden", "table"], ["raw"]),
    helper.make_node("Div", ["raw", "two"], ["halved"]),
    helper.make_node("Tanh", ["halved"], ["logits"]),
)


@pytest.mark.parametrize("nodes", [(PRODUCT,), SCALED])
def test_the_last_tokens_logits_are_the_same(nodes: tuple[onnx.NodeProto, ...]) -> None:
    model = model_of(*nodes)
    changed = with_last_logits(model)
    assert changed is not None
    onnx.checker.check_model(changed)
    assert run(changed).shape == (2, 1, 6)
    np.testing.assert_allclose(run(changed)[:, 0], run(model)[:, -1], rtol=1e-6)


@pytest.mark.parametrize(
    "path", ["llama/model.onnx", "gpt2/model.onnx", "qwen/onnx/model.onnx", "llama-genai/model.onnx"]
)
def test_what_exporters_write_is_known(path: str) -> None:
    assert with_last_logits((RECORDED / path).read_bytes()) is not None


def test_another_end_is_left_as_it_is() -> None:
    raw = helper.make_node("MatMul", ["hidden", "table"], ["raw"])
    assert with_last_logits(model_of(raw, helper.make_node("Softmax", ["raw"], ["logits"]))) is None
    assert with_last_logits(model_of(helper.make_node("Identity", ["logits"], ["logits"]))) is None
    assert with_last_logits(b"") is None


def test_a_graph_too_large_to_copy_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(last_logits, "MAX_BYTES", 10)
    assert with_last_logits(model_of(PRODUCT)) is None


@given(st.data())
def test_damaged_bytes_give_nothing_worse_than_a_damaged_graph(data: st.DataObject) -> None:
    model = bytearray(model_of(PRODUCT))
    for at in data.draw(st.lists(st.integers(0, len(model) - 1), max_size=4)):
        model[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(model)))
    with_last_logits(bytes(model[:cut]))
    with_last_logits(bytes(model))
