"""Texts and rows into labels, on graphs in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from models.artifact import Artifact
from models.backends.face import Tensors, TensorSpec
from models.body import parse_body
from models.channel import Piece
from models.errors import ModelError, RequestError
from models.request import Dialect, Request
from models.session import BatchSession
from models.tasks.pictures import channels_of
from models.tasks.tabular import Tabular
from models.tasks.task import Task, default_function, load_labels, rank, scores_of
from models.tasks.text_classification import TextClassification
from tests.fakes.backend import MemoryBackend
from tests.fakes.generation import byte_tokenizer

IDS = TensorSpec("input_ids", "int64", (None, None))
MASK = TensorSpec("attention_mask", "int64", (None, None))
LOGITS = TensorSpec("logits", "float32", (None, 2))
CONFIG: dict[str, object] = {"id2label": {"0": "short", "1": "long"}, "pad_token_id": 7}


def lengths(feeds: Mapping[str, NDArray[Any]]) -> Tensors:
    """Return logits that grow with the number of tokens, masked ones left out."""
    mask = feeds.get("attention_mask", np.ones_like(feeds["input_ids"]))
    counts = mask.sum(axis=1).astype(np.float32)
    return {"logits": np.stack([4 - counts, counts - 4], axis=1)}


def text_session(
    folder: Path, inputs: list[TensorSpec], config: dict[str, object] = CONFIG, context_tokens: int = 16
) -> tuple[BatchSession, MemoryBackend]:
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_str())
    (folder / "config.json").write_text(json.dumps(config))
    backend = MemoryBackend(inputs, [LOGITS], lengths)
    with Artifact(folder, ["tokenizer.json", "config.json"]) as artifact:
        task: Task = TextClassification(artifact, backend, context_tokens)
    return BatchSession({Dialect.HUGGINGFACE: task}, backend, batch=8), backend


def request_of(body: object) -> Request:
    parsed = parse_body("application/json", json.dumps(body).encode())
    return Request(model="m", content_type=parsed.content_type, body=parsed.body, dialect=parsed.dialect)


def outputs(piece: Piece) -> Any:
    assert not piece.code, piece.message
    return json.loads(piece.body)["outputs"]


def test_the_best_label_is_given_unless_more_are_asked_for(tmp_path: Path) -> None:
    session, _ = text_session(tmp_path, [IDS, MASK])
    session.submit(1, request_of({"inputs": "ab"}))
    session.submit(2, request_of({"inputs": ["ab", "abcdefgh"], "parameters": {"top_k": 2}}))
    first, second = session.step()
    assert [entry["label"] for entry in outputs(first)] == ["short"]
    assert [[entry["label"] for entry in scores] for scores in outputs(second)] == [
        ["short", "long"],
        ["long", "short"],
    ]
    assert sum(entry["score"] for entry in outputs(second)[0]) == pytest.approx(1)
    assert (first.tokens_in, second.tokens_in) == (2, 10)


def test_shorter_texts_are_padded_and_masked(tmp_path: Path) -> None:
    session, backend = text_session(tmp_path, [IDS, MASK])
    session.submit(1, request_of({"inputs": ["ab", "abcdefgh"]}))
    session.step()
    assert backend.batches == [2]


def test_without_a_mask_texts_of_different_lengths_run_apart(tmp_path: Path) -> None:
    session, backend = text_session(tmp_path, [IDS])
    session.submit(1, request_of({"inputs": ["ab", "abcdefgh", "cd"]}))
    session.submit(2, request_of({"inputs": ["ab", "cd"]}))
    session.step()
    assert backend.batches == [1, 1, 1, 1, 1]


def test_the_bound_of_the_configuration_counts_where_the_manifest_has_none(tmp_path: Path) -> None:
    session, _ = text_session(tmp_path, [IDS, MASK], CONFIG | {"max_position_embeddings": 4}, context_tokens=0)
    assert session.context_tokens == 4
    with pytest.raises(RequestError) as caught:
        session.submit(1, request_of({"inputs": "abcde"}))
    assert (caught.value.code, caught.value.message) == ("too_large", "inputs: 5 tokens or more are over the model's 4")


def test_a_graph_that_wants_something_unknown_is_the_models_fault(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="pixel_values"):
        text_session(tmp_path, [IDS, TensorSpec("pixel_values", "float32", (None,))])


def rows_session(output: str, config: dict[str, object], values: list[float]) -> BatchSession:
    spec = TensorSpec(output, "float32", (None, len(values)))
    labels = TensorSpec("label", "int64", (None,))

    def function(feeds: Mapping[str, NDArray[Any]]) -> Tensors:
        rows = len(feeds["x"])
        return {"label": np.full(rows, np.argmax(values)), output: np.tile(np.asarray(values, np.float32), (rows, 1))}

    specs = [labels, spec] if output == "probabilities" else [spec]
    backend = MemoryBackend([TensorSpec("x", "float32", (None, 1))], specs, function)
    return BatchSession({Dialect.HUGGINGFACE: Tabular(config, backend, classify=True)}, backend, batch=8)


def test_rows_are_labelled_from_logits_and_from_ready_probabilities() -> None:
    config: dict[str, object] = {"id2label": {"0": "no", "1": "yes"}}
    for output, values in (("logits", [0.0, 2.0]), ("probabilities", [0.1192, 0.8808])):
        session = rows_session(output, config, values)
        session.submit(1, request_of({"inputs": [5]}))
        answer = outputs(session.step()[0])
        assert answer["label"] == "yes"
        assert answer["score"] == pytest.approx(0.8808, abs=1e-4)


def test_scores_come_from_logits_as_the_pipelines_choose() -> None:
    assert default_function({}, 3) == "softmax"
    assert default_function({}, 1) == "sigmoid"
    assert default_function({"problem_type": "multi_label_classification"}, 3) == "sigmoid"
    assert default_function({"problem_type": "regression"}, 1) == "none"
    assert scores_of(np.array([1000.0, -1000.0]), "sigmoid") == pytest.approx([1.0, 0.0])
    assert scores_of(np.array([1000.0, 1000.0], np.float32), "softmax") == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_no_numbers_are_the_models_fault(value: float) -> None:
    with pytest.raises(RequestError) as caught:
        scores_of(np.array([1.0, value]), "softmax")
    assert caught.value.code == "model_failed"


def test_labels_without_a_name_are_numbered() -> None:
    assert rank(np.array([0.1, 0.9]), {0: "a"}, None) == [
        {"label": "LABEL_1", "score": 0.9},
        {"label": "a", "score": 0.1},
    ]


@pytest.mark.parametrize("table", [[1], {"x": "a"}, "ab"])
def test_a_table_of_labels_that_is_none_is_the_models_fault(table: object) -> None:
    with pytest.raises(ModelError, match="id2label"):
        load_labels({"id2label": table})


def test_where_an_images_channels_lie_is_told_by_the_graph() -> None:
    assert channels_of(TensorSpec("x", "float32", (None, 3, 8, 8))) == (False, 3)
    assert channels_of(TensorSpec("x", "float32", (1, 8, 8, 1))) == (True, 1)
    assert channels_of(TensorSpec("x", "float32", (None, None, None, None))) == (False, 3)
    with pytest.raises(ModelError, match="no images"):
        channels_of(TensorSpec("x", "float32", (None, 8)))


def test_a_mistake_of_ours_while_answering_costs_only_its_own_request(tmp_path: Path) -> None:
    session, backend = text_session(tmp_path, [IDS, MASK])
    backend.outputs = []

    def broken(feeds: Mapping[str, NDArray[Any]]) -> Tensors:
        return {} if feeds["input_ids"].size == 3 else lengths(feeds)

    backend._function = broken
    session.submit(1, request_of({"inputs": "abc"}))
    (piece,) = session.step()
    session.submit(2, request_of({"inputs": "ab"}))
    assert (piece.code, piece.message) == ("internal", "KeyError while answering")
    assert not session.step()[0].code
