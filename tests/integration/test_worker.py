"""Workers as real processes: they answer, they keep to themselves, and they end with the agent."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from models.body import parse_body
from models.channel import Ask, Broken, Cancel, Count, Counted, Open, Piece, Ready, frame
from models.manifest import Golden, manifest_bytes
from models.request import Dialect, Request
from tests.fakes.onnx_graph import not_a_number
from tests.fakes.samples import INPUTS, manifest_of, sample
from tests.fakes.worker_process import START, WorkerProcess

ZERO = (INPUTS / "digit-0.png").read_bytes()


def request_of(body: bytes) -> Request:
    parsed = parse_body(None, body)
    return Request(model="m", content_type=parsed.content_type, body=parsed.body, dialect=parsed.dialect)


def raw_json(body: bytes) -> Request:
    return Request(model="m", content_type="application/json", body=body, dialect=Dialect.HUGGINGFACE)


def test_a_worker_answers_and_ends_with_its_socket() -> None:
    with WorkerProcess() as worker:
        ready = worker.open(*sample("digits"))
        assert isinstance(ready, Ready)
        assert ready.capacity == 64  # a batch, and the next one
        piece = worker.ask(request_of(ZERO), ticket=7)
        assert b'"label":"0"' in piece.body
        assert piece.compute_ms > 0
        assert worker.close() == 0


def test_asks_sent_together_are_all_answered() -> None:
    with WorkerProcess() as worker:
        worker.open(*sample("digits"))
        worker.send(*(Ask(ticket, request_of(ZERO), 60_000) for ticket in range(100)))
        pieces = [worker.receive() for _ in range(100)]
    assert sorted(piece.ticket for piece in pieces if isinstance(piece, Piece) and not piece.code) == list(range(100))
    assert max(piece.batch for piece in pieces if isinstance(piece, Piece)) > 1


@pytest.mark.parametrize(
    "body",
    [
        b'{"inputs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"inputs": 1e400}',
        b'{"inputs": "\\ud800"}',
        b'{"inputs": "\xff"}',
        b"",
        b"null",
        b'{"inputs": []}',
    ],
)
def test_e12_a_body_that_is_a_trap_costs_only_itself(body: bytes) -> None:
    with WorkerProcess() as worker:
        worker.open(*sample("language"))
        assert worker.ask(raw_json(body)).code == "bad_request"
        assert worker.ask(request_of(b"The weather is nice today")).code == ""


def test_tokens_are_counted_by_the_side() -> None:
    with WorkerProcess() as worker:
        worker.open(*sample("language"))
        worker.send(Count(5, request_of(b"The weather is nice today")))
        counted = worker.receive()
        worker.send(Count(6, raw_json(b"{}")))
        failed = worker.receive()
    assert isinstance(counted, Counted)
    assert (counted.ticket, counted.code) == (5, "")
    assert 4 < counted.tokens_in < 20
    assert isinstance(failed, Counted)
    assert failed.code == "bad_request"


def test_an_ask_whose_deadline_has_passed_and_one_cancelled_are_told() -> None:
    with WorkerProcess() as worker:
        worker.open(*sample("digits"))
        assert worker.ask(request_of(ZERO), budget_ms=0).code == "deadline_exceeded"
        worker.send(Cancel(99))
        assert worker.ask(request_of(ZERO)).code == ""


def test_an_artifact_that_cannot_be_opened_is_told_and_ends_the_worker(tmp_path: Path) -> None:
    folder, manifest = sample("digits")
    with WorkerProcess() as worker:
        broken = worker.open(tmp_path / "nowhere", manifest)
        assert isinstance(broken, Broken)
        assert "folder" in broken.message
        assert worker.process.wait(10) == 1
    with WorkerProcess() as worker:
        worker.send(Open(folder=str(folder), manifest=b"{}", variant="default"))
        assert isinstance(worker.receive(), Broken)
    with WorkerProcess() as worker:
        worker.send(Open(folder=str(folder), manifest=msgspec.json.encode(manifest), variant="other"))
        other = worker.receive()
        assert isinstance(other, Broken)
        assert "other" in other.message


def test_a25_a_model_that_fails_its_first_golden_sample_does_not_come_up(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(not_a_number())
    question = b'{"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [-1]}]}'
    golden = Golden("application/json", question, msgspec.Raw(b"{}"), 0.1)
    manifest = msgspec.structs.replace(manifest_of(tmp_path, {"task": "tensors", "format": "onnx"}), golden=[golden])
    with WorkerProcess() as worker:
        broken = worker.open(tmp_path, manifest)
        assert isinstance(broken, Broken)
        assert "model_failed" in broken.message


def test_e15_bytes_that_are_no_frame_end_the_worker() -> None:
    with WorkerProcess() as worker:
        worker.open(*sample("sea-temperature"))
        worker.socket.sendall(b"\xff" * 64)
        assert worker.process.wait(10) == 1


def test_e16_a_worker_that_is_killed_is_seen_by_its_socket() -> None:
    with WorkerProcess() as worker:
        worker.open(*sample("sea-temperature"))
        worker.process.send_signal(signal.SIGSEGV)
        with pytest.raises(ConnectionError):
            worker.receive()


def test_f3_a_worker_leaves_no_core_file_and_does_not_hear_ctrl_c() -> None:
    with WorkerProcess() as worker:
        worker.open(*sample("sea-temperature"))
        limits = Path(f"/proc/{worker.process.pid}/limits").read_text()
        assert any(line.split()[4:6] == ["0", "0"] for line in limits.splitlines() if line.startswith("Max core file"))
        worker.process.send_signal(signal.SIGINT)
        assert worker.ask(raw_json(b'{"inputs": [1,2,3,4,5,6,7,8,9,10,11,12]}')).code == ""


def test_a_worker_brings_in_one_runtime_alone() -> None:
    with WorkerProcess() as worker:
        worker.open(*sample("sea-temperature"))
        maps = Path(f"/proc/{worker.process.pid}/maps").read_text()
    assert "onnxruntime" in maps
    assert not any(word in maps for word in ("tokenizers", "litert", "genai", "_imaging"))


def test_a_worker_does_not_outlive_an_agent_that_is_killed() -> None:
    ours, theirs = socket.socketpair()
    ours.settimeout(30)
    spawn = (
        "import subprocess, sys, time;"
        f"subprocess.Popen([sys.executable, '-I', '-c', {START!r}, sys.argv[1]], pass_fds=[int(sys.argv[1])]);"
        "time.sleep(60)"
    )
    command = [sys.executable, "-c", spawn, str(theirs.fileno())]
    with ours, subprocess.Popen(command, pass_fds=[theirs.fileno()]) as agent:
        theirs.close()
        folder, manifest = sample("sea-temperature")
        ours.sendall(frame(Open(folder=str(folder), manifest=manifest_bytes(manifest), variant="default")))
        assert ours.recv(1 << 16)
        # The socket's other end is here and stays open, so that only the parent's death can end the worker.
        agent.kill()
        assert ours.recv(1) == b""
