"""A cache for graphs that give all of it out again, one place longer: what Optimum exports.

Texts that decode together stand side by side with their ends in line, so that each one's next place is the same; what
lies before a shorter text's beginning is masked. They are put together anew only when one joins or leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from models.generation.cache import Seat
from models.generation.graph import DecoderGraph

Tensors = list[NDArray[Any]]


class GrowingCache:
    """Texts of any length, as their graph returns them."""

    def __init__(self, graph: DecoderGraph, *, part_tokens: int) -> None:
        self.shape: Final = graph.shape
        self.part_tokens: Final = part_tokens
        self._graph = graph
        self._lengths: dict[Seat, int] = {}
        self._alone: dict[Seat, Tensors] = {}
        self._batch: tuple[Seat, ...] = ()
        self._together: Tensors = []

    def open(self, seat: Seat) -> None:
        """Begin an empty text."""
        shape = self.shape
        self._alone[seat] = [np.zeros((1, shape.heads, 0, shape.size), shape.dtype) for _ in range(shape.tensors)]
        self._lengths[seat] = 0

    def close(self, seat: Seat) -> None:
        """Forget a text and give its memory back."""
        self._part()
        del self._alone[seat], self._lengths[seat]

    def length(self, seat: Seat) -> int:
        """Return how many tokens of a text are computed."""
        return self._lengths[seat]

    def prefill(self, seat: Seat, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Compute the next tokens of one text."""
        if seat in self._batch:
            self._part()
        ids = np.array([tokens], dtype=np.int64)
        logits, self._alone[seat] = self._run(ids, [self._lengths[seat]], self._alone[seat])
        self._lengths[seat] += len(tokens)
        last: NDArray[np.float32] = logits[0]
        return last

    def decode(self, seats: Sequence[Seat], tokens: Sequence[int]) -> NDArray[np.float32]:
        """Compute one more token of each text."""
        if tuple(seats) != self._batch:
            self._part()
            self._join(seats)
        ids = np.array(tokens, dtype=np.int64)[:, None]
        logits, self._together = self._run(ids, [self._lengths[seat] for seat in seats], self._together)
        for seat in seats:
            self._lengths[seat] += 1
        return logits

    def read(self, seat: Seat, start: int, stop: int) -> NDArray[Any]:
        """Copy a range of a text out."""
        row, tensors = (self._batch.index(seat), self._together) if seat in self._batch else (0, self._alone[seat])
        before = tensors[0].shape[2] - self._lengths[seat]
        return np.stack([tensor[row, :, before + start : before + stop] for tensor in tensors])

    def write(self, seat: Seat, values: NDArray[Any]) -> None:
        """Append what was read elsewhere to a text."""
        added = zip(self._alone[seat], values, strict=True)
        self._alone[seat] = [np.concatenate((tensor, value[None]), axis=2) for tensor, value in added]
        self._lengths[seat] += values.shape[2]

    def _run(
        self, ids: NDArray[np.int64], lengths: Sequence[int], past: Tensors
    ) -> tuple[NDArray[np.float32], Tensors]:
        """Compute one or more tokens of each row, whose last `lengths` places of the past are its own."""
        graph, count, held = self._graph, ids.shape[1], past[0].shape[2]
        own = np.array(lengths, dtype=np.int64)[:, None]
        feeds = {
            "input_ids": ids,
            "attention_mask": np.arange(held + count) >= held - own,
            "position_ids": own + np.arange(count),
        }
        feeds = {name: value.astype(graph.integers[name]) for name, value in feeds.items() if name in graph.takes}
        feeds |= graph.extras(past=held) | dict(zip(graph.past, past, strict=True))
        logits, *present = graph.run(feeds)
        return logits[:, -1].astype(np.float32, copy=False), present

    def _part(self) -> None:
        """Give each text of the batch its own tensors again."""
        for row, seat in enumerate(self._batch):
            length = self._lengths[seat]
            held = self._together[0].shape[2]
            self._alone[seat] = [tensor[row : row + 1, :, held - length :].copy() for tensor in self._together]
        self._batch, self._together = (), []

    def _join(self, seats: Sequence[Seat]) -> None:
        """Put texts side by side, the shorter ones behind a gap."""
        longest = max(self._lengths[seat] for seat in seats)
        shape = self.shape
        self._together = [
            np.zeros((len(seats), shape.heads, longest, shape.size), shape.dtype) for _ in range(shape.tensors)
        ]
        for row, seat in enumerate(seats):
            for target, own in zip(self._together, self._alone[seat], strict=True):
                target[row, :, longest - self._lengths[seat] :] = own[0]
            self._alone[seat] = []
        self._batch = tuple(seats)
