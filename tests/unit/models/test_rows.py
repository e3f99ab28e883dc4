"""Rows of columns: by place, by name, column by column, and into graphs with an input for each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from models.backends.face import Tensors, TensorSpec
from models.body import parse_body
from models.errors import ModelError, RequestError
from models.request import Dialect, Request
from models.session import BatchSession
from models.tasks.tabular import Tabular
from tests.fakes.backend import MemoryBackend, summing

SKOPS: dict[str, object] = {"sklearn": {"columns": ["a", "b"]}}


def ask(session: BatchSession, inputs: object) -> Any:
    body = parse_body("application/json", json.dumps({"inputs": inputs}).encode())
    session.submit(1, Request(model="m", content_type=body.content_type, body=body.body, dialect=body.dialect))
    (piece,) = session.step()
    assert not piece.code, piece.message
    return json.loads(piece.body)["outputs"]


def rows() -> BatchSession:
    backend = summing(2)
    return BatchSession({Dialect.HUGGINGFACE: Tabular(SKOPS, backend, classify=False)}, backend, batch=8)


def mixed(config: dict[str, object]) -> BatchSession:
    """Return a graph with an input for each column: how long the word is, plus the number."""
    specs = [TensorSpec("word", "object", (None, 1)), TensorSpec("number", "float32", (None, 1))]

    def function(feeds: Mapping[str, NDArray[Any]]) -> Tensors:
        lengths = np.array([[len(word)] for word in feeds["word"].ravel()], np.float32)
        return {"variable": lengths + feeds["number"]}

    backend = MemoryBackend(specs, [TensorSpec("variable", "float32", (None, 1))], function)
    return BatchSession({Dialect.HUGGINGFACE: Tabular(config, backend, classify=False)}, backend, batch=8)


def test_columns_are_put_into_the_order_of_the_configuration() -> None:
    assert ask(rows(), {"data": {"b": [1, 2], "a": [10, 20]}}) == [11.0, 22.0]
    assert ask(rows(), {"b": 3, "a": 4}) == 7.0


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"data": {"a": [1, 2], "b": [1]}}, "inputs.data: expected columns of one length, got [1, 2]"),
        ({"data": {"a": [], "b": []}}, "inputs.data: expected columns of one length, got [0]"),
        ({"data": {"a": 1, "b": [1]}}, "inputs.data.a: expected a list, got a number"),
        ({"data": {"a": [1]}}, "inputs.data[0].b: is missing"),
        ({"data": {"a": [1, 2], "b": [1, None]}}, "inputs.data[1].b: expected a number, got null"),
        ({"data": {"a": [1]}, "index": 1}, "inputs.index: is not known beside data"),
    ],
)
def test_wrong_columns_are_refused_by_their_field(inputs: object, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        ask(rows(), inputs)
    assert caught.value.message == message


def test_a_graph_with_an_input_for_each_column_takes_numbers_and_texts() -> None:
    assert ask(mixed({}), [["abc", 2], ["", 1]]) == [5.0, 1.0]
    assert ask(mixed({"feature_names": ["number", "word"]}), [7, "ab"]) == 9.0
    assert ask(mixed({}), {"data": {"number": [1], "word": ["four"]}}) == [5.0]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([3, 2], "inputs.word: expected a text, got a number"),
        (["a", "b"], "inputs.number: expected a number, got a string"),
        (["a"], "inputs: expected 2 values, got 1"),
        ([[{"word": 1}]], "inputs[0]: expected 2 values, got 1"),
        ("a", "inputs: expected a list or an object, got a string"),
        (["a", True], "inputs.number: expected a number, got a boolean"),
        (["a", 1e39], "inputs.number: a number is too large for the model's float32"),
    ],
)
def test_a_wrong_cell_is_refused_by_its_column(inputs: object, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        ask(mixed({}), inputs)
    assert caught.value.message == message


def test_columns_that_the_graph_has_not_got_are_the_models_fault() -> None:
    with pytest.raises(ModelError, match="'colour'"):
        mixed({"feature_names": ["colour", "word"]})


@pytest.mark.parametrize(
    ("dtype", "said", "label"), [("int64", 30, "thirty"), ("int64", 7, "LABEL_7"), ("object", "x", "x")]
)
def test_the_class_that_the_graph_names_is_the_label(dtype: str, said: object, label: str) -> None:
    def function(feeds: Mapping[str, NDArray[Any]]) -> Tensors:
        named = np.full(len(feeds["x"]), said, dtype)
        return {"label": named, "scores": np.tile(np.array([0.2, 0.8], np.float32), (len(feeds["x"]), 1))}

    outputs = [TensorSpec("label", dtype, (None,)), TensorSpec("scores", "float32", (None, 2))]
    backend = MemoryBackend([TensorSpec("x", "float32", (None, 1))], outputs, function)
    task = Tabular({"id2label": {"30": "thirty"}}, backend, classify=True)
    session = BatchSession({Dialect.HUGGINGFACE: task}, backend, batch=8)
    assert ask(session, [1]) == {"label": label, "score": pytest.approx(0.8)}
