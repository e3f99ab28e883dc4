"""Models' folders as they are exported: planned, laid out, judged, published and taken by a box."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cloud_sync.fleet.cli import main
from cloud_sync.fleet.errors import FleetError
from cloud_sync.fleet.source import read_source
from cloud_sync.objects_file import FileObjects
from models.evaluate import Answered, judge_answer
from models.manifest import BoxFacts, Manifest, parse_manifest, pick_variant, variant_golden
from models.record import answer_golden
from models.session import open_session
from tests.fakes.fleets import Fleet, outcome_of, sync

SAMPLES = Path(__file__).resolve().parents[2] / "examples" / "models"
INPUTS = SAMPLES.parent / "inputs"
RECORDED = Path(__file__).resolve().parents[1] / "reference" / "recorded"
WIDTH = 512


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


def bare(sample: str, folder: Path, *names: str) -> Path:
    """An example's files without its description, as an exporter would leave them."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(SAMPLES / sample / Path(name).name, folder / name)
    return folder


def digits(folder: Path) -> Path:
    bare("digits", folder, "config.json", "preprocessor_config.json", "onnx/model.onnx")
    (folder / "README.md").write_text("---\npipeline_tag: image-classification\n---\n")
    return folder


def labelled(path: Path, wrong: int = 0) -> Path:
    """The ten example digits as a labelled set, the first `wrong` of them labelled wrong."""
    for number in range(10):
        shutil.copyfile(INPUTS / f"digit-{number}.png", path.parent / f"{number}.png")
    lines = [{"file": f"{at}.png", "label": str((at + 1) % 10 if at < wrong else at)} for at in range(10)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def large_graph(path: Path, layers: int = 2) -> Path:
    """A graph with 1 MiB of weights a layer, in one file."""
    weights = np.random.default_rng(3).normal(size=(layers, WIDTH, WIDTH)).astype(np.float32)
    tensors = [numpy_helper.from_array(one, f"w{at}") for at, one in enumerate(weights)]
    row = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDTH]) for name in ("x", "y")]
    between = ["x", *(f"h{at}" for at in range(1, layers)), "y"]
    nodes = [helper.make_node("MatMul", [between[at], f"w{at}"], [between[at + 1]]) for at in range(layers)]
    graph = helper.make_graph(nodes, "g", row[:1], row[1:], tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def staged(fleet: Fleet, **box: Any) -> tuple[Path, Manifest, str]:
    """What a box has of the one model that is deployed: its folder, its manifest and its variant."""
    settings = fleet.settings(box=BoxFacts("x86_64", {"onnxruntime": "1.32"}, **box)) if box else fleet.settings()
    code, events = sync(settings)
    assert code == 0, events
    model = outcome_of(events).models[0]
    assert model.staged, model.error
    folder = Path(model.folder)
    return folder, parse_manifest((folder / "manifest.json").read_bytes()), model.variant


def shown(fleet: Fleet) -> dict[str, str]:
    found: dict[str, str] = fleet.run("show")["models"]
    return found


def test_a_folder_as_it_was_exported_is_published_and_answers_its_golden_sample_on_a_box(fleet: Fleet) -> None:
    folder = digits(fleet.folder / "Digits Net")
    (folder / "pytorch_model.bin").write_bytes(b"weights")
    report = fleet.run("publish", str(folder))
    assert (report["model"], report["version"], report["task"]) == ("digits-net", "1", "image-classification")
    assert report["task_from"] == "README.md: pipeline_tag image-classification"
    assert report["left_out"] == {"pytorch_model.bin": "weights of PyTorch"}
    fleet.run("deploy", "all", "digits-net=1")
    place, manifest, variant = staged(fleet)
    assert {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()} == {
        "config.json",
        "manifest.json",
        "onnx/model.onnx",
        "preprocessor_config.json",
    }
    golden = variant_golden(manifest, variant)
    session = open_session(
        place, manifest, pick_variant(manifest, BoxFacts("x86_64", {"onnxruntime": "1"})), threads=1, slots=1
    )
    bodies = [answer_golden(session, manifest, one) for one in golden]
    session.close()
    assert golden
    assert all(
        judge_answer(manifest.task, Answered(one, body, 1.0)) is None for one, body in zip(golden, bodies, strict=True)
    )


def test_the_reference_s_folders_are_read_as_the_tasks_that_they_are() -> None:
    folders = sorted(path.parent for path in RECORDED.glob("*/config.json") if (path.parent / "cases.json").exists())
    wanted = {folder.name: json.loads((folder / "cases.json").read_bytes())["task"] for folder in folders}
    named = {name for name in wanted if json.loads((RECORDED / name / "config.json").read_bytes()).get("architectures")}
    told = {name for name in named if wanted[name] != "summarization"}
    assert len(told) > 30
    assert {name: read_source(RECORDED / name).description.task for name in told} == {
        name: wanted[name] for name in told
    }
    for name in named - told:
        with pytest.raises(FleetError, match="--task translation or --task summarization"):
            read_source(RECORDED / name)


def test_a_text_that_is_too_long_for_a_small_model_is_left_out_of_its_golden_samples(fleet: Fleet) -> None:
    folder = str(RECORDED / "feature-extraction-xlm-roberta")
    assert fleet.run("publish", folder, "--dry-run")["golden"] == 1


def test_the_same_folder_again_makes_no_new_version_and_a_changed_one_the_next(fleet: Fleet) -> None:
    folder = digits(fleet.folder / "digits")
    assert fleet.run("publish", str(folder))["published"]
    again = fleet.run("publish", str(folder))
    assert (again["published"], again["same_as"]) == (False, "1")
    assert fleet.run("publish", str(folder), "--golden", "none")["version"] == "2"
    assert set(shown(fleet)) == {"digits@1", "digits@2"}


def test_a_dry_run_tells_all_writes_nothing_and_needs_no_fleet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = digits(tmp_path / "digits")
    before = sorted(path for path in tmp_path.rglob("*"))
    assert main(["publish", str(folder), "--dry-run", "--json", "--home", str(tmp_path / "none")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["variants"]["default"]["files"]) == {"config.json", "preprocessor_config.json", "onnx/model.onnx"}
    assert (report["golden"], report["limits"], report["published"]) == (1, {"batch": 8}, False)
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_a_lone_graph_is_published_as_tensors_with_zeros_for_its_golden_sample(fleet: Fleet) -> None:
    report = fleet.run("publish", str(SAMPLES / "digits-int8" / "model.tflite"), "--name", "net")
    assert (report["task"], report["golden"], report["files"]) == ("tensors", 1, 1)
    assert report["variants"]["default"]["requires"] == {"backend": "litert"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--task", "feature-extraction"], "--golden none publishes without one"),
        (["--task", "guessing"], "is none of text-classification"),
        (["--variants", "q4"], "the folder has default"),
        (["--golden", "question.csv"], "is none of .json"),
    ],
)
def test_what_cannot_be_published_is_refused_with_what_to_type(fleet: Fleet, arguments: list[str], says: str) -> None:
    code, report = fleet.ask("publish", str(digits(fleet.folder / "digits")), *arguments)
    assert code == 1
    assert says in report["error"]["message"]
    assert not shown(fleet)


def test_large_weights_are_laid_out_to_be_mapped_and_answers_stay(fleet: Fleet) -> None:
    path = large_graph(fleet.folder / "net" / "model.onnx")
    assert fleet.run("publish", str(path), "--name", "net")["published"]
    assert fleet.run("publish", str(path), "--name", "net")["same_as"] == "1"
    fleet.run("deploy", "all", "net=1")
    place, manifest, _ = staged(fleet)
    assert {path.name for path in place.iterdir()} == {"manifest.json", "model.onnx", "model.onnx.data"}
    assert (place / "model.onnx").stat().st_size < 10_000
    assert answers(place, manifest) == answers(
        path.parent, msgspec.structs.replace(manifest, variants=[alone(manifest)])
    )


def alone(manifest: Manifest) -> Any:
    """The variant of a graph in one file."""
    return msgspec.structs.replace(manifest.variants[0], files=["model.onnx"])


def answers(folder: Path, manifest: Manifest) -> list[bytes]:
    session = open_session(folder, manifest, manifest.variants[0], threads=1, slots=1)
    try:
        return [answer_golden(session, manifest, golden) for golden in manifest.golden]
    finally:
        session.close()


def test_a_box_takes_the_best_variant_that_fits_it_and_is_asked_that_variant_s_samples(fleet: Fleet) -> None:
    folder = large_graph(fleet.folder / "net" / "model.onnx").parent
    large_graph(folder / "model_quantized.onnx", layers=1)
    report = fleet.run("publish", str(folder))
    least_mb = [report["variants"][name]["requires"]["memory_mb"] for name in ("default", "quantized")]
    assert least_mb[0] > least_mb[1]
    fleet.run("deploy", "all", "net=1")
    place, manifest, variant = staged(fleet, memory_mb=least_mb[0])
    assert variant == "default"
    assert [golden.variants for golden in variant_golden(manifest, "quantized")] == [["quantized"]]
    assert variant_golden(manifest, "quantized")[0].expected != variant_golden(manifest, "default")[0].expected
    assert not (place / "model_quantized.onnx").exists()
    assert pick_variant(manifest, BoxFacts("aarch64", {"onnxruntime": "1"}, memory_mb=least_mb[1])).name == "quantized"


def test_variants_are_made_judged_side_by_side_and_what_falls_under_the_gate_is_not_published(fleet: Fleet) -> None:
    folder = digits(fleet.folder / "digits")
    data = labelled(fleet.folder / "data.jsonl")
    out = fleet.folder / "made"
    made = fleet.run(
        "optimize", str(folder), "--out", str(out), "--variants", "int8-static,pruned-90", "--calibration", str(data)
    )
    assert list(made["variants"]) == ["default", "int8-static", "pruned-90"]
    assert made["variants"]["int8-static"]["bytes"] < made["variants"]["default"]["bytes"] / 2
    code, report = fleet.ask(
        "evaluate", str(out), "--data", str(data), "--max-drop", "0.05", "--plot", str(fleet.folder / "plot.svg")
    )
    assert code == 1
    assert list(report["refused"]) == ["pruned-90"]
    assert report["variants"]["default"]["accuracy"] == 1.0
    assert (fleet.folder / "plot.svg").read_text().startswith("<svg")
    assert report["refused"]["pruned-90"][0].startswith("gate.max_drop: accuracy")
    passed = ["--variants", "default,int8-static", "--max-drop", "0.05"]
    report = fleet.run("publish", str(out), "--name", "digits", "--data", str(data), *passed)
    assert report["evaluation"]["variants"]["int8-static"] == {"accuracy": 1.0, "macro_f1": 1.0, "samples": 10}
    fleet.run("deploy", "all", "digits=1")
    provenance: Any = staged(fleet)[1].provenance
    assert provenance["evaluation"]["data"] == "data.jsonl"
    assert provenance["steps"][0].startswith("int8-static: ")


def test_a_gate_without_a_labelled_set_publishes_nothing(fleet: Fleet) -> None:
    folder = digits(fleet.folder / "digits")
    (folder / "spillway.toml").write_text('task = "image-classification"\n[gate]\nleast = { accuracy = 0.95 }\n')
    code, report = fleet.ask("publish", str(folder))
    assert code == 1
    assert "add --data FILE" in report["error"]["message"]
    code, report = fleet.ask("publish", str(folder), "--data", str(labelled(fleet.folder / "data.jsonl", wrong=1)))
    assert code == 1
    assert "gate.least.accuracy: 0.9 is under 0.95" in report["error"]["message"]
    assert not shown(fleet)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (['{"inputs": 1}'], "label is missing"),
        (['{"label": 1}'], "neither inputs, messages nor file"),
        (['{"file": "no.png", "label": 1}'], "cannot be read"),
        (["{"], "line 1"),
        ([], "holds no samples"),
        (['{"inputs": "text", "label": "1"}'], "no sample was answered: bad_request"),
    ],
)
def test_a_set_that_is_none_is_refused_by_its_line(fleet: Fleet, lines: list[str], says: str) -> None:
    data = fleet.folder / "data.jsonl"
    data.write_text("\n".join(lines))
    code, report = fleet.ask("evaluate", str(digits(fleet.folder / "digits")), "--data", str(data))
    assert code == 1
    assert says in report["error"]["message"]


