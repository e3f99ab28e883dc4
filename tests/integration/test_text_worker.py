"""Texts answered by a real, confined worker: what the reference answered, in pieces, and cancelled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from models.body import parse_body
from models.channel import Ask, Cancel, Piece, Ready
from models.manifest import Limits
from models.request import Request
from tests.fakes.artifacts import manifest_of
from tests.fakes.worker_process import WorkerProcess
from tests.reference.case import CASES, Case, body_of, read_cases

RECORDED = Path(__file__).parents[1] / "reference" / "recorded"


def opened(worker: WorkerProcess, name: str) -> list[Case]:
    """Open a recorded model in the worker and return its questions that have an answer."""
    folder = RECORDED / name
    recorded = read_cases(folder)
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != CASES)
    files = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    manifest = msgspec.structs.replace(
        manifest_of(files, name="m", frame_bytes=1 << 20), task=recorded.task, limits=Limits(**recorded.limits)
    )
    ready = worker.open(folder, manifest)
    assert isinstance(ready, Ready), ready
    assert ready.unprotected == []
    return [case for case in recorded.cases if not case.error]


def request_of(case: Case, *, stream: bool = False) -> Request:
    body = parse_body(case.content_type, body_of(case))
    return Request(model="m", content_type=body.content_type, body=body.body, dialect=body.dialect, stream=stream)


@pytest.fixture
def worker() -> Iterator[WorkerProcess]:
    with WorkerProcess() as process:
        yield process


def text(piece: Piece, member: str) -> str:
    assert not piece.code, piece.message
    outputs: Any = msgspec.json.decode(piece.body)["outputs"]
    return str(outputs[member])


def received(worker: WorkerProcess) -> Piece:
    piece = worker.receive()
    assert isinstance(piece, Piece)
    return piece


def test_translations_of_several_askers_stream_side_by_side(worker: WorkerProcess) -> None:
    cases = sorted(opened(worker, "translation-marian"), key=lambda case: len(str(case.expected)))[-3:]
    worker.send(*(Ask(ticket, request_of(case, stream=True), 60_000) for ticket, case in enumerate(cases)))
    said: dict[int, list[str]] = {ticket: [] for ticket in range(len(cases))}
    order: list[int] = []
    running = set(said)
    while running:
        piece = received(worker)
        said[piece.ticket].append(text(piece, "translation_text"))
        order.append(piece.ticket)
        running -= {piece.ticket} if piece.final else set()
    assert ["".join(pieces) for pieces in said.values()] == [case.expected["translation_text"] for case in cases]
    last_begin = max(order.index(ticket) for ticket in said)
    assert order[last_begin:].count(0) > 1


def test_a_summary_that_nobody_wants_any_more_ends_at_once(worker: WorkerProcess) -> None:
    (*_, case) = sorted(opened(worker, "summarization-t5-summary"), key=lambda case: len(str(case.expected)))
    worker.send(Ask(1, request_of(case, stream=True), 60_000))
    assert not received(worker).final
    worker.send(Cancel(1))
    while not (piece := received(worker)).final:
        assert piece.ticket == 1
    assert piece.code in {"cancelled", ""}
    assert text(worker.ask(request_of(case), ticket=2), "summary_text") == case.expected["summary_text"]


def test_a_long_context_is_searched_by_a_confined_worker(worker: WorkerProcess) -> None:
    cases = opened(worker, "question-answering-roberta")
    case = max(cases, key=lambda case: len(case.body["inputs"]["context"]))
    outputs = msgspec.json.decode(worker.ask(request_of(case)).body)["outputs"]
    best = outputs[0] if isinstance(outputs, list) else outputs
    expected = case.expected[0] if isinstance(case.expected, list) else case.expected
    assert best["answer"] == expected["answer"] == case.body["inputs"]["context"][best["start"] : best["end"]]
