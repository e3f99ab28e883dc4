"""The face of the two caches, and what they have in common. Pure: no I/O, no clock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from models.generation.graph import CacheShape

Seat = int
"""Whose place in the cache; given by the caller."""


class Cache(Protocol):
    """Computed keys and values of several texts, each at its seat, and the graph that adds to them.

    `prefill` and `decode` return logits as float32: of the last token, and a row for each seat. A run that raises
    ModelError leaves every seat as it was.
    """

    @property
    def shape(self) -> CacheShape:
        """What a token takes."""

    @property
    def part_tokens(self) -> int:
        """The most tokens of one `prefill`."""

    def open(self, seat: Seat) -> None:
        """Begin an empty text."""

    def close(self, seat: Seat) -> None:
        """Forget a text and give its memory back."""

    def length(self, seat: Seat) -> int:
        """Return how many tokens of a text are computed."""

    def prefill(self, seat: Seat, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Compute the next tokens of one text."""

    def decode(self, seats: Sequence[Seat], tokens: Sequence[int]) -> NDArray[np.float32]:
        """Compute one more token of each text."""

    def read(self, seat: Seat, start: int, stop: int) -> NDArray[Any]:
        """Copy a range of a text out: (tensors, heads, stop - start, size)."""

    def write(self, seat: Seat, values: NDArray[Any]) -> None:
        """Append what was read elsewhere to a text."""
