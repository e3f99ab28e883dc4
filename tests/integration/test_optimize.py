"""Smaller forms of a graph by ONNX Runtime's own tools: they run, they are smaller, and they answer much the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from models.errors import ModelError
from models.optimize.recipes import STEPS, needs_calibration, parse_recipe, pruned_percent
from models.optimize.steps import apply

WIDTH = 128


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of 64 KiB each."""
    chance = np.random.default_rng(11)
    weights = [chance.normal(0, 0.1, size=(WIDTH, WIDTH)).astype(np.float32) for _ in range(2)]
    tensors = [numpy_helper.from_array(one, f"w{at}") for at, one in enumerate(weights)]
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w1"], ["y"]),
    ]
    row = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDTH]) for name in ("x", "y")]
    model = helper.make_model(
        helper.make_graph(nodes, "g", row[:1], row[1:], tensors),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    onnx.save_model(model, path)
    return path


def feeds(count: int = 8) -> list[dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]]:
    chance = np.random.default_rng(7)
    return [{"x": chance.normal(size=(1 + at % 3, WIDTH)).astype(np.float32)} for at in range(count)]


def answer(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, dict(one))[0] for one in feeds()])


@pytest.mark.parametrize(
    ("recipe", "smaller", "near"),
    [
        ("graph", 1.1, 1e-5),
        ("int8-dynamic", 0.35, 0.05),
        ("int8-static", 0.5, 0.1),
        ("int4", 0.3, 0.2),
        ("float16", 0.6, 0.01),
        ("pruned-10", 1.1, 0.1),
        ("pruned-10+int8-dynamic", 0.35, 0.15),
    ],
)
def test_a_step_makes_a_graph_that_answers_much_the_same(
    graph: Path, tmp_path: Path, recipe: str, smaller: float, near: float
) -> None:
    told = apply(parse_recipe(recipe), graph, tmp_path / "made.onnx", feeds())
    assert [line.split(":")[0] for line in told] == recipe.split("+")
    assert (tmp_path / "made.onnx").stat().st_size < graph.stat().st_size * smaller
    right, found = answer(graph), answer(tmp_path / "made.onnx")
    assert np.abs(found - right).max() <= near * np.abs(right).max()


def test_pruning_sets_the_smallest_weights_of_each_matrix_to_zero(graph: Path, tmp_path: Path) -> None:
    apply(["pruned-75"], graph, tmp_path / "made.onnx", [])
    before = {one.name: numpy_helper.to_array(one) for one in onnx.load_model(graph).graph.initializer}
    for tensor in onnx.load_model(tmp_path / "made.onnx").graph.initializer:
        values = numpy_helper.to_array(tensor)
        assert np.count_nonzero(values) == values.size // 4
        kept = np.abs(before[tensor.name][values != 0]).min()
        assert np.abs(before[tensor.name][values == 0]).max() <= kept


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("int8-static", "add --calibration FILE"),
        ("int4+pruned", "prune before quantising"),
    ],
)
def test_a_step_that_cannot_be_done_says_why(graph: Path, tmp_path: Path, recipe: str, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        apply(parse_recipe(recipe), graph, tmp_path / "made.onnx", [])


def test_a_graph_without_matrix_products_is_for_static_quantisation(tmp_path: Path) -> None:
    row = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, 8, 8]) for name in ("x", "y")]
    kernel = numpy_helper.from_array(np.ones((1, 1, 3, 3), np.float32), "w")
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])]
    onnx.save_model(
        helper.make_model(helper.make_graph(nodes, "g", row[:1], row[1:], [kernel])), tmp_path / "conv.onnx"
    )
    with pytest.raises(ModelError, match="int8-static is for convolutions"):
        apply(["int8-dynamic"], tmp_path / "conv.onnx", tmp_path / "made.onnx", [])


def test_recipes_are_steps_joined_by_plus() -> None:
    assert parse_recipe("pruned-30+int8-static") == ["pruned-30", "int8-static"]
    assert (pruned_percent("pruned"), pruned_percent("pruned-5"), pruned_percent("int4")) == (50, 5, None)
    assert needs_calibration(parse_recipe("graph+int8-static"))
    assert not any(needs_calibration([step]) for step in STEPS if step != "int8-static")
    for wrong in ("", "int8", "pruned-0", "pruned-100", "int4+"):
        with pytest.raises(ModelError, match="is none of"):
            parse_recipe(wrong)
