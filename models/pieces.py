"""Marian's vocabularies, `source.spm` and `vocab.json`, as a `tokenizer.json`. Pure: no I/O, no clock.

Reads the protocol buffer of sentencepiece_model.proto (https://github.com/google/sentencepiece); Optimum writes such
folders, since `transformers` has no fast tokenizer for these models.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec

from models.errors import ModelError

SPACE: Final = "\N{LOWER ONE EIGHTH BLOCK}"
UNKNOWN: Final = "<unk>"
END: Final = "</s>"
SPECIAL: Final = (END, UNKNOWN, "<pad>")
_NORMAL: Final = 1
_USER_DEFINED: Final = 4
_UNIGRAM: Final = 1
_STAND_IN: Final = "\U0010fffd"
"""Begins the names of tokens that no text is read as; a private letter, which stands in no vocabulary."""


class Pieces(msgspec.Struct, frozen=True):
    """A sentencepiece model: the score of each piece, and the table by which letters are folded (empty: none)."""

    scores: dict[str, float]
    folding: bytes


def parse_pieces(data: bytes) -> Pieces:
    """Read a sentencepiece model of the unigram kind; raises ModelError."""
    scores: dict[str, float] = {}
    folding = b""
    try:
        for field, value in _fields(data):
            if field == 1:
                members = dict(_fields(value))
                if members.get(3, _NORMAL) in {_NORMAL, _USER_DEFINED}:
                    scores[members.get(1, b"").decode()] = struct.unpack("<f", members.get(2, bytes(4)))[0]
            elif field == 2:
                _check_kind(dict(_fields(value)))
            elif field == 3:
                folding = dict(_fields(value)).get(2, b"")
    except (struct.error, UnicodeDecodeError, TypeError, AttributeError, IndexError) as error:
        raise ModelError("source.spm is no sentencepiece model") from error
    if not scores:
        raise ModelError("source.spm has no pieces")
    return Pieces(scores, folding)


def tokenizer_json(pieces: Pieces, vocabulary: Sequence[str]) -> bytes:
    """Return a `tokenizer.json` that reads texts by these pieces, each with its number in the vocabulary."""
    least = min(pieces.scores.values())
    # Tokens that only answers have keep their numbers, under names that no text has.
    model = [[piece, pieces.scores[piece]] if piece in pieces.scores else [f"{_STAND_IN}{number}", least]
             for number, piece in enumerate(vocabulary)]  # fmt: skip
    numbers = {name: vocabulary.index(name) for name in SPECIAL if name in vocabulary}
    for name, number in numbers.items():
        model[number] = [name, 0.0]
    end = numbers[END]
    template = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": END, "type_id": 0}}]
    spaces = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": True}
    return msgspec.json.encode({
        "version": "1.0",
        "added_tokens": [_added(name, number) for name, number in sorted(numbers.items(), key=lambda pair: pair[1])],
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(pieces.folding)},
        "pre_tokenizer": spaces,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": template,
            "pair": [template[0], {"Sequence": {"id": "B", "type_id": 0}}, template[1]],
            "special_tokens": {END: {"id": END, "ids": [end], "tokens": [END]}},
        },
        "decoder": spaces,
        "model": {"type": "Unigram", "unk_id": numbers[UNKNOWN], "vocab": model, "byte_fallback": False},
    })  # fmt: skip


def parse_vocabulary(table: Mapping[str, object], name: str) -> list[str]:
    """Return the pieces of a `vocab.json` in the order of their numbers; raises ModelError."""
    pieces: dict[int, str] = {number: piece for piece, number in table.items() if isinstance(number, int)}
    if sorted(pieces) != list(range(len(table))) or END not in table or UNKNOWN not in table:
        raise ModelError(f"{name} does not number its pieces from 0, {END} and {UNKNOWN} among them")
    return [pieces[number] for number in range(len(pieces))]


def _normalizers(folding: bytes) -> list[dict[str, Any]]:
    table = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(folding).decode()}
    return [
        *([table] if folding else []),
        {"type": "Strip", "strip_left": False, "strip_right": True},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": SPACE},
    ]


def _added(name: str, number: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": name, **flags}


def _check_kind(settings: Mapping[int, Any]) -> None:
    if settings.get(3, _UNIGRAM) != _UNIGRAM:
        raise ModelError("source.spm is not of the unigram kind; export the model with a tokenizer.json")


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Give the fields of a message: numbers as they are, everything else as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        length = {1: 8, 5: 4}.get(kind, 0)
        if kind == 2:
            length, at = _varint(data, at)
        elif not length:
            raise ModelError("source.spm is no sentencepiece model")
        if length > len(data) - at:
            raise ModelError("source.spm is cut short")
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ModelError("source.spm is no sentencepiece model")
