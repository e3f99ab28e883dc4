"""Models that mean harm, opened as a worker opens them: the worst that may happen is the end of the one who opened."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from models.channel import Ready
from models.request import Dialect, Request
from tests.fakes import tflite_graph
from tests.fakes.onnx_graph import added_weights, endless, graph_of, model_of, node, part
from tests.fakes.samples import MODELS, manifest_of
from tests.fakes.worker_process import WorkerProcess
from tests.support.confined import ANSWERED, HUNG, End, Job, open_all
from tests.support.mutant_loader import load
from tests.support.mutants import mutant

SURVIVED = {"refused", "failed"}
CRASHING = ("digits-int8", 1_000_003 + 14_078)
"""A mutant that ends LiteRT 2.3 by SIGSEGV while it opens."""
ROW = '{"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}]}'


def info(name: str, kind: int = TensorProto.FLOAT, shape: list[int | str] | None = None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def graph(
    nodes: list[onnx.NodeProto], inputs: list[onnx.ValueInfoProto], tensors: list[onnx.TensorProto], opset: int = 17
) -> bytes:
    made = helper.make_graph(nodes, "g", inputs, [info("y")], tensors)
    sets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return bytes(helper.make_model(made, opset_imports=sets, ir_version=8).SerializeToString())


def weights(dims: list[int]) -> bytes:
    """Return a graph whose only tensor claims to have these sizes and has four numbers."""
    tensor = onnx.TensorProto(name="w", data_type=TensorProto.FLOAT, dims=dims, raw_data=b"\0" * 16)
    return graph([helper.make_node("Identity", ["w"], ["y"])], [info("x", shape=[1])], [tensor])


def quantised_product() -> bytes:
    """Return a product of 4-bit weights whose attributes say more than its tensors hold."""
    tensors = [
        numpy_helper.from_array(np.zeros((1, 1, 1), "u1"), "b"),
        numpy_helper.from_array(np.zeros(1, "f4"), "s"),
    ]
    product = helper.make_node(
        "MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft", K=4096, N=4096, bits=4, block_size=32
    )
    return graph([product], [info("x", shape=[1, 4096])], tensors)


def attention() -> bytes:
    """Return attention that claims hidden sizes beyond its weights."""
    tensors = [
        numpy_helper.from_array(np.zeros((64, 192), "f4"), "w"),
        numpy_helper.from_array(np.zeros(192, "f4"), "b"),
    ]
    attending = helper.make_node(
        "Attention", ["x", "w", "b"], ["y"], domain="com.microsoft", num_heads=2, qkv_hidden_sizes=[1 << 20] * 3
    )
    return graph([attending], [info("x", shape=[1, 4, 64])], tensors)


def resize() -> bytes:
    """Return a picture's enlargement by more scales than the picture has sides."""
    scales = numpy_helper.from_array(np.ones(4096, "f4"), "s")
    return graph([helper.make_node("Resize", ["x", "", "s"], ["y"])], [info("x", shape=[1, 1, 2, 2])], [scales], 18)


def doubled(depth: int) -> bytes:
    """Return choices within choices, both branches of each the same: two to the depth in all."""
    leaf = helper.make_node("Constant", [], ["k0"], value=numpy_helper.from_array(np.ones(1, "f4")))
    plain = inner = helper.make_graph([leaf], "leaf", [], [info("k0", shape=[1])])
    for level in range(1, depth + 1):
        choice = helper.make_node("If", ["c"], [f"k{level}"])
        choice.attribute.extend(helper.make_attribute(name, inner) for name in ("then_branch", "else_branch"))
        inner = helper.make_graph([choice], f"n{level}", [], [info(f"k{level}", shape=[1])])
    outer = helper.make_node("If", ["c"], ["y"])
    outer.attribute.append(helper.make_attribute("then_branch", inner))
    outer.attribute.append(helper.make_attribute("else_branch", plain))
    return graph([outer], [info("c", TensorProto.BOOL, [])], [])


def deep(depth: int) -> bytes:
    """Return choices within choices, deeper than any library would write them."""
    inner = graph_of([], [], [])
    for _ in range(depth):
        inner = graph_of([node("If", ["c"], ["y"], [part(1, "then_branch") + part(6, inner)])], [], [])
    return model_of(inner)


def job(folder: Path, name: str, data: bytes, question: str = "") -> Job:
    """Lay a graph into a folder of its own."""
    layout = "tflite" if name.startswith("tflite") else "onnx"
    made = folder / name
    made.mkdir()
    (made / f"model.{layout}").write_bytes(data)
    return Job(str(made), format=layout, question=question)


