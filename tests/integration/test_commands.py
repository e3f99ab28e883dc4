"""The owner's commands on real models, a real broker and this machine: infer, bench, doctor."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
import sqlite3
import subprocess
from pathlib import Path

import msgspec
import pytest

from agent import probes
from agent.cli import main
from agent.opening import OpenError, find_model
from cloud_sync.messages import LinkSettings
from models.manifest import digest_of, manifest_bytes
from tests.fakes.samples import INPUTS, MODELS, sample
from tests.support.mosquitto import Mosquitto

Capture = pytest.CaptureFixture[str]
SECRET = "correct horse battery staple"
CONFIG = """
[device]
name = "kitchen"
[local]
port = {port}
username = "kitchen"
password_file = "{folder}/password"
[state]
directory = "{folder}/state"
[repository]
url = "file://{folder}"
root = "{folder}/root.json"
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A box's configuration, whose state folder holds digits@7."""
    folder, manifest = sample("digits")
    raw = manifest_bytes(msgspec.structs.replace(manifest, name="digits", version="7"))
    state = tmp_path / "state"
    shutil.copytree(folder, state / "versions" / digest_of(raw))
    (state / "versions" / digest_of(raw) / "manifest.json").write_bytes(raw)
    database = sqlite3.connect(state / "state.db")
    database.execute("CREATE TABLE current (model, version, digest, previous_version, previous_digest)")
    database.execute("CREATE TABLE failed (number INTEGER PRIMARY KEY, digest, code, message)")
    database.execute("INSERT INTO current VALUES ('digits', '7', ?, '', '')", (digest_of(raw),))
    database.commit()
    database.close()
    (tmp_path / "root.json").write_text("{}")
    (tmp_path / "password").write_text(SECRET)
    (tmp_path / "password").chmod(0o600)
    path = tmp_path / "spillway.toml"
    path.write_text(CONFIG.format(folder=tmp_path, port=1))
    return path


def test_a_model_of_this_box_and_a_folder_answer_without_a_broker(config: Path, capsys: Capture) -> None:
    picture = f"@{INPUTS / 'digit-3.png'}"
    assert main(["infer", "digits", picture, "--config", str(config)]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)[0]["label"] == "3"
    assert told.err.startswith("[digits@7, onnx default, ")
    assert main(["infer", str(MODELS / "digits-int8"), picture, picture, "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["outputs"][0]["label"] for line in lines] == ["3", "3"]


def test_text_parameters_and_standard_input_are_taken(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["infer", str(MODELS / "language"), "Wo ist der Bahnhof?", "--parameters", '{"top_k": 2}']) == 0
    assert json.loads(capsys.readouterr().out)[0]["label"] == "de"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO((INPUTS / "sea.json").read_bytes())))
    assert main(["infer", str(MODELS / "sea-temperature")]) == 0
    assert json.loads(capsys.readouterr().out)


def test_a_wrong_input_is_named_by_its_field_with_what_the_model_takes(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["infer", str(MODELS / "sea-temperature"), '{"inputs": [1, 2, 3]}']) == 1
    told = capsys.readouterr()
    assert "bad_request: inputs: expected 12 numbers, got 3" in told.err
    assert 'such as: {"inputs": [24.64,' in told.err
    assert main(["infer", str(MODELS / "digits"), "three"]) == 1
    assert "takes: a picture" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert main(["infer", str(MODELS / "digits")]) == 0
    assert "takes: a picture" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["digitz", "x"], "neither a folder nor a model on this box, which has: digits"),
        (["digits@8", "x"], "on its disk there are: digits@7"),
        (["digits", "x", "--variant", "int4"], "there are default"),
        ([str(MODELS / "digits"), "x", "--parameters", "[]"], "--parameters: "),
        ([str(MODELS / "digits"), "@/no/such/file"], "No such file"),
        ([str(INPUTS), "x"], "spillway: "),
    ],
)
def test_what_cannot_be_asked_is_said_with_what_there_is(
    arguments: list[str], told: str, config: Path, capsys: Capture
) -> None:
    assert main(["infer", *arguments, "--config", str(config)]) == 1
    assert told in capsys.readouterr().err


def test_a_generated_text_comes_in_pieces(capsys: Capture) -> None:
    question = '{"messages": [{"role": "user", "content": "What does ls do?"}], "max_tokens": 8}'
    assert main(["infer", str(MODELS / "assistant"), question, "--stream"]) == 0
    told = capsys.readouterr()
    assert told.out.strip()
    assert " out, " not in told.out
    assert "8 out" in told.err


def test_a_model_is_measured_in_the_time_that_is_given(config: Path, capsys: Capture) -> None:
    asked = ["bench", "digits", "--seconds", "0.6", "--threads", "1", "--config", str(config)]
    assert main([*asked, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [cell["in_flight"] for cell in report["cells"]] == [1, 8, 32]
    for cell in report["cells"]:
        assert cell["answers"] > 0
        assert 0 < cell["model_p50_ms"] <= cell["p50_ms"] <= cell["p95_ms"] <= cell["p99_ms"]
    assert report["cells"][2]["mean_batch"] > 1
    assert report["loads"][0]["idle_mb"] > 10
    assert main(["bench", str(MODELS / "digits"), "--input", "no picture", "--seconds", "1"]) == 1
    assert "cannot be measured with this input: bad_request" in capsys.readouterr().err


def test_a_folder_that_is_no_model_says_why(tmp_path: Path) -> None:
    (tmp_path / "spillway.toml").write_text('task = "image-classification"\nformat = "onnx"\ntasks = 1\n')
    with pytest.raises(OpenError, match="tasks"):
        asyncio.run(find_model(str(tmp_path), None))


def test_doctor_finds_a_wrong_password_and_prints_none(config: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "broker").mkdir()
    passwords = tmp_path / "broker" / "passwd"
    passwords.write_text(f"kitchen:{SECRET}\n")
    program = shutil.which("mosquitto_passwd")
    assert program
    subprocess.run([program, "-U", str(passwords)], check=True)
    passwords.chmod(0o644)
    with Mosquitto(tmp_path / "broker", f"allow_anonymous false\npassword_file {passwords}\nuser root") as broker:
        config.write_text(CONFIG.format(folder=tmp_path, port=broker.port))
        right = LinkSettings(port=broker.port, username="kitchen", password_file=str(tmp_path / "password"))
        assert asyncio.run(probes.broker(right, "doctor")) == ""
        (tmp_path / "password").write_text(f"not {SECRET}")
        assert main(["doctor", "--config", str(config), "--json"]) == 1
    told = capsys.readouterr().out
    found = {one["what"]: one for one in json.loads(told)["findings"]}
    assert SECRET not in told
    assert found["local broker"]["level"] == "fault"
    assert "password_file" in found["local broker"]["mend"]
    for what in ("configuration", "repository", "processor", "python", "onnxruntime", "ai-edge-litert", "numpy"):
        assert found[what]["level"] == "ok", found[what]


def test_a_child_that_crashes_or_hangs_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = asyncio.run(probes.run_child("import os, signal; os.kill(os.getpid(), signal.SIGILL); told = 1"))
    assert broken.code == -4
    assert asyncio.run(probes.run_child("import nowhere_at_all")).words.startswith("ModuleNotFoundError")
    monkeypatch.setattr(probes, "CHILD_S", 0.3)
    assert "no answer within" in asyncio.run(probes.run_child("import time; time.sleep(60); told = 1")).words
