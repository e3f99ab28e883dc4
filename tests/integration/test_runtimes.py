"""What a box's owner may tell its runtimes, and what they do with memory: on the real runtimes, in this process."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from models.artifact import Artifact
from models.backend_settings import BackendSettings, Delegate, OnnxSettings, TfliteSettings
from models.backends import onnx as onnx_backend
from models.backends import tflite as tflite_backend
from models.errors import ModelError
from models.record import answer_alone
from models.request import Dialect, Request
from models.session import open_session
from tests.fakes.onnx_graph import added_weights, fill_asked, not_a_number
from tests.fakes.samples import MODELS, manifest_of
from tests.support.onnx_cases import KINDS, cases, compare

ROW = np.array([[1, 2, 3, 4]], dtype="f4")


def opened(folder: Path, graph: bytes, settings: OnnxSettings | None = None) -> onnx_backend.OnnxBackend:
    (folder / "model.onnx").write_bytes(graph)
    names = [path.name for path in folder.iterdir()]
    with Artifact(folder, names) as artifact:
        return onnx_backend.open_backend(artifact, threads=1, settings=settings)


def lite(settings: TfliteSettings) -> tflite_backend.TfliteBackend:
    folder = MODELS / "digits-int8"
    names = [path.name for path in folder.iterdir() if path.is_file()]
    with Artifact(folder, names) as artifact:
        return tflite_backend.open_backend(artifact, threads=2, settings=settings)


def mapped_mb(name: str) -> float:
    """Return how much of a file this process has mapped, in MiB."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(name):
            first, last = line.split()[0].split("-")
            total += int(last, 16) - int(first, 16)
    return total / (1 << 20)


def own_mb() -> float:
    """Return this process's memory that is nobody else's and no file's, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon:"))


def test_weights_beside_a_graph_are_mapped_and_not_copied(tmp_path: Path) -> None:
    size = 8 << 20
    np.arange(size, dtype="<f4").tofile(tmp_path / "weights.bin")
    before = own_mb()
    backend = opened(tmp_path, added_weights("weights.bin", size))
    assert mapped_mb("weights.bin") >= 32
    assert own_mb() - before < 16
    assert backend.run({"x": np.ones((1, size), "f4")})["y"][0, -1] == size
    backend.close()
    gc.collect()
    assert mapped_mb("weights.bin") == 0


def test_a_graph_with_its_weights_inside_is_held_once(tmp_path: Path) -> None:
    size = 8 << 20
    weights = helper.make_tensor("w", TensorProto.FLOAT, [size], np.ones(size, "<f4").tobytes(), raw=True)
    nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
    given, taken = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size]) for name in "xy")
    graph = helper.make_graph(nodes, "g", [given], [taken], [weights])
    data = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    before = own_mb()
    backend = opened(tmp_path, data)
    del weights, graph
    gc.collect()
    assert own_mb() - before < 48
    assert backend.outputs[0].shape == (None, size)


def test_what_a_large_shape_needed_is_given_back(tmp_path: Path) -> None:
    backend = opened(tmp_path, fill_asked())
    backend.run({"x": np.array([10])})
    before = own_mb()
    assert backend.run({"x": np.array([1 << 25])})["y"].shape == (1 << 25,)
    assert own_mb() - before < 16


def test_e2_an_answer_of_2_to_the_40_elements_is_an_error(tmp_path: Path) -> None:
    backend = opened(tmp_path, fill_asked())
    with pytest.raises(ModelError, match="ONNX Runtime"):
        backend.run({"x": np.array([1 << 40])})
    assert backend.run({"x": np.array([3])})["y"].tolist() == [0, 0, 0]


def test_e2_an_answer_that_no_frame_holds_is_refused_before_it_is_written_out(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(fill_asked())
    manifest = manifest_of(tmp_path, {"task": "tensors", "format": "onnx"})
    session = open_session(tmp_path, manifest, manifest.variants[0], threads=1, slots=1)
    body = b'{"inputs": [{"name": "x", "shape": [1], "datatype": "INT64", "data": [%d]}]}'
    for size, code in ((1 << 26, "model_failed"), (3, "")):
        request = Request(model="m", content_type="application/json", body=body % size, dialect=Dialect.OPEN_INFERENCE)
        piece = answer_alone(session, request)
        assert piece.code == code
        assert ("over the limit" in piece.message) is bool(code)


def test_a_provider_that_this_build_has_not_is_passed_over_with_its_reason(tmp_path: Path) -> None:
    backend = opened(tmp_path, not_a_number(), OnnxSettings(providers=["tensorrt", "cuda", "cpu"]))
    assert [words.split(":")[0] for words in backend.fallbacks] == ["tensorrt", "cuda"]
    assert all("built without it" in words for words in backend.fallbacks)
    assert backend.run({"x": np.ones((1, 1), "f4")})["y"].tolist() == [[0]]


def test_what_stands_behind_the_processor_is_never_tried(tmp_path: Path) -> None:
    assert not opened(tmp_path, not_a_number(), OnnxSettings(providers=["cpu", "cuda"])).fallbacks
    assert not opened(tmp_path, not_a_number()).fallbacks


def test_a_provider_that_fails_to_open_the_graph_gives_way_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No box of the tests has an accelerator, so ONNX Runtime's answers of one that has are played to it."""
    real, tried = ort.InferenceSession, []

    def session(graph: bytes, options: ort.SessionOptions, **words: list[tuple[str, dict[str, str]]]) -> object:
        tried.append([name for name, _ in words["providers"]])
        if "TensorrtExecutionProvider" in tried[-1]:
            raise RuntimeError("the engine cannot be built\nmore")
        return real(graph, options, providers=[("CPUExecutionProvider", {})])

    built = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: built)
    monkeypatch.setattr(ort, "InferenceSession", session)
    settings = OnnxSettings(providers=["tensorrt", "cuda"], options={"cuda": {"gpu_mem_limit": 1 << 30}})
    backend = opened(tmp_path, not_a_number(), settings)
    assert tried == [built, built[1:]]
    assert backend.fallbacks[0] == "tensorrt: the engine cannot be built"
    assert backend.fallbacks[1].startswith("cuda: it could not be started")


