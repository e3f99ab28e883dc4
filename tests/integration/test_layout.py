"""Weights of ONNX graphs laid out beside them: the same numbers, at pages, from inside the folder alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from models.errors import ModelError
from models.optimize.graphs import Place, external_tensors, load_graph
from models.optimize.layout import ALIGNED_BYTES, LARGE_BYTES, lay_out

SIZES = ((512, 512), (512, 300), (7,), (300, 512))


def graph(path: Path, *, beside: str = "", fields: bool = False) -> dict[str, Any]:
    """Write a graph with large and small weights; return them by name. `beside` names a file for all of them."""
    chance = np.random.default_rng(5)
    weights: dict[str, Any] = {f"w{at}": chance.normal(size=size).astype(np.float32) for at, size in enumerate(SIZES)}
    weights["steps"] = np.arange(LARGE_BYTES, dtype=np.int64)
    tensors = [numpy_helper.from_array(values, name) for name, values in weights.items()]
    if fields:
        tensors[0] = helper.make_tensor("w0", TensorProto.FLOAT, SIZES[0], weights["w0"].ravel().tolist())
    nodes = [helper.make_node("Identity", [name], [f"o_{name}"]) for name in weights]
    outputs = [helper.make_tensor_value_info(f"o_{one.name}", one.data_type, list(one.dims)) for one in tensors]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [], outputs, tensors), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    if beside:
        onnx.save_model(model, path, save_as_external_data=True, location=beside, size_threshold=0)
    else:
        onnx.save_model(model, path)
    return weights


def read(path: Path) -> dict[str, Any]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load_model(path).graph.initializer}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("beside", "fields"), [("", False), ("", True), ("old.bin", False), ("weights/old.bin", False)]
)
def test_large_weights_move_to_pages_and_keep_every_number(tmp_path: Path, beside: str, fields: bool) -> None:
    if "/" in beside:
        (tmp_path / "a" / "onnx" / "weights").mkdir(parents=True)
    weights = graph(tmp_path / "a" / "onnx" / "model.onnx", beside=beside, fields=fields)
    laid = lay_out(tmp_path / "a", "onnx/model.onnx", tmp_path / "b")
    assert laid.files == ["onnx/model.onnx", "onnx/model.onnx.data"]
    assert laid.left == ([f"onnx/{beside}"] if beside else [])
    found = read(tmp_path / "b" / "onnx" / "model.onnx")
    assert all(np.array_equal(found[name], values) for name, values in weights.items())
    outside = list(external_tensors(load_graph(tmp_path / "b" / "onnx" / "model.onnx").graph))
    assert {tensor.name for tensor in outside} == {"w0", "w1", "w3", "steps"}
    assert all(Place(tensor).offset % ALIGNED_BYTES == 0 for tensor in outside)


def test_what_was_laid_out_once_stays_byte_for_byte(tmp_path: Path) -> None:
    graph(tmp_path / "a" / "model.onnx")
    lay_out(tmp_path / "a", "model.onnx", tmp_path / "b")
    again = lay_out(tmp_path / "b", "model.onnx", tmp_path / "c")
    assert (again.moved_bytes, again.left) == (0, [])
    assert contents(tmp_path / "b") == contents(tmp_path / "c")


def test_a_graph_of_small_weights_stays_one_file(tmp_path: Path) -> None:
    sample = Path(__file__).resolve().parents[2] / "examples" / "models" / "digits"
    assert lay_out(sample, "model.onnx", tmp_path).files == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_bytes() == (sample / "model.onnx").read_bytes()


@pytest.mark.parametrize("location", ["../old.bin", "/etc/passwd", "a/../../old.bin", "..\\old.bin", ""])
def test_e3_weights_that_lead_out_of_the_folder_are_refused(tmp_path: Path, location: str) -> None:
    rename_weights(tmp_path, location)
    with pytest.raises(ModelError, match="leads out of its folder"):
        lay_out(tmp_path / "a", "model.onnx", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_e3_weights_behind_a_link_are_refused(tmp_path: Path) -> None:
    graph(tmp_path / "a" / "model.onnx", beside="old.bin")
    (tmp_path / "a" / "old.bin").rename(tmp_path / "old.bin")
    (tmp_path / "a" / "old.bin").symlink_to(tmp_path / "old.bin")
    with pytest.raises(ModelError, match=r"old\.bin"):
        lay_out(tmp_path / "a", "model.onnx", tmp_path / "b")


def test_weights_beyond_the_end_of_their_file_are_refused(tmp_path: Path) -> None:
    graph(tmp_path / "a" / "model.onnx", beside="old.bin")
    with (tmp_path / "a" / "old.bin").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ModelError, match=r"lies outside 'old\.bin', which has 1000 bytes"):
        lay_out(tmp_path / "a", "model.onnx", tmp_path / "b")


@pytest.mark.parametrize("data", [b"", b"model " * 300_000, bytes(1000)])
def test_what_is_no_graph_is_said(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(data)
    with pytest.raises(ModelError, match="is no ONNX graph"):
        lay_out(tmp_path, "model.onnx", tmp_path / "b")


def rename_weights(tmp_path: Path, location: str) -> None:
    graph(tmp_path / "a" / "model.onnx", beside="old.bin")
    model = load_graph(tmp_path / "a" / "model.onnx")
    for tensor in external_tensors(model.graph):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    (tmp_path / "a" / "model.onnx").write_bytes(model.SerializeToString())
