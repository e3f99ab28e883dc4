from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from cloud_sync.fleet.describe import describe
from cloud_sync.fleet.errors import FleetError
from tests.fakes.samples import MODELS


def test_a_folder_that_says_all_needs_no_look_into_its_files() -> None:
    manifest = describe(MODELS / "digits")
    assert (manifest.name, manifest.version, manifest.task, manifest.format) == (
        "digits",
        "0",
        "image-classification",
        "onnx",
    )
    assert [variant.name for variant in manifest.variants] == ["default"]
    assert manifest.variants[0].requires.backend == "onnxruntime"
    assert len(manifest.golden) == 3
    assert "golden/three.png" not in manifest.variants[0].files


def test_a_folder_without_a_description_is_told_by_its_files_and_asked_a_default_question(tmp_path: Path) -> None:
    folder = tmp_path / "My Model (v2)"
    shutil.copytree(MODELS / "language", folder)
    (folder / "spillway.toml").write_text('task = "text-classification"\n')
    manifest = describe(folder)
    assert manifest.name == "my-model-v2"
    assert manifest.format == "onnx"
    assert manifest.golden[0].content_type == "text/plain"


def test_a_box_without_the_package_that_looks_into_files_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copyfile(MODELS / "digits" / "model.onnx", tmp_path / "model.onnx")
    monkeypatch.setitem(sys.modules, "cloud_sync.fleet.source", None)
    with pytest.raises(FleetError, match=r"write a spillway\.toml with `task` and `format`"):
        describe(tmp_path)
    assert describe(MODELS / "digits").task == "image-classification"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('task = "x"\nformat = "pickle"', "is none of genai, onnx, tflite"),
        ('task = "x"\nformat = "onnx"\ntypo = 1', "typo"),
        ('task = "x"\nformat = "onnx"\n[[golden]]\nfile = "../../etc/passwd"\ncontent_type = "text/plain"', "outside"),
    ],
)
def test_a_description_that_is_wrong_is_refused_by_its_field(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"x")
    (tmp_path / "spillway.toml").write_text(text)
    with pytest.raises(FleetError, match=told):
        describe(tmp_path)
