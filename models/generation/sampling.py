"""From logits to the next token, in the order that `transformers` applies its processors and warpers. No I/O, no clock.

Penalties of `frequency` and `presence` are OpenAI's: taken off the logits of tokens that were generated, not asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from models.errors import ModelError
from models.generation.options import Sampling

Logits = NDArray[np.float32]

_CANDIDATES: Final = 1024
"""The likeliest tokens that `top_p` is first sought among; sorting a whole vocabulary takes many times as long."""


class Sampler:
    """Draws the tokens of one text; the same `Sampling` with a seed draws the same tokens from the same logits."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], end_tokens: frozenset[int]) -> None:
        self._sampling = sampling
        self._ends = np.array(sorted(end_tokens), dtype=np.int64)
        self._seen = np.unique(np.asarray(prompt, dtype=np.int64)) if _repels(sampling) else np.empty(0, np.int64)
        self._counts: dict[int, int] = {}
        self._drawn = 0
        self._random = np.random.default_rng(sampling.seed)
        # Most texts take the likeliest token of logits that nothing has changed.
        self._plain = not (sampling.temperature or _repels(sampling) or _shifts(sampling) or sampling.min_tokens)

    def draw(self, logits: Logits, allowed: NDArray[np.bool_] | None = None) -> int:
        """Return the next token of those `allowed`; raises ModelError where the model gives no number for any."""
        if not self._plain or allowed is not None:
            logits = self._processed(logits, allowed)
        best = int(logits.argmax())
        if not np.isfinite(logits[best]):
            raise ModelError("the model's logits are no finite numbers")
        token = self._drawn_from(logits) if self._sampling.temperature else best
        self._note(token)
        return token

    def _processed(self, logits: Logits, allowed: NDArray[np.bool_] | None) -> Logits:
        """Return a changed copy: penalties, the tokens that may not end a text yet, and the allowed ones."""
        sampling = self._sampling
        logits = logits.copy()
        if _repels(sampling):
            values = logits[self._seen]
            penalty = np.float32(sampling.repetition_penalty or 1.0)
            logits[self._seen] = np.where(values < 0, values * penalty, values / penalty)
        if self._counts and _shifts(sampling):
            tokens = np.fromiter(self._counts, np.int64, len(self._counts))
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            logits[tokens] -= (sampling.frequency_penalty or 0.0) * counts + (sampling.presence_penalty or 0.0)
        if allowed is not None:
            size = min(len(logits), len(allowed))
            logits[size:] = -np.inf
            logits[:size][~allowed[:size]] = -np.inf
        if self._drawn < (sampling.min_tokens or 0):
            kept = logits[self._ends]
            logits[self._ends] = -np.inf
            if not np.isfinite(logits.max()):  # the grammar allows an end only, which is stronger than a wish
                logits[self._ends] = kept
        return logits

    def _drawn_from(self, logits: Logits) -> int:
        """Draw by temperature, top_k, top_p and min_p."""
        sampling = self._sampling
        scaled = logits.astype(np.float64) / (sampling.temperature or 1.0)
        tokens = _likeliest(scaled, sampling.top_k) if sampling.top_k else None
        kept = scaled if tokens is None else scaled[tokens]
        shares = np.exp(kept - kept.max())
        shares /= shares.sum()
        if sampling.top_p is not None and sampling.top_p < 1:
            inner = _nucleus(shares, sampling.top_p)
            tokens, shares = inner if tokens is None else tokens[inner], shares[inner]
        if sampling.min_p:
            inner = np.flatnonzero(shares >= sampling.min_p * shares.max())
            tokens, shares = inner if tokens is None else tokens[inner], shares[inner]
        sums = shares.cumsum()
        at = min(int(np.searchsorted(sums, self._random.random() * sums[-1], side="right")), len(sums) - 1)
        return at if tokens is None else int(tokens[at])

    def _note(self, token: int) -> None:
        """Remember a token for the penalties."""
        self._drawn += 1
        if _shifts(self._sampling):
            self._counts[token] = self._counts.get(token, 0) + 1
        if _repels(self._sampling) and token not in self._seen:
            self._seen = np.append(self._seen, token)


def _repels(sampling: Sampling) -> bool:
    return sampling.repetition_penalty not in {None, 1.0}


def _shifts(sampling: Sampling) -> bool:
    return bool(sampling.frequency_penalty or sampling.presence_penalty)


def _likeliest(scaled: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Return the tokens of the `count` highest logits, in the vocabulary's order."""
    if count >= len(scaled):
        return np.arange(len(scaled))
    return np.sort(np.argpartition(scaled, -count)[-count:])


def _nucleus(shares: NDArray[Any], top_p: float) -> NDArray[np.int64]:
    """Return the fewest likeliest places whose shares add up to `top_p`, one at least."""
    for count in (_CANDIDATES, len(shares)):
        ranked = _ranked(shares, min(count, len(shares)))
        sums = shares[ranked].cumsum()
        if sums[-1] >= top_p:
            return ranked[: 1 + int(np.searchsorted(sums, top_p))]
    return _ranked(shares, len(shares))


def _ranked(shares: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Return the places of the `count` largest shares, the largest first."""
    places = np.argpartition(shares, -count)[-count:]
    return places[np.argsort(-shares[places], kind="stable")]
