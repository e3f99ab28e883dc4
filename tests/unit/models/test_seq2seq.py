"""Translations and summaries: which token comes next, and several askers at one model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
from models.generation.seq2seq import Limits, Seq2seqSession
from models.generation.seq2seq_graphs import Graphs, Layout, Reading, find_layout
from models.generation.seq2seq_rules import Rules, load_rules, next_token
from models.generation.seq2seq_wording import Wording
from models.request import Request
from models.tokens import Tokenizer
from tests.fakes.backend import MemoryBackend
from tests.fakes.generation import END, byte_tokenizer

TOKENS = Tokenizer(byte_tokenizer().to_str().encode())
END_TOKEN = TOKENS.encode(END).ids[0]
VOCABULARY = END_TOKEN + 1


class Repeating:
    """An encoder-decoder that says what it was told, then ends; `nan` is a text that breaks it."""

    fallbacks: Sequence[str] = ()

    def __init__(self) -> None:
        self.reads = 0

    def read(self, tokens: Sequence[int]) -> Reading:
        self.reads += 1
        return Reading(np.asarray([*tokens, END_TOKEN]), np.ones(1))

    def step(self, reading: Reading, written: Sequence[int]) -> NDArray[np.float32]:
        scores = np.zeros(VOCABULARY, np.float32)
        scores[reading.states[min(len(written) - 1, len(reading.states) - 1)]] = 5
        if TOKENS.decode(reading.states[:3].tolist()) == "nan":
            scores[0] = np.nan
        return scores

    def close(self) -> None:
        """Nothing to free."""


def session_of(
    folder: Path,
    rules: Rules | None = None,
    files: Mapping[str, object] | None = None,
    slots: int = 4,
    limits: Limits | None = None,
) -> Seq2seqSession:
    rules = rules or Rules(eos_token_id=(END_TOKEN,), decoder_start_token_id=END_TOKEN)
    for name, value in (files or {}).items():
        (folder / name).write_text(json.dumps(value))
    with Artifact(folder, list(files or {})) as artifact:
        wording = Wording(artifact, TOKENS, rules, "translation")
    limits = limits or Limits(text=32, answer=64)
    return Seq2seqSession(Repeating(), TOKENS, wording, rules, limits, member="translation_text", slots=slots)


def request_of(inputs: object, *, stream: bool = False, **parameters: Any) -> Request:
    parsed = parse_body("application/json", json.dumps({"inputs": inputs, "parameters": parameters}).encode())
    return Request(model="m", content_type=parsed.content_type, body=parsed.body, dialect=parsed.dialect, stream=stream)


def run(session: Seq2seqSession) -> list[Piece]:
    pieces: list[Piece] = []
    while session.busy:
        pieces += session.step()
    return pieces


def ask(session: Seq2seqSession, inputs: object, **parameters: Any) -> Any:
    session.submit(1, request_of(inputs, **parameters))
    (piece,) = run(session)
    assert not piece.code, piece.message
    return json.loads(piece.body)["outputs"]


def test_a_text_is_answered_up_to_its_end_or_its_bound(tmp_path: Path) -> None:
    session = session_of(tmp_path)
    assert ask(session, "grüß dich") == {"translation_text": "grüß dich"}
    assert ask(session, ["ab", "cd"]) == [{"translation_text": "ab"}, {"translation_text": "cd"}]
    assert ask(session, "abcdef", max_new_tokens=3) == {"translation_text": "abc"}
    assert ask(session, "abcdef", max_length=3) == {"translation_text": "ab"}


def test_pieces_add_up_to_the_answer_and_hold_whole_letters(tmp_path: Path) -> None:
    session = session_of(tmp_path)
    session.submit(1, request_of("é🎈→a", stream=True))
    pieces = [json.loads(piece.body)["outputs"]["translation_text"] for piece in run(session)]
    assert pieces == ["é", "🎈", "→", "a", ""]


def test_a_stream_that_its_bound_cuts_inside_a_letter_ends_as_the_whole_answer_does(tmp_path: Path) -> None:
    session = session_of(tmp_path)
    session.submit(1, request_of("a🎈", stream=True, max_new_tokens=3))
    streamed = "".join(json.loads(piece.body)["outputs"]["translation_text"] for piece in run(session))
    assert streamed == ask(session, "a🎈", max_new_tokens=3)["translation_text"] == "a\ufffd"


def test_every_answer_goes_on_by_a_token_a_step_and_one_text_is_read_in_each(tmp_path: Path) -> None:
    session = session_of(tmp_path)
    for ticket in range(3):
        session.submit(ticket, request_of("abcdefgh", stream=True))
    assert session.room == 1
    assert [[piece.ticket for piece in session.step()] for _ in range(4)] == [[0], [0, 1], [0, 1, 2], [0, 1, 2]]
    assert session.cancel(1)
    assert not session.cancel(1)
    assert {piece.ticket for piece in run(session)} == {0, 2}


def test_a_text_that_breaks_the_model_costs_only_itself(tmp_path: Path) -> None:
    session = session_of(tmp_path)
    session.submit(1, request_of("nan"))
    session.submit(2, request_of("fine"))
    codes = {piece.ticket: piece.code for piece in run(session)}
    assert codes == {1: "model_failed", 2: ""}


def test_text_and_answer_have_a_bound_each(tmp_path: Path) -> None:
    session = session_of(tmp_path)
    assert session.default_max_tokens == 63
    assert session.count(request_of("a" * 32, max_new_tokens=9)) == (32, 9)
    assert sum(session.count(request_of("a" * 32))) <= session.context_tokens
    assert session.count(request_of("a" * 33))[0] > session.context_tokens
    with pytest.raises(RequestError, match="inputs: 33 tokens or more are over the model's 32"):
        session.submit(1, request_of("a" * 33))
    with pytest.raises(RequestError, match="64 tokens of an answer are over the model's 63"):
        session.submit(1, request_of("a", max_new_tokens=64))
    assert not session.busy


@pytest.mark.parametrize(
    ("inputs", "parameters", "words"),
    [
        ({"text": "a"}, {}, "inputs: expected a text"),
        (["a", {}], {}, r"inputs\[1\]: expected a text"),
        ("a", {"num_beams": 4}, "parameters.num_beams: is not honoured"),
        ("a", {"do_sample": True}, "parameters.do_sample: is not honoured"),
        ("a", {"temperature": 0.5}, "parameters.temperature: is not honoured"),
        ("a", {"max_new_tokens": 0}, "parameters.max_new_tokens: expected a whole number from 1"),
        ("a", {"max_new_tokens": True}, "parameters.max_new_tokens: expected a whole number from 1"),
        ("a", {"repetition_penalty": 0}, "parameters.repetition_penalty: expected a number"),
        ("a", {"src_lang": "en"}, "the model knows one pair only"),
        ("a", {"tgt_lang": 5}, "parameters.tgt_lang: expected a language"),
        ("", {}, "the text has no tokens"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_name(
    tmp_path: Path, inputs: object, parameters: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestError, match=words):
        session_of(tmp_path).submit(1, request_of(inputs, **parameters))


def test_neutral_options_change_nothing(tmp_path: Path) -> None:
    assert ask(session_of(tmp_path), "ab", num_beams=1, do_sample=False)["translation_text"] == "ab"


def test_a_list_cannot_be_streamed(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be streamed"):
        session_of(tmp_path).submit(1, request_of(["a"], stream=True))


def test_t5_names_its_languages_in_a_prefix(tmp_path: Path) -> None:
    tasks = {"translation_en_to_de": {"prefix": "de: "}, "translation": {"prefix": "any: "}}
    session = session_of(tmp_path, files={"config.json": {"task_specific_params": tasks}})
    assert ask(session, "ab")["translation_text"] == "any: ab"
    assert ask(session, "ab", src_lang="en", tgt_lang="de")["translation_text"] == "de: ab"
    with pytest.raises(RequestError, match="the model knows translation_en_to_de"):
        session.submit(1, request_of("ab", src_lang="en", tgt_lang="fr"))


@pytest.mark.parametrize(
    ("kind", "legacy", "expected"),
    [("NllbTokenizerFast", False, "xab"), ("NllbTokenizer", True, "abx"), ("MBartTokenizer", False, "abx")],
)
def test_a_model_of_many_languages_is_told_them_by_tokens(
    tmp_path: Path, kind: str, legacy: bool, expected: str
) -> None:
    settings = {"tokenizer_class": kind, "legacy_behaviour": legacy, "src_lang": "x", "eos_token": {"content": END}}
    session = session_of(tmp_path, files={"tokenizer_config.json": settings})
    answer = session._wording.put("ab", None, "y")
    assert TOKENS.decode(answer.tokens) == expected
    assert answer.rules.forced_bos_token_id == TOKENS.number("y")
    with pytest.raises(RequestError, match="tgt_lang: this model needs a language"):
        session.submit(1, request_of("ab"))
    with pytest.raises(RequestError, match="the model does not know 'tlh_Latn'"):
        session.submit(1, request_of("ab", tgt_lang="tlh_Latn"))


def likeliest(rules: Rules, written: list[int], asked: Sequence[int] = (), most: int = 100) -> int:
    """Return the next of eight tokens, of which the higher are the likelier."""
    return next_token(np.arange(1, 9, dtype=np.float32), written, asked, rules, most)


@pytest.mark.parametrize(
    ("rules", "written", "expected"),
    [
        (Rules(), [0], 7),
        (Rules(eos_token_id=(7,), min_length=3), [0, 1], 6),
        (Rules(eos_token_id=(7,), min_length=3), [0, 1, 2], 7),
        (Rules(eos_token_id=(7,), min_new_tokens=3), [0, 1, 2], 6),
        (Rules(eos_token_id=(7,), min_new_tokens=0, min_length=9), [0, 1], 7),
        (Rules(forced_bos_token_id=2), [0], 2),
        (Rules(forced_bos_token_id=2), [0, 2], 7),
        (Rules(suppress_tokens=(7, 6)), [0], 5),
        (Rules(begin_suppress_tokens=(7,)), [0], 6),
        (Rules(begin_suppress_tokens=(7,)), [0, 1], 7),
        (Rules(begin_suppress_tokens=(7,), forced_bos_token_id=2), [0, 2], 6),
        (Rules(no_repeat_ngram_size=2), [1, 7, 3, 1], 6),
        (Rules(no_repeat_ngram_size=1), [7, 6], 5),
        (Rules(no_repeat_ngram_size=3), [7], 7),
        (Rules(bad_words_ids=((7,), (2, 6))), [0], 6),
        (Rules(bad_words_ids=((7,), (2, 6))), [0, 2], 5),
        (Rules(bad_words_ids=((7,),), eos_token_id=(7,)), [0], 7),
        (Rules(bad_words_ids=((1, 2, 7),)), [2], 7),
        (Rules(repetition_penalty=2.0), [7], 6),
    ],
)
def test_the_likeliest_token_that_the_rules_allow_comes_next(rules: Rules, written: list[int], expected: int) -> None:
    assert likeliest(rules, written) == expected


def test_what_stood_in_the_text_is_not_repeated_where_the_folder_says_so() -> None:
    assert likeliest(Rules(encoder_no_repeat_ngram_size=2), [0, 3], asked=[3, 7, 4]) == 6


def test_an_answer_at_its_bound_ends_as_the_folder_forces_it() -> None:
    assert likeliest(Rules(forced_eos_token_id=(1,)), [0, 2], most=3) == 1
    assert likeliest(Rules(forced_eos_token_id=(1,)), [0, 2], most=4) == 7


def test_a_value_that_is_no_number_is_the_models_fault() -> None:
    with pytest.raises(ModelError, match="not a number"):
        next_token(np.array([np.nan, 1.0]), [0], [], Rules(), 9)


def test_rules_come_from_either_configuration() -> None:
    rules = load_rules({"decoder_start_token_id": 3}, {"eos_token_id": 2, "max_length": 20, "bad_words_ids": [[1, 2]]})
    assert (rules.decoder_start_token_id, rules.eos_token_id, rules.most_new_tokens) == (3, (2,), 256)
    assert rules.bad_words_ids == ((1, 2),)
    older = load_rules({"decoder_start_token_id": 0, "eos_token_id": 1, "max_length": 40}, {})
    assert (older.eos_token_id, older.most_new_tokens) == ((1,), 39)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"encoder_repetition_penalty": 2.0}, "encoder_repetition_penalty is not honoured"),
        ({"min_length": "five"}, "generation_config.json"),
        ({"eos_token_id": 1, "decoder_start_token_id": None}, "decoder_start_token_id is missing"),
    ],
)
def test_rules_that_cannot_be_honoured_are_the_models_fault(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        load_rules({}, settings)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["encoder_model.onnx", "decoder_model.onnx"], Layout("encoder_model.onnx", "decoder_model.onnx")),
        (
            ["encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx"],
            Layout("encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx"),
        ),
        (
            ["onnx/encoder_model.onnx", "onnx/decoder_model.onnx", "onnx/decoder_model_merged.onnx"],
            Layout("onnx/encoder_model.onnx", "onnx/decoder_model_merged.onnx"),
        ),
        (
            ["onnx/encoder_model_quantized.onnx", "onnx/decoder_model_merged_quantized.onnx"],
            Layout("onnx/encoder_model_quantized.onnx", "onnx/decoder_model_merged_quantized.onnx"),
        ),
    ],
)
def test_graphs_are_found_in_every_layout(tmp_path: Path, files: list[str], expected: Layout) -> None:
    with Artifact(tmp_path, files) as artifact:
        assert find_layout(artifact) == expected


def test_a_folder_without_a_decoder_is_refused(tmp_path: Path) -> None:
    with Artifact(tmp_path, ["encoder_model.onnx"]) as artifact, pytest.raises(ModelError, match="decoder_model"):
        find_layout(artifact)


def test_a_decoder_that_asks_for_something_else_is_refused() -> None:
    def nothing(feeds: Mapping[str, NDArray[Any]]) -> Tensors:
        return {"last_hidden_state": feeds["input_ids"].astype(np.float32)}

    ids = TensorSpec("input_ids", "int64", (None, None))
    odd = TensorSpec("pixel_values", "float32", (None,))
    graphs = Graphs(
        Layout("encoder", "decoder"),
        lambda path: MemoryBackend([ids] if path == "encoder" else [ids, odd], [], nothing),
    )
    with pytest.raises(ModelError, match="pixel_values"):
        graphs.step(graphs.read([1, 2]), [0])
