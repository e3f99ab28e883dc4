from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from agent.cli import main
from agent.listing import lines_of
from agent.shelf import Failed, Running, Shelf, ShelfError, load_shelf
from models.manifest import digest_of, manifest_bytes
from tests.fakes.samples import sample


def put(state: Path, name: str, version: str) -> str:
    """Lay a version down as a fetch does; return its digest."""
    import msgspec

    folder, manifest = sample(name)
    raw = manifest_bytes(msgspec.structs.replace(manifest, name=name, version=version))
    digest = digest_of(raw)
    there = state / "versions" / digest
    there.mkdir(parents=True)
    (there / "manifest.json").write_bytes(raw)
    (there / "model.onnx").write_bytes((folder / "model.onnx").read_bytes())
    return digest


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A box that runs digits 2, has 1 to go back to, has staged 3 and failed with 4."""
    digests = {version: put(tmp_path, "digits", version) for version in "1234"}
    database = sqlite3.connect(tmp_path / "state.db")
    database.execute("CREATE TABLE current (model, version, digest, previous_version, previous_digest)")
    database.execute("CREATE TABLE failed (number INTEGER PRIMARY KEY, digest, code, message)")
    database.execute("INSERT INTO current VALUES ('digits', '2', ?, '1', ?)", (digests["2"], digests["1"]))
    database.execute("INSERT INTO failed VALUES (1, ?, 'trial_failed', 'too slow')", (digests["4"],))
    database.commit()
    database.close()
    return tmp_path


def test_every_version_on_the_disk_is_listed_with_what_it_is_there_for(state: Path) -> None:
    told = [(line.version, line.state, line.code) for line in lines_of(None, load_shelf(state))]
    assert told == [("2", "stored", ""), ("1", "previous", ""), ("3", "staged", ""), ("4", "rejected", "trial_failed")]


def test_the_agents_word_comes_before_the_disks(state: Path) -> None:
    shelf = load_shelf(state)
    digest = shelf.running["digits"].digest
    told = {
        "digits": {
            "state": "serving",
            "version": "2",
            "digest": digest,
            "memory_mb": 38.5,
            "target": "4",
            "code": "trial_failed",
        }
    }
    line = lines_of(told, shelf)[0]
    assert (line.state, line.task, line.format, line.variant) == ("serving", "image-classification", "onnx", "default")
    assert (line.memory_mb, line.target, line.code) == (38.5, "4", "trial_failed")
    assert line.disk_mb > 0.2


def test_what_a_model_runs_without_is_noted() -> None:
    told = {"digits": {"state": "serving", "fallbacks": ["cuda: not offered"], "unprotected": ["files: no Landlock"]}}
    (line,) = lines_of(told, Shelf({}, {}, {}))
    assert line.notes == ["runs without cuda: not offered", "not confined: files: no Landlock"]


def test_a_model_whose_version_is_not_on_the_disk_or_whose_first_has_not_come_is_still_listed() -> None:
    shelf = Shelf({"gone": Running("1", "0" * 64, "", "")}, {"x": Failed("a", "b")}, {})
    told = {"new": {"state": "starting", "target": "1", "message": "in trial"}}
    lines = {line.name: line for line in lines_of(told, shelf)}
    assert lines["gone"].state == "missing"
    assert (lines["new"].state, lines["new"].message) == ("starting", "in trial")


def test_a_folder_that_is_not_there_or_damaged_is_told_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ShelfError, match="is not there"):
        load_shelf(tmp_path / "nowhere")
    (tmp_path / "state.db").write_bytes(b"x" * 5000)
    with pytest.raises(ShelfError, match="cannot be read"):
        load_shelf(tmp_path)


def test_a_damaged_manifest_hides_no_other(state: Path) -> None:
    folder = state / "versions" / load_shelf(state).running["digits"].previous_digest
    (folder / "manifest.json").write_bytes(b"{")
    assert [line.version for line in lines_of(None, load_shelf(state))] == ["2", "3", "4"]


CONFIG = """
[device]
name = "kitchen"
[local]
port = 1
[state]
directory = "{state}"
[repository]
url = "file:///srv/models"
"""


def test_the_command_shows_the_disk_where_no_agent_answers_and_says_so(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = state / "spillway.toml"
    config.write_text(CONFIG.format(state=state))
    assert main(["models", "--config", str(config)]) == 0
    told = capsys.readouterr()
    assert "the agent did not answer over 127.0.0.1:1" in told.err
    heads, *lines = told.out.splitlines()
    assert heads.split()[:3] == ["MODEL", "VERSION", "STATE"]
    assert [line.split()[1] for line in lines] == ["2", "1", "3", "4"]
    config.write_text(CONFIG.format(state=state / "nowhere"))
    assert main(["models", "--config", str(config), "--json"]) == 1
