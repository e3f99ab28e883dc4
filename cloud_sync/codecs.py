"""How the numbers of a frame become few bytes and come back: PROTOCOL 6's planes and deltas. Pure: no I/O, no clock.

Numbers are little-endian, `width` bytes each. A delta is taken between numbers at the same place of the frame and
of its base, written zigzag (small differences of either sign become small numbers) and in byte planes, so that the
bytes which are nearly always zero stand together.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[Any]
_TYPES: Final[dict[int, np.dtype[Any]]] = {
    1: np.dtype("u1"),
    2: np.dtype("<u2"),
    4: np.dtype("<u4"),
    8: np.dtype("<u8"),
}
PLANES: Final = {f"planes-{width}": width for width in (2, 4, 8)}


class Delta(NamedTuple):
    """A delta codec: `kind` is i (integers), f (floats in order of size) or s (f, sorted by the base's exponents)."""

    kind: str
    width: int


DELTAS: Final = {
    f"delta-{kind}{width}": Delta(kind, width)
    for kind, widths in (("i", (1, 2, 4, 8)), ("f", (2, 4, 8)), ("s", (2, 4)))
    for width in widths
}
EXPONENT_BITS: Final = {2: (5, 8), 4: (8,)}
"""The exponent's width in floats of 2 bytes (float16, bfloat16) and of 4."""


def split_planes(frame: bytes, width: int) -> bytes:
    """Return the frame's bytes as `width` planes, the least significant first; its length is a multiple of it."""
    return np.frombuffer(frame, dtype=np.uint8).reshape(-1, width).T.tobytes()


def join_planes(planes: bytes, width: int) -> bytes:
    """Undo `split_planes`."""
    return np.frombuffer(planes, dtype=np.uint8).reshape(width, -1).T.tobytes()


def difference(frame: bytes, base: bytes, delta: Delta, exponent_bits: int) -> bytes:
    """Return the planes that `apply_difference` turns back into the frame; both are of the same length."""
    numbers, before = _numbers(frame, delta.width), _numbers(base, delta.width)
    if delta.kind != "i":
        numbers, before = _ordered(numbers), _ordered(before)
    steps = _zigzag(numbers - before)
    if delta.kind == "s":
        steps = steps[_by_exponent(_numbers(base, delta.width), exponent_bits)]
    return split_planes(steps.tobytes(), delta.width)


def apply_difference(planes: bytes, base: bytes, delta: Delta, exponent_bits: int) -> bytes:
    """Return the frame that `planes` makes of its base; both are of the same length."""
    steps = _numbers(join_planes(planes, delta.width), delta.width)
    before = _numbers(base, delta.width)
    if delta.kind == "s":
        sorted_steps, steps = steps, np.empty_like(steps)
        steps[_by_exponent(before, exponent_bits)] = sorted_steps
    if delta.kind == "i":
        return (before + _unzigzag(steps)).tobytes()
    return _unordered(_ordered(before) + _unzigzag(steps)).tobytes()


def _numbers(data: bytes, width: int) -> Numbers:
    return np.frombuffer(data, dtype=_TYPES[width])


def _top(numbers: Numbers) -> Numbers:
    return np.asarray(1 << (numbers.dtype.itemsize * 8 - 1), dtype=numbers.dtype)


def _ordered(numbers: Numbers) -> Numbers:
    """Map the bits of floats to integers in the order of the floats' values."""
    top = _top(numbers)
    return np.asarray(np.where(numbers & top, ~numbers, numbers | top))


def _unordered(ordered: Numbers) -> Numbers:
    top = _top(ordered)
    return np.asarray(np.where(ordered & top, ordered ^ top, ~ordered))


def _zigzag(steps: Numbers) -> Numbers:
    signs = np.where(steps & _top(steps), ~np.zeros_like(steps), np.zeros_like(steps))
    return np.asarray((steps << steps.dtype.type(1)) ^ signs)


def _unzigzag(steps: Numbers) -> Numbers:
    one = steps.dtype.type(1)
    return np.asarray((steps >> one) ^ (~(steps & one) + one))


def _by_exponent(base: Numbers, exponent_bits: int) -> NDArray[np.intp]:
    """Return the stable order of the base's numbers by their exponents, ascending."""
    shift = base.dtype.type(base.dtype.itemsize * 8 - 1 - exponent_bits)
    exponents = ((base >> shift) & base.dtype.type((1 << exponent_bits) - 1)).astype(np.uint8)
    # numpy sorts bytes by counting them, in one pass.
    return np.argsort(exponents, kind="stable")
