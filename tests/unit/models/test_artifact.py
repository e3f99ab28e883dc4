"""An artifact's files are read inside its folder alone, and through no link (E3)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from models.artifact import Artifact
from models.errors import ModelError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inside = tmp_path / "inside"
    (inside / "sub").mkdir(parents=True)
    (inside / "a.bin").write_bytes(b"one")
    (inside / "sub" / "b.bin").write_bytes(b"two")
    (inside / "empty").touch()
    (tmp_path / "secret").write_bytes(b"secret")
    return inside


def test_listed_files_are_read_and_mapped(folder: Path) -> None:
    with Artifact(folder, ["a.bin", "sub/b.bin", "empty"]) as artifact:
        assert artifact.read("a.bin", 3) == b"one"
        assert bytes(artifact.map("sub/b.bin")) == b"two"
        assert artifact.map("empty") == b""


def test_a_file_that_is_not_listed_is_not_there(folder: Path) -> None:
    with Artifact(folder, []) as artifact, pytest.raises(ModelError, match="not among"):
        artifact.read("a.bin", 3)


def test_a_file_over_its_limit_is_refused(folder: Path) -> None:
    with Artifact(folder, ["a.bin"]) as artifact, pytest.raises(ModelError, match="limit"):
        artifact.read("a.bin", 2)


@pytest.mark.parametrize("path", ["../secret", "sub/../../secret", "/etc/passwd", "sub//b.bin", ".."])
def test_e3_a_path_that_leaves_the_folder_is_refused(folder: Path, path: str) -> None:
    with Artifact(folder, [path]) as artifact, pytest.raises(ModelError):
        artifact.read(path, 100)


def test_e3_links_pipes_and_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "soft").symlink_to(tmp_path / "secret")
    (folder / "door").symlink_to(tmp_path)
    os.link(tmp_path / "secret", folder / "hard")
    os.mkfifo(folder / "pipe")
    paths = ["soft", "door/secret", "hard", "pipe", "sub"]
    with Artifact(folder, paths) as artifact:
        for path in paths:
            with pytest.raises(ModelError):
                artifact.read(path, 100)


def test_a_folder_that_is_a_link_or_missing_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    for wrong in (tmp_path / "link", tmp_path / "none"):
        with pytest.raises(ModelError, match="folder"):
            Artifact(wrong, [])


def test_a_file_is_named_by_preference_or_by_being_the_only_one(folder: Path) -> None:
    with Artifact(folder, ["a.bin", "sub/b.bin", "empty"]) as artifact:
        assert artifact.named("a.bin", suffix=".bin") == "a.bin"
        assert artifact.named("c", "empty") == "empty"
        with pytest.raises(ModelError, match="has 2"):
            artifact.named("model.bin", suffix=".bin")


@pytest.mark.parametrize("data", [b"[1]", b"{", b"\xff", b"[" * 100_000, b'{"a": 1e400}'])
def test_a_configuration_that_is_no_object_is_the_models_fault(folder: Path, data: bytes) -> None:
    (folder / "config.json").write_bytes(data)
    with Artifact(folder, ["config.json"]) as artifact, pytest.raises(ModelError, match=r"config\.json"):
        artifact.read_json("config.json")


def test_a_missing_configuration_has_no_members(folder: Path) -> None:
    with Artifact(folder, []) as artifact:
        assert artifact.read_json("config.json") == {}