def test_a_delegate_that_cannot_be_loaded_is_passed_over_with_its_reason() -> None:
    backend = lite(TfliteSettings(delegates=[Delegate(library="/nowhere/libedgetpu.so.1", options={"device": "usb"})]))
    assert len(backend.fallbacks) == 1
    assert backend.fallbacks[0].startswith("/nowhere/libedgetpu.so.1: ")
    assert backend.run({backend.inputs[0].name: np.zeros((1, 8, 8, 1), "f4")})


def test_xnnpack_can_be_left_out_and_answers_the_same() -> None:
    """Rounding may differ by one step of the answer's scale."""
    with_it, without = lite(TfliteSettings()), lite(TfliteSettings(xnnpack=False))
    image = np.random.default_rng(1).uniform(0, 1, (1, 8, 8, 1)).astype("f4")
    for backend in (with_it, without):
        assert not backend.fallbacks
    (left,), (right,) = (list(b.run({b.inputs[0].name: image}).values()) for b in (with_it, without))
    assert np.abs(left - right).max() < 0.05


def test_a_tflite_graph_is_mapped_and_not_copied() -> None:
    backend = lite(TfliteSettings())
    assert mapped_mb("model.tflite") > 0
    backend.close()
    gc.collect()
    assert mapped_mb("model.tflite") == 0


def typed(kind: onnx.TypeProto, operator: str) -> bytes:
    """Return a graph whose answer is of a type that numpy has not."""
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    node = helper.make_node(operator, ["x"], ["y"])
    if operator == "Cast":
        node.attribute.append(helper.make_attribute("to", TensorProto.BFLOAT16))
    graph = helper.make_graph([node], "g", [given], [onnx.ValueInfoProto(name="y", type=kind)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("kind", "operator", "words"),
    [
        (helper.make_tensor_type_proto(TensorProto.BFLOAT16, [1]), "Cast", r"tensor\(bfloat16\)"),
        (
            helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, [1])),
            "SequenceConstruct",
            r"seq\(tensor\(float\)\)",
        ),
    ],
)
def test_a_graph_whose_answer_nobody_can_carry_is_refused_when_it_is_opened(
    tmp_path: Path, kind: onnx.TypeProto, operator: str, words: str
) -> None:
    (tmp_path / "model.onnx").write_bytes(typed(kind, operator))
    manifest = manifest_of(tmp_path, {"task": "tensors", "format": "onnx"})
    with pytest.raises(ModelError, match=f"output 'y': no request can carry {words}"):
        open_session(tmp_path, manifest, manifest.variants[0], threads=1, slots=1)


def test_the_owners_settings_reach_the_runtime_and_the_session_tells_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(not_a_number())
    manifest = manifest_of(tmp_path, {"task": "tensors", "format": "onnx"})
    settings = BackendSettings(onnx=OnnxSettings(providers=["cuda"]))
    session = open_session(tmp_path, manifest, manifest.variants[0], threads=1, slots=1, backends=settings)
    assert [words.split(":")[0] for words in session.fallbacks] == ["cuda"]


def test_no_case_of_the_onnx_suite_is_lost_that_plain_onnx_runtime_passes() -> None:
    """Those whose graphs lie on the disk, which are quick to load; `make test-onnx-backend` runs them all."""
    counts = compare(cases(kinds=KINDS[1:]))
    assert len(counts.plain) >= 90
    assert counts.lost == []
