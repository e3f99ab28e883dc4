"""A cache whose rows the graph writes in place: for GroupQueryAttention, with past and present in one buffer."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from models.errors import ModelError
from models.generation.cache import Seat
from models.generation.graph import DecoderGraph

_PAGE: Final = mmap.PAGESIZE


class RowCache:
    """`rows` texts of at most `max_tokens`; a row's memory is taken as it is written, and given back when it closes.

    One row more than texts can be open: the room to put those that decode together at the front.
    """

    def __init__(self, graph: DecoderGraph, *, rows: int, max_tokens: int, part_tokens: int) -> None:
        self.shape: Final = graph.shape
        self.part_tokens: Final = part_tokens
        self._tokens = max_tokens
        self._free = list(range(rows, -1, -1))
        self._rows: dict[Seat, int] = {}
        self._lengths: dict[Seat, int] = {}
        self._memory, self._kv = _memory(graph, rows + 1, max_tokens)
        self._prefill = _Step(graph, self._kv, 1, part_tokens)
        self._decode = _Step(graph, self._kv, rows, 1)

    def open(self, seat: Seat) -> None:
        """Begin an empty text; raises ModelError where every row is taken."""
        if len(self._free) < 2:
            raise ModelError("every row of the cache is taken")
        # The first row is where decoding begins, so that a text alone need not be moved.
        row = min(self._free)
        self._free.remove(row)
        self._rows[seat], self._lengths[seat] = row, 0

    def close(self, seat: Seat) -> None:
        """Forget a text and give its memory back."""
        row = self._rows.pop(seat)
        self._free.append(row)
        self._release(row, self._lengths.pop(seat))

    def length(self, seat: Seat) -> int:
        """Return how many tokens of a text are computed."""
        return self._lengths[seat]

    def prefill(self, seat: Seat, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Compute the next tokens of one text."""
        ids = np.array([tokens], dtype=np.int64)
        logits = self._prefill.run(self._rows[seat], ids, [self._lengths[seat]])
        self._lengths[seat] += len(tokens)
        last: NDArray[np.float32] = logits[0]
        return last

    def decode(self, seats: Sequence[Seat], tokens: Sequence[int]) -> NDArray[np.float32]:
        """Compute one more token of each text."""
        self._gather(seats)
        by_row = sorted(range(len(seats)), key=lambda at: self._rows[seats[at]])
        ids = np.array([[tokens[at]] for at in by_row], dtype=np.int64)
        logits = self._decode.run(0, ids, [self._lengths[seats[at]] for at in by_row])
        for seat in seats:
            self._lengths[seat] += 1
        return logits[np.argsort(by_row)]

    def read(self, seat: Seat, start: int, stop: int) -> NDArray[Any]:
        """Copy a range of a text out."""
        return self._kv[:, self._rows[seat], :, start:stop].copy()

    def write(self, seat: Seat, values: NDArray[Any]) -> None:
        """Append what was read elsewhere to a text."""
        start = self._lengths[seat]
        stop = start + values.shape[2]
        self._kv[:, self._rows[seat], :, start:stop] = values
        self._lengths[seat] = stop

    def _gather(self, seats: Sequence[Seat]) -> None:
        """Put the texts that decode together into the first rows."""
        count = len(seats)
        inside = {self._rows[seat] for seat in seats if self._rows[seat] < count}
        outside = [seat for seat in seats if self._rows[seat] >= count]
        for row, seat in zip((row for row in range(count) if row not in inside), outside, strict=True):
            for other, taken in self._rows.items():
                if taken == row:
                    self._move(other, max(self._free))
                    break
            self._move(seat, row)

    def _move(self, seat: Seat, row: int) -> None:
        old, length = self._rows[seat], self._lengths[seat]
        self._free.remove(row)
        self._kv[:, row, :, :length] = self._kv[:, old, :, :length]
        self._rows[seat] = row
        self._free.append(old)
        self._release(old, length)

    def _release(self, row: int, length: int) -> None:
        """Give a row's pages back to the system."""
        if not length:
            return
        whole = self._kv.strides[1]
        for tensor in range(self.shape.tensors):
            start = tensor * self._kv.strides[0] + row * whole
            first, last = -(-start // _PAGE) * _PAGE, (start + whole) // _PAGE * _PAGE
            if last > first:
                # Some kernels cannot; the memory is then used again by the next text of this row.
                with contextlib.suppress(OSError):
                    self._memory.madvise(mmap.MADV_REMOVE, first, last - first)


class _Step:
    """Runs of one shape family over rows of the cache: at most `rows` rows of at most `tokens` tokens."""

    def __init__(self, graph: DecoderGraph, kv: NDArray[Any], rows: int, tokens: int) -> None:
        self._graph = graph
        self._kv = kv
        self._binding = graph.binding()
        self._bound = (-1, -1)
        self._logits = np.empty(rows * (1 if graph.keeps_last else tokens) * graph.vocabulary, graph.logits_dtype)
        self._bound_logits: NDArray[Any] = np.empty((0, 0, 0), graph.logits_dtype)
        self._held: dict[str, NDArray[Any]] = {}

    def run(self, first: int, ids: NDArray[np.int64], lengths: Sequence[int]) -> NDArray[np.float32]:
        """Run the rows from `first` on, of which `lengths` tokens are computed; return the last token's logits."""
        rows, count = ids.shape
        past = np.array(lengths, dtype=np.int64)[:, None]
        total = int(past.max()) + count
        self._bind_cache(first, rows)
        self._bind("input_ids", ids)
        self._bind("attention_mask", np.arange(total) < past + count)
        if "position_ids" in self._graph.takes:
            self._bind("position_ids", past + np.arange(count))
        for name, value in self._graph.extras(past=int(past.max())).items():
            self._bind(name, value)
        logits = self._bind_logits(rows, 1 if self._graph.keeps_last else count)
        self._graph.run_bound(self._binding)
        return logits[:, -1].astype(np.float32, copy=False)

    def _bind_logits(self, rows: int, places: int) -> NDArray[Any]:
        """Return where the logits will be; bound anew only where their shape is another."""
        if self._bound_logits.shape[:2] != (rows, places):
            self._bound_logits = self._logits[: rows * places * self._graph.vocabulary].reshape(rows, places, -1)
            logits = self._bound_logits
            self._binding.bind_output("logits", "cpu", 0, logits.dtype, logits.shape, logits.ctypes.data)
        return self._bound_logits

    def _bind(self, name: str, value: NDArray[Any]) -> None:
        held = self._held.get(name)
        if held is not None and held.shape == value.shape:
            held[...] = value
            return
        value = np.array(value, dtype=self._graph.integers.get(name, value.dtype), order="C")
        self._held[name] = value  # the runtime keeps an address only
        self._binding.bind_input(name, "cpu", 0, value.dtype, value.shape, value.ctypes.data)

    def _bind_cache(self, first: int, rows: int) -> None:
        """Bind each tensor's rows as past and present; they stay where they are from run to run."""
        if self._bound == (first, rows):
            return
        shape = (rows, *self._kv.shape[2:])
        for at, (past, present) in enumerate(zip(self._graph.past, self._graph.present, strict=True)):
            address = self._kv.ctypes.data + at * self._kv.strides[0] + first * self._kv.strides[1]
            self._binding.bind_input(past, "cpu", 0, self._kv.dtype, shape, address)
            self._binding.bind_output(present, "cpu", 0, self._kv.dtype, shape, address)
        self._bound = (first, rows)


def _memory(graph: DecoderGraph, rows: int, max_tokens: int) -> tuple[mmap.mmap, NDArray[Any]]:
    """Return memory that is taken when it is touched, as (tensors, rows, heads, max_tokens, size)."""
    shape = graph.shape
    sizes = (shape.tensors, rows, shape.heads, max_tokens, shape.size)
    try:
        # Shared, so that the limit on private memory counts it not by its extent; the session's budget bounds it.
        memory = mmap.mmap(-1, rows * max_tokens * shape.token_bytes)
    except (OSError, ValueError, OverflowError) as error:
        raise ModelError(f"no room for a cache of {rows} rows of {max_tokens} tokens: {error}") from error
    return memory, np.frombuffer(memory, shape.dtype).reshape(sizes)