def test_what_cannot_be_made_smaller_says_where_it_can(fleet: Fleet) -> None:
    def refusal(path: Path, variants: str) -> str:
        code, report = fleet.ask("optimize", str(path), "--out", str(fleet.folder / "out"), "--variants", variants)
        assert code == 1
        message: str = report["error"]["message"]
        return message

    assert "compressed where it is made" in refusal(SAMPLES / "digits-int8", "int4")
    assert "its builder quantises" in refusal(SAMPLES / "assistant", "int4")
    assert "'int3' is none of graph" in refusal(digits(fleet.folder / "a"), "int3")
    assert "add --calibration FILE" in refusal(digits(fleet.folder / "b"), "int8-static")
    assert not (fleet.folder / "out").exists()


class Killed(BaseException):
    """Ends a publish as `kill -9` does, as far as the bucket can tell."""


def test_a_publish_that_is_killed_at_any_write_shows_nothing_and_goes_through_the_next_time(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bare("sea-temperature", fleet.folder / "sea", "config.json", "model.onnx")
    publish = ["publish", str(folder), "--task", "tabular-regression", "--golden", "none", "--version", "1"]
    put = FileObjects.put
    left = 0

    def dying(self: FileObjects, *arguments: Any, **options: Any) -> str:
        nonlocal left
        if not left:
            raise Killed
        done = put(self, *arguments, **options)
        left -= 1
        return done

    for writes in range(20):
        left = writes
        with monkeypatch.context() as patch:
            patch.setattr(FileObjects, "put", dying)
            try:
                fleet.run(*publish)
                break
            except Killed:
                pass
        assert not shown(fleet), writes
    assert writes >= 3
    assert set(shown(fleet)) == {"sea@1"}
