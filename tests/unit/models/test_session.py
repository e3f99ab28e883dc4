"""Batches of requests through one graph, where each is answered for itself."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from models.backends.face import TensorSpec
from models.body import parse_body
from models.channel import Piece
from models.errors import RequestError
from models.request import Dialect, Request
from models.session import BatchSession
from models.tasks.tabular import Tabular
from models.tasks.task import Prepared, Task
from models.tasks.tensors import TensorsTask
from models.tasks.time_series_forecasting import TimeSeriesForecasting
from tests.fakes.backend import MemoryBackend, summing


def request_of(body: object) -> Request:
    parsed = parse_body("application/json", json.dumps(body).encode())
    return Request(model="m", content_type=parsed.content_type, body=parsed.body, dialect=parsed.dialect)


def summing_session(batch: int = 8, *, width: int = 2) -> tuple[BatchSession, MemoryBackend]:
    backend = summing(width)
    task = Tabular({"feature_names": ["a", "b"]} if width == 2 else {}, backend, classify=False)
    tasks: dict[Dialect, Task] = {
        Dialect.HUGGINGFACE: task,
        Dialect.OPENAI: task,
        Dialect.OPEN_INFERENCE: TensorsTask(backend, "m", "1"),
    }
    return BatchSession(tasks, backend, batch=batch), backend


def outputs(piece: Piece) -> Any:
    assert not piece.code, piece.message
    return json.loads(piece.body)["outputs"]


def refusal(session: BatchSession, body: object) -> RequestError:
    with pytest.raises(RequestError) as caught:
        session.submit(1, request_of(body))
    return caught.value


def test_what_was_submitted_together_runs_as_one_batch() -> None:
    session, backend = summing_session()
    for ticket in range(3):
        session.submit(ticket, request_of({"inputs": [ticket, 1]}))
    pieces = session.step()
    assert [(piece.ticket, outputs(piece), piece.batch) for piece in pieces] == [(0, 1.0, 3), (1, 2.0, 3), (2, 3.0, 3)]
    assert backend.batches == [3]
    assert not session.busy


def test_one_number_a_list_and_named_features_are_answered_in_their_own_shape() -> None:
    session, _ = summing_session()
    for ticket, inputs in enumerate(([1, 2], [[1, 2], [3, 4]], {"b": 2, "a": 1}, [{"a": 1, "b": 1}])):
        session.submit(ticket, request_of({"inputs": inputs}))
    assert [outputs(piece) for piece in session.step()] == [3.0, [3.0, 7.0], 3.0, [2.0]]


def test_a_request_of_more_rows_than_a_batch_runs_in_several() -> None:
    session, backend = summing_session(batch=2)
    session.submit(1, request_of({"inputs": [[row, 0] for row in range(5)]}))
    session.submit(2, request_of({"inputs": [9, 9]}))
    assert outputs(session.step()[0]) == [0, 1, 2, 3, 4]
    assert outputs(session.step()[0]) == 18
    assert backend.batches == [2, 2, 1, 1]


def test_the_room_is_what_one_batch_takes() -> None:
    session, _ = summing_session(batch=2)
    session.submit(1, request_of({"inputs": [1, 2]}))
    assert (session.capacity, session.room, session.busy) == (2, 1, True)


class Lengthy(Tabular):
    """A task whose first number is how many tokens a request has."""

    context_tokens = 512

    def prepare(self, request: Request) -> Prepared:
        prepared = super().prepare(request)
        prepared.tokens = int(next(iter(prepared.items[0].values()))[0])
        return prepared


@pytest.mark.parametrize(
    ("lengths", "batches"),
    [
        ([100, 20, 110, 24, 96], [[100, 110, 96], [20, 24]]),  # apart where padding would cost more than it gains
        ([10, 12, 14, 16, 18], [[10, 12, 14, 16], [18]]),  # together where it is little
        ([300, 300, 300, 300, 300], [[300, 300, 300], [300, 300]]),  # no more than the processor's caches hold
        ([50, 51, 52, 53, 54, 55], [[50, 51, 52, 53], [54, 55]]),  # the nearest first, in the order of arrival
    ],
)
def test_texts_of_one_length_run_together_and_the_oldest_is_never_passed_over(
    lengths: list[int], batches: list[list[int]]
) -> None:
    backend = summing()
    session = BatchSession(
        {Dialect.HUGGINGFACE: Lengthy({"feature_names": ["a", "b"]}, backend, classify=False)}, backend, batch=4
    )
    assert session.room == 8
    for ticket, length in enumerate(lengths):
        session.submit(ticket, request_of({"inputs": [length, 0]}))
    assert [[lengths[piece.ticket] for piece in session.step()] for _ in batches] == batches
    assert not session.busy


def test_a25_an_answer_that_is_not_a_number_fails_its_own_request_alone() -> None:
    session, _ = summing_session()
    for ticket, value in enumerate((1, 666, 2)):
        session.submit(ticket, request_of({"inputs": [value, 0]}))
    pieces = session.step()
    assert [piece.code for piece in pieces] == ["", "model_failed", ""]
    assert "not a number" in pieces[1].message


def test_a_request_that_fails_the_whole_batch_costs_only_itself() -> None:
    session, backend = summing_session()
    for ticket, value in enumerate((1, 777, 2)):
        session.submit(ticket, request_of({"inputs": [value, 0]}))
    pieces = session.step()
    assert [(piece.ticket, piece.code) for piece in pieces] == [(0, ""), (1, "model_failed"), (2, "")]
    assert backend.batches == [3, 1, 1, 1]


def test_a_refused_request_leaves_the_others_alone() -> None:
    session, _ = summing_session()
    session.submit(1, request_of({"inputs": [1, 2]}))
    refusal(session, {"inputs": [1]})
    assert [outputs(piece) for piece in session.step()] == [3.0]


def test_a_cancelled_request_is_not_run() -> None:
    session, backend = summing_session()
    session.submit(1, request_of({"inputs": [1, 2]}))
    assert session.cancel(1)
    assert not session.cancel(1)
    assert session.step() == []
    assert backend.batches == []


def test_closing_frees_the_graph() -> None:
    session, backend = summing_session()
    session.close()
    assert backend.closed


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"inputs": [1]}, "inputs: expected 2 numbers, got 1"),
        ({"inputs": [[1, 2], [1, 2, 3]]}, "inputs[1]: expected 2 numbers, got 3"),
        ({"inputs": [[1, 2], "x"]}, "inputs[1]: expected a list of numbers, got a string"),
        ({"inputs": [1, None]}, "inputs[1]: expected a number, got null"),
        ({"inputs": [1, True]}, "inputs[1]: expected a number, got a boolean"),
        ({"inputs": "text"}, "inputs: expected a list of numbers, got a string"),
        ({"inputs": {"a": 1}}, "inputs.b: is missing"),
        ({"inputs": {"a": 1, "b": 2, "c": 3}}, "inputs.c: is not one of the model's features"),
        ({"inputs": {"a": 1, "b": [2]}}, "inputs.b: expected a number, got a list"),
        ({"inputs": [1, 10**39]}, "inputs: a number is too large for the model's float32"),
        ({"inputs": [1, 10**400]}, "inputs: a number is too large for the model's float32"),
        ({"inputs": [1, 1e39]}, "inputs: a number is too large for the model's float32"),
        ({"inputs": [1, 2], "parameters": {"top_k": 1}}, "parameters.top_k: is not known for this model"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "messages: this model does not chat"),
    ],
)
def test_e11_a_wrong_row_is_refused_with_its_field(body: object, message: str) -> None:
    session, _ = summing_session()
    error = refusal(session, body)
    assert (error.code, error.message) == ("bad_request", message)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"inputs": [1, 1e400]}',
        b'{"inputs": [' + b"9" * 1_000_000 + b", 1]}",
        b'{"inputs": "\xff"}',
        b'{"inputs": "\\ud800"}',
    ],
)
def test_e12_numbers_and_letters_that_json_cannot_hold_are_the_askers_fault(raw: bytes) -> None:
    session, _ = summing_session()
    request = Request(model="m", content_type="application/json", body=raw, dialect=Dialect.HUGGINGFACE)
    with pytest.raises(RequestError) as caught:
        session.submit(1, request)
    assert caught.value.code == "bad_request"


def test_e12_inputs_nested_too_deeply_for_the_worker_are_refused() -> None:
    session, _ = summing_session()
    raw = b'{"inputs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    with pytest.raises(RequestError) as caught:
        session.submit(1, Request(model="m", content_type="application/json", body=raw, dialect=Dialect.HUGGINGFACE))
    assert caught.value.message == "body: is nested too deeply"


def tensor(**changes: object) -> dict[str, object]:
    whole = {"name": "features", "shape": [2, 2], "datatype": "FP32", "data": [1, 2, 3, 4.5]} | changes
    return {"inputs": [whole]}


@pytest.mark.parametrize("data", [[1, 2, 3, 4.5], [[1, 2], [3, 4.5]]])
def test_tensors_flat_or_nested_are_answered_by_name(data: object) -> None:
    session, _ = summing_session()
    session.submit(1, request_of(tensor(data=data) | {"id": "seven"}))
    answer = json.loads(session.step()[0].body)
    expected = {"name": "prediction", "datatype": "FP32", "shape": [2, 1], "data": [3.0, 7.5]}
    assert answer == {"model_name": "m", "model_version": "1", "id": "seven", "outputs": [expected]}


def test_tensors_and_rows_wait_for_each_other() -> None:
    session, backend = summing_session()
    session.submit(1, request_of(tensor()))
    session.submit(2, request_of({"inputs": [1, 2]}))
    assert [piece.ticket for piece in session.step()] == [1]
    assert [piece.ticket for piece in session.step()] == [2]
    assert backend.batches == [2, 1]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (tensor(shape=[2, 3]), "inputs[0].shape: expected [any, 2], got [2, 3]"),
        (tensor(shape=[4]), "inputs[0].shape: expected [any, 2], got [4]"),
        (tensor(shape=[-1, 2]), "inputs[0].shape: expected [any, 2], got [-1, 2]"),
        (tensor(shape=[3, 2]), "inputs[0].data: expected 6 values for the shape [3, 2], got 4"),
        (tensor(datatype="FP64"), "inputs[0].datatype: expected FP32, got 'FP64'"),
        (tensor(name="wrong"), "inputs[0].name: 'wrong' is unknown or twice; expected features"),
        (tensor(data=["a", "b", "c", "d"]), "inputs[0].data: holds values that are no FP32"),
        (tensor(data=[[1, 2], [3]]), "inputs[0].data: the nested lists differ in length"),
        (tensor(data=[1, 2, 3, 1e39]), "inputs[0].data: a value is too large for FP32"),
        (tensor(data=[1, 2, 3, None]), "inputs[0].data: holds values that are no FP32"),
        (tensor() | {"outputs": [{"name": "other"}]}, "outputs[0].name: 'other' is none of prediction"),
        ({"inputs": tensor()["inputs"] * 2}, "inputs[1].name: 'features' is unknown or twice; expected features"),  # type: ignore[operator]
    ],
)
def test_e11_a_wrong_tensor_is_refused_with_field_expected_and_got(body: object, message: str) -> None:
    session, _ = summing_session()
    error = refusal(session, body)
    assert (error.code, error.message) == ("bad_request", message)


@pytest.mark.parametrize("shape", [[10**9, 2], [10**18, 2]])
def test_e11_a_tensor_that_claims_to_be_huge_is_refused_before_memory_is_taken(shape: list[int]) -> None:
    session, _ = summing_session()
    assert refusal(session, tensor(shape=shape)).code == "too_large"


def test_a_whole_number_outside_a_tensors_type_is_refused() -> None:
    spec = TensorSpec("x", "int8", (None,))
    backend = MemoryBackend([spec], [spec], dict)
    session = BatchSession({Dialect.OPEN_INFERENCE: TensorsTask(backend, "m", "1")}, backend, batch=1)
    body = {"inputs": [{"name": "x", "shape": [1], "datatype": "INT8", "data": [200]}]}
    assert "outside -128 to 127" in refusal(session, body).message


def test_texts_and_truths_travel_as_tensors() -> None:
    specs = [TensorSpec("text", "object", (None,)), TensorSpec("flag", "bool", (None,))]
    backend = MemoryBackend(specs, specs, dict)
    session = BatchSession({Dialect.OPEN_INFERENCE: TensorsTask(backend, "m", "1")}, backend, batch=1)
    text = {"name": "text", "shape": [2], "datatype": "BYTES", "data": ["a", "ü"]}
    flag = {"name": "flag", "shape": [2], "datatype": "BOOL", "data": [True, False]}
    session.submit(1, request_of({"inputs": [text, flag]}))
    assert json.loads(session.step()[0].body)["outputs"] == [
        {"name": "text", "datatype": "BYTES", "shape": [2], "data": ["a", "ü"]},
        {"name": "flag", "datatype": "BOOL", "shape": [2], "data": [True, False]},
    ]


def forecasting(shape: tuple[int | None, ...]) -> tuple[BatchSession, MemoryBackend]:
    backend = MemoryBackend(
        [TensorSpec("past", "float32", shape)],
        [TensorSpec("next", "float32", (None, 2))],
        lambda feeds: {"next": np.stack([feeds["past"].reshape(len(feeds["past"]), -1).sum(axis=1)] * 2, axis=1)},
    )
    task = TimeSeriesForecasting(backend)
    return BatchSession({Dialect.HUGGINGFACE: task}, backend, batch=8), backend


def test_series_of_different_lengths_run_apart_and_are_answered_in_order() -> None:
    session, backend = forecasting((None, None))
    session.submit(1, request_of({"inputs": [[1, 2], [3, 4], [5]]}))
    session.submit(2, request_of({"inputs": [6]}))
    assert [outputs(piece) for piece in session.step()] == [[[3, 3], [7, 7], [5, 5]], [6, 6]]
    assert backend.batches == [2, 2]


def test_several_series_at_once_are_rows_of_numbers() -> None:
    session, _ = forecasting((None, 2, 3))
    session.submit(1, request_of({"inputs": [[1, 2, 3], [4, 5, 6]]}))
    session.submit(2, request_of({"inputs": [[[1, 1, 1], [1, 1, 1]]]}))
    assert [outputs(piece) for piece in session.step()] == [[21, 21], [[6, 6]]]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([1, 2, 3], "inputs: expected 2 values, got 3"),
        ([[1, 2], [1]], "inputs[1]: expected 2 values, got 1"),
        ([1, "x"], "inputs[1]: expected a number, got a string"),
        ("x", "inputs: expected a list of numbers, got a string"),
    ],
)
def test_a_wrong_series_is_refused_with_its_field(inputs: object, message: str) -> None:
    session, _ = forecasting((None, 2))
    assert refusal(session, {"inputs": inputs}).message == message