def tensor(name: str, shape: list[int]) -> str:
    """Return a question of zeros."""
    data = {"name": name, "shape": shape, "datatype": "FP32", "data": [0.0] * int(np.prod(shape))}
    return json.dumps({"inputs": [data]})


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, End]:
    """Return how each hostile model ended; all are opened in one program, since its start takes longest."""
    folder = tmp_path_factory.mktemp("hostile")
    jobs = [*onnx_jobs(folder), *tflite_jobs(folder), *tokenizer_jobs(folder)]
    return {Path(job.folder).name: end for job, end in zip(jobs, open_all(jobs), strict=True)}


def onnx_jobs(folder: Path) -> list[Job]:
    return [
        job(folder, "e1-endless", endless(), ROW),
        job(folder, "e4-overflow", weights([1 << 62, 8])),
        job(folder, "e4-negative", weights([-1])),
        job(folder, "e4-rank", weights([1] * 1_000_000)),
        job(folder, "e5-product", quantised_product(), tensor("x", [1, 4096])),
        job(folder, "e5-attention", attention(), tensor("x", [1, 4, 64])),
        job(folder, "e5-resize", resize(), tensor("x", [1, 1, 2, 2])),
        job(folder, "e6-doubled", doubled(12)),
        job(folder, "e6-deep", deep(1000)),
        job(folder, "e7-empty", b""),
        job(folder, "e7-cut", weights([4])[:40]),
        job(folder, "e7-random", random.Random(1).randbytes(4096)),
        sparse(job(folder, "e7-huge", b""), "model.onnx", (2 << 30) + 1),
    ]


def sparse(made: Job, name: str, size: int) -> Job:
    """Let a file claim a size that it does not take on the disk."""
    with (Path(made.folder) / name).open("wb") as file:
        file.truncate(size)
    return made


def test_e1_a_graph_that_never_ends_is_ended(found: dict[str, End]) -> None:
    assert [found[name].end for name in ("e1-endless", "tflite-endless")] == [HUNG, HUNG]


def test_e4_sizes_that_overflow_are_refused(found: dict[str, End]) -> None:
    for name in ("e4-overflow", "e4-negative", "e4-rank"):
        assert (found[name].end, bool(found[name].words)) == ("refused", True), name


def test_e5_attributes_beyond_what_the_tensors_hold_are_an_error(found: dict[str, End]) -> None:
    for name in ("e5-product", "e5-attention", "e5-resize"):
        assert found[name].end in SURVIVED, found[name]
        assert found[name].words


def test_e6_graphs_within_graphs_are_bounded(found: dict[str, End]) -> None:
    assert found["e6-deep"].end == "refused"
    assert found["e6-doubled"].end in SURVIVED | {ANSWERED, HUNG}


def test_e7_what_is_no_whole_graph_is_refused_within_a_second(found: dict[str, End]) -> None:
    for name in ("e7-empty", "e7-cut", "e7-random", "e7-huge"):
        assert found[name].end == "refused", found[name]
        assert found[name].seconds < 1


def zero_shape(model: Any) -> None:
    for tensor in model.subgraphs[0].tensors:
        tensor.shape = [0 for _ in tensor.shape]


def no_weights(model: Any) -> None:
    for buffer in model.buffers:
        buffer.data = None


def far_buffers(model: Any) -> None:
    for tensor in model.subgraphs[0].tensors:
        tensor.buffer = 0x7FFFFFFF


def far_inputs(model: Any) -> None:
    model.subgraphs[0].inputs = [0x7FFFFFFF]


def far_tensors(model: Any) -> None:
    for operator in model.subgraphs[0].operators:
        operator.inputs = [0x7FFFFFFE for _ in operator.inputs]


def foreign_operators(model: Any) -> None:
    for code in model.operatorCodes:
        code.builtinCode, code.deprecatedBuiltinCode, code.customCode = 32, 32, "Evil"


def zero_strides(model: Any) -> None:
    for operator in model.subgraphs[0].operators:
        for name in ("strideW", "strideH", "filterWidth", "filterHeight", "dilationWFactor", "dilationHFactor"):
            if hasattr(operator.builtinOptions, name):
                setattr(operator.builtinOptions, name, 0)


BENDS: list[Callable[[Any], None]] = [
    zero_shape,
    no_weights,
    far_buffers,
    far_inputs,
    far_tensors,
    foreign_operators,
    zero_strides,
]


def tflite_jobs(folder: Path) -> list[Job]:
    source = MODELS / "digits-int8" / "model.tflite"
    jobs = [job(folder, f"tflite-{bend.__name__}", tflite_graph.bent(source, bend)) for bend in BENDS]
    jobs.append(job(folder, "tflite-mutant", mutant(source.read_bytes(), "tflite", CRASHING[1])))
    return [*jobs, job(folder, "tflite-endless", tflite_graph.endless(), ROW)]


