"""Memory that one process fills and another reads."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.shelf import Reader, Shelf

SIZE = 1 << 20


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    made = Shelf(SIZE)
    yield made
    made.close()


def reader_of(shelf: Shelf) -> Reader:
    return Reader(os.dup(shelf.reader))


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=400), st.integers(1, 900), st.booleans()), max_size=30))
def test_what_lies_there_is_read_as_it_was_laid_down_until_it_is_freed(steps: list[tuple[bytes, int, bool]]) -> None:
    shelf = Shelf(SIZE)
    reader = reader_of(shelf)
    lying: dict[int, bytes] = {}
    for piece, times, free in steps:
        data = piece * times
        at = shelf.put(data)
        if at is not None:
            lying[at] = data
        if free and lying:
            shelf.free(lying.popitem()[0])
        for where, kept in lying.items():
            assert reader.read(where, len(kept)) == kept
    assert shelf.empty == (not lying)
    shelf.close()


def test_a_full_shelf_takes_nothing_and_a_freed_place_is_taken_again(shelf: Shelf) -> None:
    half = bytes(SIZE // 2)
    first, second = shelf.put(half), shelf.put(half)
    assert (first, second, shelf.put(b"x")) == (0, SIZE // 2, None)
    shelf.free(0)
    shelf.free(0)
    assert shelf.put(half) == 0


def test_memory_is_given_back_once_nothing_lies_in_it(shelf: Shelf) -> None:
    def held() -> int:
        return int(Path(f"/proc/self/fd/{shelf.reader}").stat().st_blocks)

    at = shelf.put(os.urandom(SIZE // 2))
    assert at == 0
    full = held()
    shelf.sweep()
    assert held() == full
    shelf.free(at)
    shelf.sweep()
    assert held() == 0
    assert full >= SIZE // 2 // 512


def test_e19_a_reader_can_neither_write_nor_change_the_size(shelf: Shelf) -> None:
    descriptor = os.dup(shelf.reader)
    with pytest.raises(PermissionError):
        mmap.mmap(descriptor, SIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    for change in (lambda: os.ftruncate(descriptor, 0), lambda: os.write(descriptor, b"x")):
        with pytest.raises(OSError, match=r"Invalid argument|Bad file descriptor|not permitted"):
            change()
    writable = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)  # if it could open one, the seals would hold still
    for size in (0, 2 * SIZE):
        with pytest.raises(PermissionError):
            os.ftruncate(writable, size)
    os.close(writable)
    os.close(descriptor)


@pytest.mark.parametrize(("at", "length"), [(-1, 1), (0, -1), (0, SIZE + 1), (SIZE, 1)])
def test_nothing_is_read_beyond_the_end(shelf: Shelf, at: int, length: int) -> None:
    with pytest.raises(ValueError, match="beyond"):
        reader_of(shelf).read(at, length)
