"""Continuous batching: texts join and leave at every step, share one run for each token, and their prompts' beginnings.

A step is one run for all texts whose prompts are computed, then a part of one other text's prompt. A text begins once
the cache has room for its prompt and its whole answer, so that none breaks off for want of memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.errors import ModelError
from models.generation.cache import Cache
from models.generation.prefixes import PrefixStore
from models.generation.runtime import Event, Text
from models.generation.sampling import Sampler

PART_TOKENS: Final = 128
"""A prompt is computed in parts of this length; longer ones gain nothing (docs/decisions/0014)."""
SHARED_PART_TOKENS: Final = 64
"""The same while other texts wait for their next token."""
MAX_LOGITS_BYTES: Final = 32 << 20
"""Of one part, of graphs that give the logits of every token: for a large vocabulary these are many."""


class _Seat(msgspec.Struct, eq=False):
    """A text under way; `tokens` are its prompt and what was drawn, the last of which is not computed yet."""

    number: int
    text: Text
    sampler: Sampler
    tokens: list[int]
    begun: bool = False


class BatchingRuntime:
    """Up to `seats` texts over one cache, which with the beginnings kept for later takes at most `max_bytes`."""

    def __init__(
        self, cache: Cache, *, seats: int, context_tokens: int, end_tokens: frozenset[int], max_bytes: int
    ) -> None:
        self._cache = cache
        self._max_seats = seats
        self._max_bytes = max_bytes
        self._store = PrefixStore(max_bytes)
        self._waiting: deque[Text] = deque()
        self._seats: dict[int, _Seat] = {}
        self._unkept: list[_Seat] = []
        self._next = 0
        self._turn = 0
        self.context_tokens = min(context_tokens, max_bytes // cache.shape.token_bytes)
        self.end_tokens = end_tokens
        if self.context_tokens < 1:
            raise ModelError(f"{max_bytes} bytes for the cache do not hold one token of {cache.shape.token_bytes}")

    def start(self, text: Text) -> None:
        """Take a text; it waits while the cache has no room for the whole of it."""
        self._waiting.append(text)

    def stop(self, text: Text) -> None:
        """Let go of a text; what was computed is kept for the next one that begins alike."""
        if text in self._waiting:
            self._waiting.remove(text)
            return
        seat = next((seat for seat in self._seats.values() if seat.text is text), None)
        if seat is not None:
            self._keep(seat)
            self._leave(seat)

    def step(self) -> list[Event]:
        """Compute a token of every text whose prompt is computed, and a part of one prompt."""
        self._keep_prompts()
        self._admit()
        writing = [seat for seat in self._seats.values() if self._rest(seat) == 1 and seat.begun]
        reading = [seat for seat in self._seats.values() if seat not in writing]
        events = self._write(writing) if writing else []
        if reading:
            events += self._read(self._pick(reading), alone=not writing)
        for event in events:
            if event.failure is not None:
                self._leave(next(seat for seat in self._seats.values() if seat.text is event.text))
        return events

    def close(self) -> None:
        """Let go of every text and of all that was kept."""
        self._waiting.clear()
        for seat in list(self._seats.values()):
            self._leave(seat)
        self._store.limit(0)

    def _admit(self) -> None:
        """Seat those that wait, in their order, while there is room for the whole of them."""
        while self._waiting and len(self._seats) < self._max_seats:
            text = self._waiting[0]
            if self._reserved() + self._needed(text) > self._max_bytes:
                return
            self._waiting.popleft()
            self._cache.open(self._next)
            sampler = Sampler(text.sampling, text.prompt, self.end_tokens)
            self._seats[self._next] = _Seat(self._next, text, sampler, list(text.prompt))
            self._next += 1
            self._store.limit(self._max_bytes - self._reserved())

    def _needed(self, text: Text) -> int:
        return (len(text.prompt) + text.max_tokens) * self._cache.shape.token_bytes

    def _reserved(self) -> int:
        return sum(self._needed(seat.text) for seat in self._seats.values())

    def _rest(self, seat: _Seat) -> int:
        """Return how many tokens of a text are not computed."""
        return len(seat.tokens) - self._cache.length(seat.number)

    def _pick(self, reading: Sequence[_Seat]) -> _Seat:
        """Return whose prompt goes on: in turn the one that came first and the one that is done soonest."""
        self._turn += 1
        return min(reading, key=self._rest) if self._turn % 2 else reading[0]

    def _read(self, seat: _Seat, *, alone: bool) -> list[Event]:
        """Compute a part of a prompt; its last part gives the text's first token."""
        if self._cache.length(seat.number) == 0:
            for values in self._store.find(seat.tokens):
                self._cache.write(seat.number, values)
        start = self._cache.length(seat.number)
        size = PART_TOKENS if alone else SHARED_PART_TOKENS
        part = seat.tokens[start : start + min(size, self._cache.part_tokens)]
        try:
            logits = self._cache.prefill(seat.number, part)
        except ModelError as error:
            return [Event(seat.text, failure=error)]
        if self._rest(seat):
            return []
        seat.begun = True
        self._unkept.append(seat)
        return [self._draw(seat, logits)]

    def _write(self, seats: Sequence[_Seat]) -> list[Event]:
        """Compute one token of each text; if the run fails, each is tried alone to find whose fault it is."""
        try:
            rows = self._cache.decode([seat.number for seat in seats], [seat.tokens[-1] for seat in seats])
        except ModelError as error:
            if len(seats) == 1:
                return [Event(seats[0].text, failure=error)]
            return [event for seat in seats for event in self._write([seat])]
        return [self._draw(seat, logits) for seat, logits in zip(seats, rows, strict=True)]

    def _draw(self, seat: _Seat, logits: NDArray[np.float32]) -> Event:
        matcher = seat.text.matcher
        try:
            token = seat.sampler.draw(logits, matcher.allowed() if matcher else None)
            if matcher:
                matcher.accept(token)
        except ModelError as error:
            return Event(seat.text, failure=error)
        seat.tokens.append(token)
        return Event(seat.text, token)

    def _keep_prompts(self) -> None:
        """Keep what the last step computed whole; only now, since its first token was not to wait for it."""
        for seat in self._unkept:
            if seat.number in self._seats:
                self._keep(seat)
        self._unkept.clear()

    def _keep(self, seat: _Seat) -> None:
        computed = seat.tokens[: self._cache.length(seat.number)]
        self._store.put(computed, lambda start, stop: self._cache.read(seat.number, start, stop))

    def _leave(self, seat: _Seat) -> None:
        del self._seats[seat.number]
        self._cache.close(seat.number)
        self._store.limit(self._max_bytes - self._reserved())


def part_tokens(vocabulary: int) -> int:
    """Return how many tokens of a prompt a graph that gives all logits may compute at once: a power of two."""
    fitting = max(1, MAX_LOGITS_BYTES // (4 * max(1, vocabulary)))
    return min(PART_TOKENS, 1 << (fitting.bit_length() - 1))
