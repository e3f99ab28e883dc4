"""Beginnings that are kept: found by their tokens, held once, gone by age, never over their bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.generation.prefixes import BLOCK_TOKENS, PrefixStore

BLOCK_BYTES = BLOCK_TOKENS * 4


def reader(tokens: list[int]) -> Any:
    def read(start: int, stop: int) -> NDArray[Any]:
        return np.array(tokens[start:stop], dtype=np.float32).reshape(1, 1, -1, 1)

    return read


def put(store: PrefixStore, tokens: list[int]) -> None:
    store.put(tokens, reader(tokens))


def found(store: PrefixStore, tokens: list[int]) -> list[int]:
    return [int(value) for values in store.find(tokens) for value in values.ravel()]


def text(*blocks: int, rest: int = 0) -> list[int]:
    return [block for block in blocks for _ in range(BLOCK_TOKENS)] + [99] * rest


def test_the_longest_known_beginning_is_found() -> None:
    store = PrefixStore(1 << 20)
    put(store, text(1, 2, 3))
    assert found(store, text(1, 2, 4, rest=5)) == text(1, 2)
    assert found(store, text(2, 3)) == []


def test_the_end_of_a_text_is_left_to_compute() -> None:
    store = PrefixStore(1 << 20)
    put(store, text(1, 2))
    assert found(store, text(1, 2)) == text(1)
    assert found(store, text(1, 2, rest=1)) == text(1, 2)


def test_what_texts_share_is_held_once() -> None:
    store = PrefixStore(1 << 20)
    put(store, text(1, 2, 3))
    put(store, text(1, 2, 4, rest=3))
    assert store.bytes == 4 * BLOCK_BYTES


def test_the_end_of_the_oldest_text_goes_first() -> None:
    store = PrefixStore(4 * BLOCK_BYTES)
    put(store, text(1, 2))
    put(store, text(5, 6))
    put(store, text(7))
    assert found(store, text(1, 2, rest=1)) == text(1)
    assert found(store, text(5, 6, rest=1)) == text(5, 6)


def test_a_text_that_is_used_again_stays() -> None:
    store = PrefixStore(4 * BLOCK_BYTES)
    put(store, text(1, 2))
    put(store, text(5, 6))
    found(store, text(1, 2, rest=1))
    put(store, text(7))
    assert found(store, text(1, 2, rest=1)) == text(1, 2)


def test_a_text_longer_than_the_room_is_kept_as_far_as_it_goes() -> None:
    store = PrefixStore(2 * BLOCK_BYTES)
    put(store, text(1, 2, 3, 4))
    assert found(store, text(1, 2, 3, 4)) == text(1, 2)


def test_less_room_takes_effect_at_once() -> None:
    store = PrefixStore(1 << 20)
    put(store, text(1, 2, 3))
    store.limit(BLOCK_BYTES)
    assert store.bytes == BLOCK_BYTES
    store.limit(0)
    assert found(store, text(1, 2, 3)) == []


@given(st.lists(st.tuples(st.lists(st.integers(1, 3), max_size=5), st.integers(0, 9)), max_size=30))
def test_whatever_is_found_is_the_texts_own_beginning_within_the_bytes(texts: list[tuple[list[int], int]]) -> None:
    store = PrefixStore(5 * BLOCK_BYTES)
    for blocks, room in texts:
        tokens = text(*blocks, rest=1)
        known = found(store, tokens)
        assert known == tokens[: len(known)]
        put(store, tokens)
        assert store.bytes <= 5 * BLOCK_BYTES
        if room < 4:
            store.limit(room * BLOCK_BYTES)
            assert store.bytes <= room * BLOCK_BYTES
            store.limit(5 * BLOCK_BYTES)
