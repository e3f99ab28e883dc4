"""What was computed for the beginnings of texts, kept for the next text that begins alike. No I/O, no clock.

Texts are cut into blocks of `BLOCK_TOKENS`; a block is known by its tokens and the block before it, so that what many
texts share lies here once. The blocks that were not used for longest go first, the end of a text before its beginning.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

BLOCK_TOKENS: Final = 16

Values = NDArray[Any]
"""The cache's content for some tokens; its last axis but one counts them."""

_Key = tuple[int, bytes]


class _Block(msgspec.Struct):
    ident: int
    values: Values


class PrefixStore:
    """Blocks of computed beginnings, of at most `max_bytes` together."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._blocks: OrderedDict[_Key, _Block] = OrderedDict()
        self._next = 1
        self.bytes = 0

    def find(self, tokens: Sequence[int]) -> list[Values]:
        """Return the blocks of the longest beginning that is known, never the whole text: its end gives the logits."""
        found = self._known(tokens[: max(0, len(tokens) - 1)])
        for key in reversed(found):  # a block is always used later than those after it
            self._blocks.move_to_end(key)
        return [self._blocks[key].values for key in found]

    def put(self, tokens: Sequence[int], read: Callable[[int, int], Values]) -> None:
        """Keep a text's whole blocks; `read(start, stop)` copies out what is not here yet."""
        found = self._known(tokens)
        parent = self._blocks[found[-1]].ident if found else 0
        added: list[_Key] = []
        for start in range(len(found) * BLOCK_TOKENS, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            stop = start + BLOCK_TOKENS
            key = (parent, _packed(tokens[start:stop]))
            values = read(start, stop)
            if values.nbytes * (len(found) + len(added) + 1) > self._max_bytes:
                break
            self._blocks[key] = _Block(self._next, values)
            self.bytes += values.nbytes
            parent, self._next = self._next, self._next + 1
            added.append(key)
        for key in reversed(found + added):
            self._blocks.move_to_end(key)
        self._shrink()

    def limit(self, max_bytes: int) -> None:
        """Hold no more than `max_bytes` from now on."""
        self._max_bytes = max_bytes
        self._shrink()

    def _shrink(self) -> None:
        """Let the oldest blocks go."""
        while self.bytes > self._max_bytes:
            _, block = self._blocks.popitem(last=False)
            self.bytes -= block.values.nbytes

    def _known(self, tokens: Sequence[int]) -> list[_Key]:
        """Return the keys of the blocks that the text begins with."""
        keys: list[_Key] = []
        parent = 0
        for start in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            key = (parent, _packed(tokens[start : start + BLOCK_TOKENS]))
            block = self._blocks.get(key)
            if block is None:
                break
            keys.append(key)
            parent = block.ident
        return keys


def _packed(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, dtype=np.int64).tobytes()
