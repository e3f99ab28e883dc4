from __future__ import annotations

from pathlib import Path

import pytest

from agent import exits
from agent.cli import main

RIGHT = """
[device]
name = "kitchen"
[local]
[repository]
url = "file:///srv/models"
"""


def test_a_right_configuration_is_said_to_be_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "spillway.toml"
    root = tmp_path / "root.json"
    root.write_text("{}")
    path.write_text(RIGHT.replace("/srv/models", str(tmp_path)) + f'root = "{root}"')
    assert main(["check", "--config", str(path)]) == 0
    assert "right, for device kitchen" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["check", "run"])
def test_a_wrong_configuration_exits_78_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    path = tmp_path / "spillway.toml"
    path.write_text(RIGHT.replace("name", "nam"))
    assert main([command, "--config", str(path)]) == 78
    told = capsys.readouterr().err
    assert told.startswith(f"spillway: {path}: unknown key `device.nam`")
    assert len(told.splitlines()) == 1


def test_a_configuration_that_is_not_there_exits_78(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--config", str(tmp_path / "nowhere.toml")]) == 78
    assert "No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["digits", "hello"], "which box?"),
        (["digits", "hello", "--device", "Kitchen"], "'Kitchen'"),
        (["digits", "hello", "--device", "handoff"], "'handoff'"),
        (["Digits", "hello", "--device", "kitchen"], "'Digits'"),
        (["digits@3", "hello", "--device", "kitchen"], "without its version: digits"),
        (["digits", "hello", "--device", "kitchen", "--client", "me+you"], "'me+you'"),
        (["digits", "@/no/such/file", "--device", "kitchen"], "No such file"),
    ],
)
def test_a_question_that_cannot_be_asked_is_refused_in_words(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exits, "DEFAULT_PATH", tmp_path / "not-there.toml")
    assert main(["ask", *arguments]) == 1
    told = capsys.readouterr().err
    assert words in told
    assert told.startswith("spillway: ")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dance"],
        ["ask", "digits"],
        ["ask", "digits", "x", "--priority", "10"],
        ["ask", "digits", "x", "--port", "0"],
    ],
)
def test_words_that_are_no_command_exit_2_with_the_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: spillway" in capsys.readouterr().err


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.strip()[0].isdigit()
