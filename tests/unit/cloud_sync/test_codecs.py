"""Every codec of PROTOCOL 6 gives the frame back, as the page says it and as the published vectors hold it."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_sync.codecs import DELTAS, EXPONENT_BITS, PLANES, Delta, apply_difference, difference, join_planes
from cloud_sync.errors import TrustError
from cloud_sync.frames import CODECS, Numbers, decode_frame, encode_delta, encode_frame

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

VECTORS = Path(__file__).parents[3] / "docs" / "vectors" / "codecs.json"
LETTERS = {1: "B", 2: "H", 4: "I", 8: "Q"}
CASES = [(name, bits) for name, d in DELTAS.items() for bits in (EXPONENT_BITS[d.width] if d.kind == "s" else (0,))]


def numbers_of(data: bytes, width: int) -> list[int]:
    return [number for (number,) in struct.iter_unpack(f"<{LETTERS[width]}", data)]


def by_the_page(planes: bytes, base: bytes, delta: Delta, exponent_bits: int) -> bytes:
    """PROTOCOL 6 word by word, one number at a time."""
    width = delta.width
    count = len(base) // width
    steps = [sum(planes[plane * count + at] << (8 * plane) for plane in range(width)) for at in range(count)]
    before = numbers_of(base, width)
    top, whole = 1 << (8 * width - 1), 1 << (8 * width)
    if delta.kind == "s":
        order = sorted(
            range(count), key=lambda at: before[at] >> (8 * width - 1 - exponent_bits) & (2**exponent_bits - 1)
        )
        steps = [step for _, step in sorted(zip(order, steps, strict=True))]
    result = []
    for step, number in zip(steps, before, strict=True):
        change = (step >> 1) ^ -(step & 1)
        if delta.kind == "i":
            result.append((number + change) % whole)
            continue
        place = number ^ (whole - 1) if number & top else number | top
        place = (place + change) % whole
        result.append(place ^ top if place & top else place ^ (whole - 1))
    return struct.pack(f"<{count}{LETTERS[width]}", *result)


@pytest.mark.parametrize(("codec", "exponent_bits"), CASES)
@given(data=st.data())
def test_a_difference_gives_the_frame_back_as_the_page_says(
    codec: str, exponent_bits: int, data: st.DataObject
) -> None:
    delta = DELTAS[codec]
    size = delta.width * data.draw(st.integers(0, 12))
    frame, base = (data.draw(st.binary(min_size=size, max_size=size)) for _ in range(2))
    planes = difference(frame, base, delta, exponent_bits)
    assert apply_difference(planes, base, delta, exponent_bits) == frame
    assert by_the_page(planes, base, delta, exponent_bits) == frame


@given(st.sampled_from(sorted(PLANES.items())), st.binary(max_size=64))
def test_plane_k_holds_byte_k_of_each_number(codec: tuple[str, int], data: bytes) -> None:
    width = codec[1]
    frame = data[: len(data) // width * width]
    planes = b"".join(frame[plane::width] for plane in range(width))
    assert join_planes(planes, width) == frame
    assert decode_frame(codec[0], zstd.compress(planes), len(frame)) == frame


@pytest.mark.parametrize("vector", json.loads(VECTORS.read_bytes()), ids=lambda vector: vector["name"])
def test_the_published_vectors_decode(vector: dict[str, str | int]) -> None:
    stored, base, frame = (bytes.fromhex(str(vector[key])) for key in ("stored", "base", "frame"))
    assert decode_frame(str(vector["codec"]), stored, len(frame), base, int(vector["exponent_bits"])) == frame


def test_the_published_vectors_hold_every_codec() -> None:
    assert {vector["codec"] for vector in json.loads(VECTORS.read_bytes())} == CODECS


@pytest.mark.parametrize("numbers", [None, *(Numbers(width, 0) for width in LETTERS), Numbers(2, 5), Numbers(4, 8)])
@given(data=st.data())
def test_whatever_encoding_is_smallest_it_decodes(numbers: Numbers | None, data: st.DataObject) -> None:
    frame, base = data.draw(st.binary(min_size=1, max_size=200)), data.draw(st.binary(min_size=1, max_size=200))
    base = data.draw(st.sampled_from([base, frame, bytes(len(frame))]))
    alone, change = encode_frame(frame, numbers), encode_delta(frame, base, numbers)
    assert decode_frame(alone.codec, alone.stored, len(frame)) == frame
    assert decode_frame(change.codec, change.stored, len(frame), base, change.exponent_bits) == frame


def test_small_steps_of_floats_become_few_bytes() -> None:
    base = struct.pack("<5000f", *(0.001 * at - 2.5 for at in range(5000)))
    frame = bytes(bytearray(base[:-4]) + struct.pack("<f", 2.4991))
    change = encode_delta(frame, base, Numbers(4, 8))
    assert len(change.stored) < 100


@pytest.mark.parametrize(
    ("codec", "length", "base", "exponent_bits"),
    [
        ("delta-f4", 8, b"\0" * 4, 0),
        ("delta-f4", 6, b"\0" * 6, 0),
        ("delta-s2", 8, b"\0" * 8, 0),
        ("delta-s2", 8, b"\0" * 8, 11),
        ("delta-s4", 8, b"\0" * 8, 5),
        ("planes-4", 6, b"", 0),
        ("delta-i1", 8, b"", 0),
    ],
)
def test_a16_a_base_or_shape_that_does_not_fit_is_refused(
    codec: str, length: int, base: bytes, exponent_bits: int
) -> None:
    with pytest.raises(TrustError) as caught:
        decode_frame(codec, zstd.compress(bytes(length)), length, base, exponent_bits)
    assert caught.value.code == "arbitrary_software"


def test_a15_a_bomb_behind_any_codec_stops_at_the_signed_length() -> None:
    bomb = zstd.compress(bytes(64 << 20))
    for codec in sorted(CODECS - {"raw"}):
        with pytest.raises(TrustError):
            decode_frame(codec, bomb, 1024, bytes(1024), 8 if codec.startswith("delta-s") else 0)