@pytest.mark.parametrize("bend", BENDS, ids=lambda bend: bend.__name__)
def test_e8_a_bent_tflite_graph_is_answered_refused_or_ends_its_worker(
    found: dict[str, End], bend: Callable[[Any], None]
) -> None:
    end = found[f"tflite-{bend.__name__}"].end
    assert end in {*SURVIVED, ANSWERED} or end.startswith("SIG")


def test_e9_an_operator_that_needs_foreign_code_is_refused(found: dict[str, End]) -> None:
    assert found["tflite-foreign_operators"].end == "refused"


def test_e8_a_model_that_crashes_its_runtime_ends_its_worker_alone(tmp_path: Path) -> None:
    source = MODELS / CRASHING[0] / "model.tflite"
    (tmp_path / "model.tflite").write_bytes(mutant(source.read_bytes(), "tflite", CRASHING[1]))
    with WorkerProcess() as worker, pytest.raises((ConnectionError, AssertionError)):
        assert isinstance(worker.open(tmp_path, manifest_of(tmp_path, {"task": "tensors", "format": "tflite"})), Ready)


@pytest.mark.parametrize("name", ["digits-int8", "sea-temperature"])
def test_e8_mutants_of_a_model_are_answered_refused_or_end_their_child(name: str) -> None:
    """A few of those that `make test-mutants` opens."""
    counted = load(name, 3, 0, 40, None)
    assert sum(counted.values()) == 40
    assert counted["refused"] > 0
    assert not any(end.startswith("exit") for end in counted)


def tokenizer(**changes: object) -> dict[str, Any]:
    known: dict[str, Any] = json.loads((MODELS / "language" / "tokenizer.json").read_bytes())
    return {**known, **changes}


def language(folder: Path, name: str, raw: bytes, question: str = "Guten Tag") -> Job:
    """Lay the language model into a folder, with another tokenizer."""
    made = folder / name
    shutil.copytree(MODELS / "language", made, ignore=shutil.ignore_patterns("*.toml", "*.md", "golden"))
    (made / "tokenizer.json").write_bytes(raw)
    return Job(str(made), task="text-classification", question=question)


def tokenizer_jobs(folder: Path) -> list[Job]:
    regex = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"}
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    many = [{"id": 100_000 + at, "content": f"<added {at}>", **token} for at in range(30_000)]
    return [
        language(folder, "e10-panic", b'{"decoder":[}}}'),
        language(folder, "e10-deep", b"[" * 1_000_000),
        language(folder, "e10-regex", json.dumps(tokenizer(normalizer=regex)).encode(), "a" * 40 + "!"),
        language(folder, "e10-many", json.dumps(tokenizer(added_tokens=many)).encode()),
        sparse(language(folder, "e10-huge", b""), "tokenizer.json", 1 << 30),
    ]


def test_e10_a_tokenizer_that_means_harm_is_refused_fails_or_is_ended(found: dict[str, End]) -> None:
    for name in ("e10-panic", "e10-deep", "e10-huge"):
        assert found[name].end == "refused", found[name]
    assert found["e10-huge"].seconds < 1
    assert found["e10-regex"].end in {*SURVIVED, HUNG}
    assert found["e10-many"].end in {*SURVIVED, HUNG, ANSWERED}


def asked(values: list[float]) -> Request:
    body = {"inputs": [{"name": "x", "shape": [1, len(values)], "datatype": "FP32", "data": values}]}
    return Request(
        model="m", content_type="application/json", body=json.dumps(body).encode(), dialect=Dialect.OPEN_INFERENCE
    )


def test_e17_weights_that_are_cut_off_under_a_worker_end_that_worker_alone(tmp_path: Path) -> None:
    size = 1 << 16
    np.ones(size, "<f4").tofile(tmp_path / "weights.bin")
    (tmp_path / "model.onnx").write_bytes(added_weights("weights.bin", size))
    manifest = manifest_of(tmp_path, {"task": "tensors", "format": "onnx"})
    with WorkerProcess() as worker:
        assert isinstance(worker.open(tmp_path, manifest), Ready)
        with (tmp_path / "weights.bin").open("r+b") as file:
            file.truncate(0)
        with pytest.raises(ConnectionError):
            worker.ask(asked([0.0] * size))
        assert worker.process.wait(10) < 0


def test_e9_a_library_beside_a_model_is_never_loaded(tmp_path: Path) -> None:
    for path in (MODELS / "sea-temperature").glob("*.*"):
        shutil.copy(path, tmp_path)
    library = next(line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libc.so" in line)
    for name in ("libcustom.so", "libonnxruntime.so", "model.so"):
        shutil.copy(library, tmp_path / name)
    manifest = manifest_of(tmp_path, {"task": "tabular-regression", "format": "onnx"})
    with WorkerProcess() as worker:
        assert isinstance(worker.open(tmp_path, manifest), Ready)
        assert str(tmp_path) not in Path(f"/proc/{worker.process.pid}/maps").read_text()
