"""Scores of tokens into entities, by the rules of the Hugging Face pipeline. Pure: no I/O, no clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

AGGREGATIONS: Final = ("none", "simple", "first", "average", "max")

Entity = dict[str, Any]
Name = Callable[[int], str]
Join = Callable[[list[str]], str]


class Piece(msgspec.Struct, frozen=True):
    """A token with the scores of every label; `continues` is whether it goes on with the word before it."""

    word: str
    scores: NDArray[np.float32]
    start: int
    end: int
    index: int
    continues: bool


def single(piece: Piece, name: Name) -> Entity:
    """Return a token as an entity of its own."""
    best = int(piece.scores.argmax())
    return {
        "entity": name(best),
        "score": float(piece.scores[best]),
        "index": piece.index,
        "word": piece.word,
        "start": piece.start,
        "end": piece.end,
    }


def words_of(pieces: Sequence[Piece], aggregation: str, name: Name, join: Join) -> list[Entity]:
    """Return one entity for each word, its label that of its `first` or `max` token or of the `average`."""
    words: list[list[Piece]] = []
    for piece in pieces:
        if words and piece.continues:
            words[-1].append(piece)
        else:
            words.append([piece])
    return [_word(word, aggregation, name, join) for word in words]


def _word(pieces: Sequence[Piece], aggregation: str, name: Name, join: Join) -> Entity:
    if aggregation == "first":
        scores = pieces[0].scores
    elif aggregation == "max":
        scores = max(pieces, key=lambda piece: piece.scores.max()).scores
    else:
        scores = np.mean([piece.scores for piece in pieces], axis=0)
    best = int(scores.argmax())
    return {
        "entity": name(best),
        "score": float(scores[best]),
        "word": join([piece.word for piece in pieces]),
        "start": pieces[0].start,
        "end": pieces[-1].end,
    }


def group(entities: Sequence[Entity], join: Join) -> list[Entity]:
    """Join neighbours of one label; `B-` begins anew."""
    groups: list[list[Entity]] = []
    for entity in entities:
        begins, tag = _tag(entity["entity"])
        if groups and not begins and tag == _tag(groups[-1][-1]["entity"])[1]:
            groups[-1].append(entity)
        else:
            groups.append([entity])
    return [_joined(members, join) for members in groups]


def _tag(label: str) -> tuple[bool, str]:
    """Return whether a label begins an entity, and its name without B- and I-."""
    return label.startswith("B-"), label[2:] if label.startswith(("B-", "I-")) else label


def _joined(members: Sequence[Entity], join: Join) -> Entity:
    return {
        "entity_group": members[0]["entity"].split("-", 1)[-1],
        "score": float(np.mean([member["score"] for member in members])),
        "word": join([member["word"] for member in members]),
        "start": members[0]["start"],
        "end": members[-1]["end"],
    }


def best_of_overlapping(entities: Sequence[Entity]) -> list[Entity]:
    """Return the entities of several windows in their order; of those that overlap the longest, then the surest."""
    if not entities:
        return []
    ranked = sorted(entities, key=lambda entity: entity["start"])
    kept = [ranked[0]]
    # From the first one on, as the pipeline has it: an entity without letters at the beginning is given twice.
    for entity in ranked:
        last = kept[-1]
        if not last["start"] <= entity["start"] < last["end"]:
            kept.append(entity)
        elif (_length(entity), entity["score"]) > (_length(last), last["score"]):
            kept[-1] = entity
    return kept


def _length(entity: Entity) -> int:
    return int(entity["end"] - entity["start"])
