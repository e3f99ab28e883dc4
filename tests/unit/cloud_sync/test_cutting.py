"""A file is cut at the borders of its tensors, wherever its format says they lie."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from cloud_sync.fleet.cutting import MIN_RUN_BYTES, Cut, Run, cut_file, find_runs
from cloud_sync.fleet.tensors import BFLOAT_16, FLOAT_32, INTEGERS_8, Tensor, find_tensors
from cloud_sync.frames import FRAME_BYTES, Numbers
from tests.fakes.samples import MODELS

LARGE = MIN_RUN_BYTES


def tensor(name: str, offset: int, length: int, numbers: Numbers = FLOAT_32) -> Tensor:
    return Tensor(name, "m", offset, length, numbers)


@given(
    st.integers(0, 6 * FRAME_BYTES),
    st.lists(st.tuples(st.integers(0, 2 << 20), st.integers(1, 2 << 21)), max_size=6),
    st.integers(0, 3 << 20),
)
def test_the_cuts_of_a_file_are_the_file(length: int, gaps: list[tuple[int, int]], earlier: int) -> None:
    runs, at = [], 0
    for number, (gap, numbers) in enumerate(gaps):
        offset, end = at + gap, at + gap + 4 * numbers
        if end > length:
            break
        runs.append(Run(str(number), "m", offset, end, FLOAT_32))
        at = end
    cuts = cut_file(length, runs, {"0": 4 * earlier})
    assert [cut.offset for cut in cuts] == [sum(cut.length for cut in cuts[:at]) for at in range(len(cuts))]
    assert sum(cut.length for cut in cuts) == length
    assert all(0 < cut.length <= FRAME_BYTES for cut in cuts)
    assert all(cut.length % 4 == 0 and cut.place % 4 == 0 for cut in cuts if cut.run)
    assert sum(cut.length for cut in cuts if cut.run) == sum(run.end - run.offset for run in runs)


def test_what_a_tensor_has_more_than_before_stands_alone() -> None:
    (before, more) = cut_file(LARGE + 400, [Run("w", "m", 0, LARGE + 400, FLOAT_32)], {"w": LARGE})
    assert before == Cut(0, LARGE, "w", 0, FLOAT_32)
    assert more == Cut(LARGE, 400, "w", LARGE, FLOAT_32)


def test_small_neighbours_of_one_kind_are_cut_together() -> None:
    tensors = [tensor(str(at), at * 4096, 4000) for at in range(20)]
    assert find_runs(tensors) == [Run("0", "m", 0, 19 * 4096 + 4000, FLOAT_32)]
    assert not find_runs(tensors[:3])


@pytest.mark.parametrize(
    "second",
    [
        tensor("b", LARGE, LARGE),  # large tensors stand alone, so that each may move by itself
        tensor("b", LARGE + 4, LARGE, INTEGERS_8),
        tensor("b", LARGE + (64 << 10), LARGE),
        tensor("b", LARGE + 2, LARGE),
    ],
)
def test_neighbours_that_are_not_alike_are_cut_apart(second: Tensor) -> None:
    assert [run.name for run in find_runs([tensor("a", 0, LARGE), second])] == ["a", "b"]


def test_bytes_with_two_names_are_cut_once() -> None:
    assert [run.name for run in find_runs([tensor("a", 0, LARGE), tensor("tied", 0, LARGE)])] == ["a"]


def written(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).write_bytes(data)
    return folder


def test_onnx_tensors_are_found_in_the_file_and_beside_it(tmp_path: Path) -> None:
    inside = helper.make_tensor("inside", TensorProto.BFLOAT16, [3], b"abcdef", raw=True)
    outside = TensorProto(name="outside", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "w.data", "offset": "16", "length": "8"}.items():
        outside.external_data.add(key=key, value=value)
    onnx.save(helper.make_model(helper.make_graph([], "g", [], [], initializer=[inside, outside])), tmp_path / "m.onnx")
    written(tmp_path, "w.data", bytes(24))
    first, second = find_tensors(tmp_path, ["m.onnx", "w.data"])
    assert (tmp_path / "m.onnx").read_bytes()[first.offset : first.offset + first.length] == b"abcdef"
    assert first.numbers == BFLOAT_16
    assert second == Tensor("m.onnx:outside", "w.data", 16, 8, FLOAT_32)
    assert len(find_tensors(tmp_path, ["m.onnx"])) == 1  # what lies outside the artifact is nobody's


def test_safetensors_are_found(tmp_path: Path) -> None:
    header = json.dumps(
        {"__metadata__": {"a": "b"}, "w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    ).encode()
    written(tmp_path, "m.safetensors", struct.pack("<Q", len(header)) + header + b"12345678")
    assert find_tensors(tmp_path, ["m.safetensors"]) == [Tensor("w", "m.safetensors", 8 + len(header), 8, FLOAT_32)]


def test_tflite_tensors_are_found() -> None:
    tensors = find_tensors(MODELS / "digits-int8", ["model.tflite"])
    assert len(tensors) > 5
    assert max(tensor.length for tensor in tensors) == 36864
    assert INTEGERS_8 in {tensor.numbers for tensor in tensors}


@given(
    data=st.binary(max_size=400), at=st.integers(0, 1 << 16), suffix=st.sampled_from(["onnx", "tflite", "safetensors"])
)
def test_a_file_that_is_none_of_its_kind_is_cut_evenly(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, at: int, suffix: str
) -> None:
    folder = tmp_path_factory.mktemp("model")
    sample = (MODELS / "digits-int8" / "model.tflite").read_bytes() if suffix == "tflite" else b""
    at = min(at, len(sample))
    name = f"m.{suffix}"
    written(folder, name, sample[:at] + data + sample[at + len(data) :])
    length = (folder / name).stat().st_size
    assert all(0 <= found.offset <= found.offset + found.length <= length for found in find_tensors(folder, [name]))
