"""Marian's vocabularies, read from their own files."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from models.artifact import Artifact
from models.errors import ModelError
from models.pieces import parse_pieces
from models.tokens import MarianTokenizer, load_tokenizer
from tests.fakes.onnx_graph import number, part

SCORES = {"▁the": -1.0, "▁p": -2.0, "ump": -2.5, "p": -3.0, "u": -4.0, "m": -4.0, "▁": -3.5}


def piece(text: str, score: float, kind: int | None = None) -> bytes:
    body = part(1, text) + b"\x15" + struct.pack("<f", score)
    return part(1, body + (number(3, kind) if kind else b""))


def source(*more: bytes) -> bytes:
    control = piece("<unk>", 0, 2) + piece("</s>", 0, 3)
    return control + b"".join(piece(text, score) for text, score in SCORES.items()) + b"".join(more)


def opened(folder: Path, *, separate: bool = False) -> MarianTokenizer:
    vocabulary = ["</s>", "<unk>", ">>deu<<", *SCORES, "▁die", "<pad>"]
    (folder / "source.spm").write_bytes(source())
    files = ["source.spm", "vocab.json"]
    (folder / "vocab.json").write_text(json.dumps({text: at for at, text in enumerate(vocabulary)}))
    if separate:
        files.append("target_vocab.json")
        (folder / "target_vocab.json").write_text(json.dumps({"</s>": 0, "<unk>": 1, "▁das": 2, "ch": 3}))
    with Artifact(folder, files) as artifact:
        tokenizer = load_tokenizer(artifact)
    assert isinstance(tokenizer, MarianTokenizer)
    return tokenizer


def test_a_text_is_read_by_the_likeliest_pieces_and_ends(tmp_path: Path) -> None:
    assert opened(tmp_path).encode("  the pump ").ids == [3, 4, 5, 0]
    assert opened(tmp_path).encode("the pump", special=False).ids == [3, 4, 5]


def test_what_only_answers_have_is_unknown_in_a_text(tmp_path: Path) -> None:
    assert opened(tmp_path).encode("the die").ids == [3, 9, 1, 0]


def test_the_code_of_a_language_is_one_token(tmp_path: Path) -> None:
    assert opened(tmp_path).encode(">>deu<< the").ids == [2, 3, 0]
    assert opened(tmp_path).encode(">>tlh<< the").ids == [1, 3, 0]


def test_an_answer_is_written_without_its_special_tokens(tmp_path: Path) -> None:
    assert opened(tmp_path).decode([11, 10, 4, 5, 0]) == "die pump"
    assert opened(tmp_path, separate=True).decode([2, 3, 0]) == "dasch"
    with pytest.raises(ModelError, match="no text"):
        opened(tmp_path, separate=True).decode([4])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no pieces"),
        (b"\x0a\x05ab", "cut short"),
        (b"\x0b", "no sentencepiece model"),
        (b"\xff" * 12, "no sentencepiece model"),
        (piece("a", 0)[:-1] + b"\xff\xff", "no sentencepiece model"),
        (source(part(2, number(3, 2))), "unigram"),
        (part(1, part(1, b"\xff")), "no sentencepiece model"),
    ],
)
def test_e10_a_sentencepiece_model_that_is_none_is_the_models_fault(data: bytes, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        parse_pieces(data)


def test_a_table_with_holes_is_the_models_fault(tmp_path: Path) -> None:
    (tmp_path / "source.spm").write_bytes(source())
    (tmp_path / "vocab.json").write_text('{"</s>": 0, "<unk>": 2}')
    with Artifact(tmp_path, ["source.spm", "vocab.json"]) as artifact, pytest.raises(ModelError, match=r"vocab\.json"):
        load_tokenizer(artifact)
