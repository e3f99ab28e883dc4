"""The likeliest spans between two rows of scores, as the Hugging Face pipeline ranks them. Pure: no I/O, no clock.

In single precision as there, so that scores too small to tell apart are equal here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

_IMPOSSIBLE: Final = np.float32(-10000.0)


class Span(msgspec.Struct, frozen=True):
    """Tokens `start` to `end`, both included."""

    start: int
    end: int
    score: float


def probabilities(logits: NDArray[Any], allowed: Sequence[bool]) -> NDArray[np.float32]:
    """Return the softmax over the tokens that are allowed."""
    values = np.where(allowed, logits.astype(np.float32), _IMPOSSIBLE)
    powers = np.exp(values - values.max())
    return np.asarray(powers / powers.sum())


def null_score(start: NDArray[np.float32], end: NDArray[np.float32]) -> float:
    """Return how likely it is that there is no answer, which the first token stands for."""
    return float(start[0] * end[0])


def best_spans(
    start: NDArray[np.float32], end: NDArray[np.float32], allowed: Sequence[bool], wanted: int, longest: int
) -> list[Span]:
    """Return at most `wanted` spans of at most `longest` tokens, the likeliest first, without the first token."""
    start, end = start.copy(), end.copy()
    start[0] = end[0] = 0.0
    candidates = np.tril(np.triu(np.outer(start, end)), longest - 1)
    flat = candidates.ravel()
    if wanted == 1:
        order = np.asarray([flat.argmax()])
    elif len(flat) <= wanted:
        order = np.argsort(-flat)
    else:
        likeliest = np.argpartition(-flat, wanted)[:wanted]
        order = likeliest[np.argsort(-flat[likeliest])]
    rows, columns = np.unravel_index(order, candidates.shape)
    return [
        Span(int(row), int(column), float(candidates[row, column]))
        for row, column in zip(rows, columns, strict=True)
        if allowed[row] and allowed[column]
    ]
