"""Damaged models: bytes turned, numbers at their bounds, fields of a protocol or flat buffer cut, doubled and swapped.

The same model, seed and number give the same mutant.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Final

import msgspec

from tests.fakes.onnx_graph import varint

STRUCTURE_BYTES: Final = 4096
"""Half of all turned bytes lie this near to an end, where both formats keep their structure rather than weights."""
MAX_DEPTH: Final = 7
_NUMBERS: Final = (0, 1, 2, 7, 127, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)
_WORDS: Final = (0, 1, 4, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFC, 0x10000, 0xFFFF)


class Field(msgspec.Struct):
    """One field of a protocol buffer: a number, bytes, or (where its bytes read as one) a message."""

    number: int
    kind: int
    value: int | bytes | list[Field]


def mutant(data: bytes, layout: str, seed: int) -> bytes:
    """Return a damaged copy of a model in the format `onnx` or `tflite`; never the model itself."""
    rng = random.Random(seed)
    ways: list[Callable[[bytes, random.Random], bytes]] = [_turned, _turned, _cut]
    ways += [_refielded] * 3 if layout == "onnx" else [_reworded] * 3
    damaged = data
    while damaged == data:
        damaged = rng.choice(ways)(data, rng)
    return damaged


def _turned(data: bytes, rng: random.Random) -> bytes:
    """Overwrite, turn, insert or take out a few bytes."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 8])):
        at = _place(len(out), rng)
        match rng.randrange(5):
            case 0:
                out[at] = rng.randrange(256)
            case 1:
                out[at] ^= 1 << rng.randrange(8)
            case 2:
                out[at : at + 4] = struct.pack("<I", rng.choice(_WORDS))
            case 3:
                del out[at : at + rng.randrange(1, 16)]
            case _:
                out[at:at] = rng.randbytes(rng.randrange(1, 16))
        out = out or bytearray(b"\0")
    return bytes(out)


def _cut(data: bytes, rng: random.Random) -> bytes:
    """Keep the beginning, or put a piece from one place at another."""
    if rng.random() < 0.5:
        return data[: rng.randrange(len(data))]
    size = rng.choice([4, 16, 64, 256])
    source, target = _place(len(data), rng), _place(len(data), rng)
    return data[:target] + data[source : source + size] + data[target + size :]


def _place(size: int, rng: random.Random) -> int:
    near = min(size, STRUCTURE_BYTES)
    match rng.randrange(4):
        case 0:
            return rng.randrange(near)
        case 1:
            return size - 1 - rng.randrange(near)
        case _:
            return rng.randrange(size)


def _reworded(data: bytes, rng: random.Random) -> bytes:
    """Change whole aligned numbers of a flat buffer: offsets, lengths, shapes, kinds of operators, and their tables."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 3])):
        width = rng.choice([1, 2, 4, 4, 4, 8])
        at = _place(len(out), rng) // width * width
        at = min(at, len(out) - width)
        old = int.from_bytes(out[at : at + width], "little")
        wanted = rng.choice([rng.choice(_NUMBERS), old + rng.choice([-8, -4, -1, 1, 4, 8]), -old])
        out[at : at + width] = (wanted % (1 << 8 * width)).to_bytes(width, "little")
    return bytes(out)


def _refielded(data: bytes, rng: random.Random) -> bytes:
    """Change the tree of a protocol buffer and write it whole again, so that lengths fit what they stand before."""
    tree = parse(data, 0)
    if not tree:
        return _turned(data, rng)
    for _ in range(rng.choice([1, 1, 2, 3])):
        siblings = _somewhere(tree, rng)
        _change(siblings, rng.randrange(len(siblings)), rng)
        if not tree:
            break
    return write(tree)


def _somewhere(tree: list[Field], rng: random.Random) -> list[Field]:
    """Go down from the root by chance."""
    here = tree
    while True:
        inner = [field.value for field in here if isinstance(field.value, list) and field.value]
        if not inner or rng.random() < 0.25:
            return here
        here = rng.choice(inner)


def _change(siblings: list[Field], at: int, rng: random.Random) -> None:
    field = siblings[at]
    match rng.randrange(6):
        case 0:
            del siblings[at]
        case 1:
            siblings.insert(rng.randrange(len(siblings) + 1), Field(field.number, field.kind, field.value))
        case 2:
            other = rng.randrange(len(siblings))
            siblings[at], siblings[other] = siblings[other], siblings[at]
        case 3:
            other = rng.randrange(len(siblings))
            siblings[at] = Field(field.number, siblings[other].kind, siblings[other].value)
        case 4:
            siblings[at] = Field(rng.randrange(1, 32), field.kind, field.value)
        case _:
            siblings[at] = Field(field.number, field.kind, _other_value(field, rng))


def _other_value(field: Field, rng: random.Random) -> int | bytes | list[Field]:
    if isinstance(field.value, int):
        return rng.choice([*_NUMBERS, field.value + 1, abs(field.value - 1)]) % (1 << 64)
    if isinstance(field.value, bytes) and field.value:
        return rng.choice([b"", _turned(field.value, rng), field.value * 2, field.value[: len(field.value) // 2]])
    return rng.choice([b"", rng.randbytes(8), varint(rng.choice(_NUMBERS))])


def parse(data: bytes, depth: int) -> list[Field]:
    """Return the fields of a protocol buffer; none where the bytes are no whole one."""
    fields: list[Field] = []
    at = 0
    while at < len(data):
        found = _read(data, at, depth)
        if found is None:
            return []
        field, at = found
        fields.append(field)
    return fields


def _read(data: bytes, at: int, depth: int) -> tuple[Field, int] | None:
    key = _number(data, at)
    if key is None or key[0] >> 3 == 0:
        return None
    number, kind, at = key[0] >> 3, key[0] & 7, key[1]
    if kind == 0:
        value = _number(data, at)
        return None if value is None else (Field(number, 0, value[0]), value[1])
    if kind in {1, 5}:
        size = 8 if kind == 1 else 4
        return (Field(number, kind, data[at : at + size]), at + size) if at + size <= len(data) else None
    length = _number(data, at) if kind == 2 else None
    if length is None or length[1] + length[0] > len(data):
        return None
    inner = data[length[1] : length[1] + length[0]]
    message = parse(inner, depth + 1) if depth < MAX_DEPTH and len(inner) < 1 << 16 else []
    return Field(number, 2, message or inner), length[1] + length[0]


def _number(data: bytes, at: int) -> tuple[int, int] | None:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            return None
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
    return None


def write(fields: list[Field]) -> bytes:
    """Return the bytes of a tree."""
    out = bytearray()
    for field in fields:
        value = write(field.value) if isinstance(field.value, list) else field.value
        kind = 0 if isinstance(value, int) else (2 if field.kind == 0 else field.kind)
        out += varint(field.number << 3 | kind)
        if isinstance(value, int):
            out += varint(value)
        elif kind == 2:
            out += varint(len(value)) + value
        else:
            out += value.ljust(8 if kind == 1 else 4, b"\0")[: 8 if kind == 1 else 4]
    return bytes(out)
