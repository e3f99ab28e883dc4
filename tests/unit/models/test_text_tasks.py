"""Pairs, entities, answers and vectors, on graphs in memory; what they equal is in tests/reference."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from models.artifact import Artifact
from models.backends.face import Tensors, TensorSpec
from models.body import parse_body
from models.errors import ModelError, RequestError
from models.record import answer_alone
from models.request import Dialect, Request
from models.session import BatchSession
from models.tasks.entities import best_of_overlapping
from models.tasks.feature_extraction import FeatureExtraction
from models.tasks.pooling import MODES, Pooling, pool
from models.tasks.question_answering import QuestionAnswering
from models.tasks.task import Task
from models.tasks.text_classification import TextClassification
from models.tasks.token_classification import TokenClassification
from models.tokens import Text, Tokenizer, Tokens
from tests.fakes.backend import MemoryBackend
from tests.fakes.generation import byte_tokenizer

IDS = TensorSpec("input_ids", "int64", (None, None))
MASK = TensorSpec("attention_mask", "int64", (None, None))
LENGTH = 16
A, B = 64, 65
"""The tokens of two letters in the byte-level vocabulary."""

Kind = Callable[[Artifact, MemoryBackend, int], Task]


def opened(
    folder: Path,
    kind: Kind,
    outputs: Mapping[str, int],
    files: Mapping[str, object] | None = None,
    inputs: tuple[TensorSpec, ...] = (IDS, MASK),
    length: int = LENGTH,
) -> tuple[BatchSession, MemoryBackend]:
    """Return a session whose outputs tell of each token its number, in so many equal columns (0: none)."""
    described = {"config.json": {"id2label": {"0": "O", "1": "B-X"}}, **(files or {})}
    for name, value in described.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value))
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_str())

    def function(feeds: Mapping[str, NDArray[Any]]) -> Tensors:
        numbers = feeds["input_ids"].astype(np.float32)
        return {name: np.stack([numbers] * width, axis=-1) if width else numbers for name, width in outputs.items()}

    specs = [
        TensorSpec(name, "float32", (None, None, width) if width else (None, None)) for name, width in outputs.items()
    ]
    backend = MemoryBackend(list(inputs), specs, function)
    with Artifact(folder, ["tokenizer.json", *described]) as artifact:
        task: Task = kind(artifact, backend, length)
    return BatchSession({Dialect.HUGGINGFACE: task}, backend, batch=8), backend


def request_of(body: object) -> Request:
    parsed = parse_body("application/json", json.dumps(body).encode())
    return Request(model="m", content_type=parsed.content_type, body=parsed.body, dialect=parsed.dialect)


def ask(session: BatchSession, body: object) -> Any:
    piece = answer_alone(session, request_of(body))
    if piece.code:
        raise RequestError(piece.code, piece.message)
    return json.loads(piece.body)["outputs"]


def refused(session: BatchSession, body: object) -> str:
    with pytest.raises(RequestError) as caught:
        ask(session, body)
    return f"{caught.value.code} {caught.value.message}"


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"text": 5}, "inputs.text: expected a text, got a number"),
        ({"text": "a", "text_pair": ["b"]}, "inputs.text_pair: expected a text, got a list"),
        ({"text": "a", "pair": "b"}, "inputs.pair: is not known"),
        (["a", None], "inputs[1]: expected a text, got null"),
        ({"text": "a" * 8, "text_pair": "b" * 9}, "too_large inputs: 17 tokens or more are over the model's 16"),
    ],
)
def test_a_pair_that_is_none_is_refused_by_its_field(tmp_path: Path, inputs: object, words: str) -> None:
    session, _ = opened(tmp_path, TextClassification, {"logits": 2})
    assert words in refused(session, {"inputs": inputs})


def test_a_graph_of_fixed_length_is_filled_up_and_bounds_the_text(tmp_path: Path) -> None:
    fixed = TensorSpec("input_ids", "int32", (None, 8)), TensorSpec("attention_mask", "int32", (None, 8))
    session, backend = opened(tmp_path, TokenClassification, {"logits": 2}, inputs=fixed)
    assert session.context_tokens == 8
    assert len(ask(session, {"inputs": "abc", "parameters": {"ignore_labels": []}})) == 1
    assert backend.batches == [1]
    assert "too_large" in refused(session, {"inputs": "123456789"})


def test_a_graph_that_asks_for_positions_is_given_them(tmp_path: Path) -> None:
    seen: list[Any] = []
    positions = TensorSpec("position_ids", "int64", (None, None))
    session, backend = opened(tmp_path, TextClassification, {"logits": 0}, inputs=(IDS, MASK, positions))
    function = backend._function

    def watched(feeds: Mapping[str, NDArray[Any]]) -> Tensors:
        seen.append(feeds["position_ids"].tolist())
        return function(feeds)

    backend._function = watched
    ask(session, {"inputs": ["ab", "abc"]})
    assert seen == [[[0, 1, 2], [0, 1, 2]]]


def test_a_text_that_was_counted_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, _ = opened(tmp_path, TextClassification, {"logits": 2})
    request = request_of({"inputs": ["ab", "ab", "abc"]})
    task = session._tasks[Dialect.HUGGINGFACE]
    assert isinstance(task, TextClassification)
    expected = answer_alone(session, request).body
    assert session.count(request) == (3, 0)
    asked: list[object] = []
    encode = task.tokenizer.encode_batch

    def watched(texts: Sequence[Text]) -> list[Tokens]:
        asked.append(texts)
        return encode(texts)

    monkeypatch.setattr(task.tokenizer, "encode_batch", watched)
    assert answer_alone(session, request).body == expected
    assert not asked
    assert answer_alone(session, request).body == expected
    assert asked == [["ab", "ab", "abc"]]


def test_texts_that_were_only_counted_are_forgotten_again(tmp_path: Path) -> None:
    session, _ = opened(tmp_path, TextClassification, {"logits": 2}, length=0)
    task = session._tasks[Dialect.HUGGINGFACE]
    assert isinstance(task, TextClassification)
    for number in range(1000):
        session.count(request_of({"inputs": f"text {number}"}))
    assert len(task._counted) <= 64
    session.count(request_of({"inputs": "a" * 20_000}))
    assert not task._counted


def test_positions_behind_the_padding_hold_fewer_tokens(tmp_path: Path) -> None:
    config = {"config.json": {"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}}
    session, _ = opened(tmp_path, TextClassification, {"logits": 2}, config, length=0)
    assert session.context_tokens == 512


def test_a_tokenizers_own_bound_goes_before_that_of_the_positions(tmp_path: Path) -> None:
    files = {"config.json": {"max_position_embeddings": 512}, "tokenizer_config.json": {"model_max_length": 12}}
    session, _ = opened(tmp_path, TextClassification, {"logits": 2}, files, length=0)
    assert session.context_tokens == 12


def test_entities_carry_their_place_in_letters(tmp_path: Path) -> None:
    session, _ = opened(tmp_path, TokenClassification, {"logits": 1})
    found = ask(session, {"inputs": "né 🎈", "parameters": {"ignore_labels": [], "aggregation_strategy": "none"}})
    assert [(entity["start"], entity["end"]) for entity in found] == [(0, 1), *[(1, 2)] * 2, (2, 3), *[(3, 4)] * 4]


def test_a_long_text_is_read_in_windows_only_where_their_stride_is_named(tmp_path: Path) -> None:
    session, backend = opened(tmp_path, TokenClassification, {"logits": 1})
    long = request_of({"inputs": "a" * 40})
    assert session.count(long) == (40, 0)
    assert "stride" in refused(session, {"inputs": "a" * 40})
    windows = {"inputs": "a" * 40, "parameters": {"stride": 4, "ignore_labels": []}}
    assert session.count(request_of(windows)) == (LENGTH, 0)
    assert ask(session, windows)[-1]["end"] == 40
    assert backend.batches == [3]


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"stride": 16}, "parameters.stride: must be at most 15"),
        ({"stride": -1}, "parameters.stride: expected a whole number from 0 on"),
        ({"stride": 1, "aggregation_strategy": "none"}, "need an aggregation_strategy"),
        ({"aggregation_strategy": "last"}, "expected one of none, simple, first, average, max"),
        ({"ignore_labels": "O"}, "expected a list of labels"),
    ],
)
def test_an_option_of_entities_that_cannot_be_is_refused(tmp_path: Path, parameters: object, words: str) -> None:
    session, _ = opened(tmp_path, TokenClassification, {"logits": 1})
    assert words in refused(session, {"inputs": "ab", "parameters": parameters})


def test_of_overlapping_entities_the_longest_stays_then_the_surest() -> None:
    def entity(start: int, end: int, score: float) -> dict[str, Any]:
        return {"start": start, "end": end, "score": score}

    assert best_of_overlapping([]) == []
    kept = best_of_overlapping([entity(5, 9, 0.5), entity(0, 3, 0.1), entity(5, 9, 0.9), entity(6, 12, 0.2)])
    assert kept == [entity(0, 3, 0.1), entity(6, 12, 0.2)]


def test_tokens_are_counted_whole_while_another_thread_reads_windows() -> None:
    tokenizer = Tokenizer(byte_tokenizer().to_str().encode())
    stopped = threading.Event()

    def cut() -> None:
        while not stopped.is_set():
            tokenizer.windows("a" * 50, max_tokens=8, stride=2)

    cutting = threading.Thread(target=cut)
    cutting.start()
    counts = {len(tokenizer.encode("b" * 100).ids) for _ in range(300)}
    stopped.set()
    cutting.join()
    assert counts == {100}


def answering(folder: Path, length: int = LENGTH) -> BatchSession:
    return opened(folder, QuestionAnswering, {"start_logits": 0, "end_logits": 0}, length=length)[0]


def test_an_answer_is_a_part_of_the_context_with_its_place(tmp_path: Path) -> None:
    # The twin's likeliest token is the one with the highest number.
    answer = ask(answering(tmp_path), {"inputs": {"question": "xyz", "context": "ab~cd"}})
    assert answer == {"answer": "~", "score": pytest.approx(1, abs=1e-3), "start": 2, "end": 3}


def test_a_context_of_any_length_is_read_in_windows(tmp_path: Path) -> None:
    session = answering(tmp_path)
    assert session.context_tokens == 0
    asked = {"question": "where", "context": "a" * 200 + "~" + "b" * 50}
    answer = ask(session, {"inputs": asked, "parameters": {"align_to_words": False}})
    assert (answer["answer"], answer["start"], answer["end"]) == ("~", 200, 201)
    assert len(ask(session, {"inputs": [asked, asked]})) == 2


def test_a_context_of_too_many_windows_is_refused_before_it_is_read(tmp_path: Path) -> None:
    session = answering(tmp_path)
    many = {"inputs": {"question": "where", "context": "a" * 20_000}}
    assert "too_large inputs.context: 20000 tokens are over the 512 windows" in refused(session, many)
    huge = {"inputs": {"question": "where", "context": "a" * (1 << 20)}}
    assert "too_large inputs.context: 1048576 letters are over" in refused(session, huge)


def test_a_text_of_too_many_windows_is_refused_before_it_is_read(tmp_path: Path) -> None:
    session, _ = opened(tmp_path, TokenClassification, {"logits": 1})
    asked = {"inputs": "a" * 20_000, "parameters": {"stride": 4}}
    assert "too_large inputs: 20000 tokens are over the 512 windows" in refused(session, asked)


@pytest.mark.parametrize(
    ("inputs", "parameters", "words"),
    [
        ("why", {}, "inputs: expected an object with question and context"),
        ({"question": "", "context": "a"}, {}, "inputs.question: is empty"),
        ({"question": "a"}, {}, "inputs.context: expected a text, got null"),
        ({"question": "a", "context": "b", "text": "c"}, {}, "inputs.text: is not known"),
        ({"question": "a" * 16, "context": "b"}, {}, "too_large inputs.question: leaves no room"),
        ({"question": "abcd", "context": "b"}, {"max_question_len": 3}, "too_large inputs.question: 4 tokens"),
        ({"question": "a", "context": "b" * 20}, {"doc_stride": 15}, "parameters.doc_stride: must be at most 14"),
        ({"question": "a", "context": "b"}, {"max_seq_len": 17}, "parameters.max_seq_len: the model takes 16"),
        ({"question": "a", "context": "b"}, {"top_k": 0}, "parameters.top_k: expected a whole number from 1 on"),
        ({"question": "a", "context": "b"}, {"top_k": 10**9}, "parameters.top_k: expected at most 1000"),
        ({"question": "a", "context": "b"}, {"handle_impossible_answer": 1}, "expected true or false, got a number"),
    ],
)
def test_a_question_that_is_none_is_refused_by_its_field(
    tmp_path: Path, inputs: object, parameters: object, words: str
) -> None:
    assert words in refused(answering(tmp_path), {"inputs": inputs, "parameters": parameters})


def test_a_texts_vector_is_pooled_as_its_folder_says(tmp_path: Path) -> None:
    files = {
        "modules.json": [{"type": "a.Transformer"}, {"type": "a.Pooling", "path": "7_P"}, {"type": "a.Normalize"}],
        "7_P/config.json": {"pooling_mode_cls_token": True},
        "sentence_bert_config.json": {"max_seq_length": 9},
    }
    session, _ = opened(tmp_path, FeatureExtraction, {"last_hidden_state": 3}, files, length=0)
    assert session.context_tokens == 9
    assert ask(session, {"inputs": "ab"}) == pytest.approx([3**-0.5] * 3)
    assert ask(session, {"inputs": ["ab", "abc"], "parameters": {"pooling": "none"}}) == [
        [[A] * 3, [B] * 3],
        [[A] * 3, [B] * 3, [B + 1] * 3],
    ]


def test_what_a_folder_asks_for_and_no_graph_does_is_the_models_fault(tmp_path: Path) -> None:
    files = {"modules.json": [{"type": "a.Transformer"}, {"type": "a.Pooling"}, {"type": "a.Dense", "path": "2_Dense"}]}
    with pytest.raises(ModelError, match="Dense"):
        opened(tmp_path, FeatureExtraction, {"last_hidden_state": 3}, files)
    with pytest.raises(ModelError, match=r"modules\.json"):
        opened(tmp_path, FeatureExtraction, {"last_hidden_state": 3}, {"modules.json": {"no": "list"}})
    with pytest.raises(ModelError, match="gives a vector"):
        opened(tmp_path, FeatureExtraction, {"logits": 0})


def test_a_prompt_is_named_by_the_asker_or_by_the_folder(tmp_path: Path) -> None:
    prompts = {"prompts": {"query": "ab", "none": ""}, "default_prompt_name": "query"}
    files = {"config_sentence_transformers.json": prompts}
    session, _ = opened(tmp_path, FeatureExtraction, {"last_hidden_state": 1}, files)
    assert ask(session, {"inputs": "c"}) == [B]
    assert ask(session, {"inputs": "c", "parameters": {"prompt_name": "none"}}) == [B + 1]
    assert "the model has none, query" in refused(session, {"inputs": "c", "parameters": {"prompt_name": "other"}})
    assert "expected one of none, cls" in refused(session, {"inputs": "c", "parameters": {"pooling": "sum"}})


@pytest.mark.parametrize("mode", MODES)
def test_one_token_pools_to_itself_in_every_mode(mode: str) -> None:
    assert pool(np.array([[3.0, 4.0]], np.float32), Pooling((mode,))).tolist() == [3.0, 4.0]
    assert pool(np.array([[3.0, 4.0]], np.float32), Pooling((mode,), normalize=True)).tolist() == pytest.approx(
        [0.6, 0.8]
    )


def test_a_vector_of_zeros_has_no_direction_and_stays() -> None:
    assert pool(np.zeros((2, 3), np.float32), Pooling(normalize=True)).tolist() == [0.0, 0.0, 0.0]
