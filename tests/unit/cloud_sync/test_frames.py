"""Stored bytes become a frame of the signed length, or an error of ours (FAULTS A15)."""

from __future__ import annotations

import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_sync.errors import TrustError
from cloud_sync.frames import decode_frame, encode_frame, sha256_of
from cloud_sync.packs import PackWriter

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


@given(st.binary(max_size=5000))
def test_a_frame_survives_its_codec(frame: bytes) -> None:
    codec, stored, _ = encode_frame(frame)
    assert decode_frame(codec, stored, len(frame)) == frame
    assert len(stored) <= len(frame)


def test_what_does_not_shrink_is_stored_raw() -> None:
    assert encode_frame(b"x") == ("raw", b"x", 0)
    assert encode_frame(b"x" * 1000)[0] == "zstd"


def bomb() -> bytes:
    return zstd.compress(bytes(64 << 20))


def wide_window() -> bytes:
    options: dict[int, int] = {
        zstd.CompressionParameter.window_log: 27,
        zstd.CompressionParameter.content_size_flag: 0,
    }
    compressor = zstd.ZstdCompressor(options=options)
    return compressor.compress(bytes(1000)) + compressor.flush()


def with_dictionary() -> bytes:
    words = zstd.ZstdDict(b"the words of a dictionary " * 20, is_raw=True)
    return zstd.compress(b"the words of a dictionary" * 40, zstd_dict=words.as_prefix)


WHOLE = zstd.compress(b"y" * 1000)
BAD = {
    "a bomb": bomb(),
    "a wide window": wide_window(),
    "cut": WHOLE[:-4],
    "two in one": WHOLE + WHOLE,
    "a tail": WHOLE + b"\0",
    "too short": zstd.compress(b"y" * 999),
    "too long": zstd.compress(b"y" * 1001),
    "empty": b"",
    "garbage": b"\x28\xb5\x2f\xfd" + b"\xff" * 40,
    "not zstd": b"plain text",
    "a dictionary": with_dictionary(),
    "a skippable frame": b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + WHOLE,
}


@pytest.mark.parametrize("stored", BAD.values(), ids=BAD.keys())
def test_a15_a_frame_that_is_not_what_it_says_is_refused_in_little_memory(stored: bytes) -> None:
    tracemalloc.start()
    with pytest.raises(TrustError) as caught:
        decode_frame("zstd", stored, 1000)
    assert caught.value.code == "arbitrary_software"
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@given(st.binary(max_size=200), st.integers(0, 300))
def test_a15_any_bytes_give_the_signed_length_or_an_error(stored: bytes, length: int) -> None:
    try:
        frame = decode_frame("zstd", stored, length)
    except TrustError:
        return
    assert len(frame) == length


def test_a_raw_frame_has_the_signed_length() -> None:
    with pytest.raises(TrustError):
        decode_frame("raw", b"abc", 4)


def test_an_unknown_codec_is_refused_by_name() -> None:
    with pytest.raises(TrustError, match="lzma") as caught:
        decode_frame("lzma", b"abc", 3)
    assert caught.value.code == "unknown_codec"


def test_a_pack_stores_a_frame_once_and_names_where(tmp_path: Path) -> None:
    writer = PackWriter(tmp_path / "pack")
    frames = [b"a" * 500, b"b", b"a" * 500]
    names = [sha256_of(frame) for frame in frames]
    for name, frame in zip(names, frames, strict=True):
        writer.add(name, encode_frame(frame))
    _, entries = writer.close()
    data = writer.path.read_bytes()
    assert writer.stored_bytes == len(data)
    assert len(entries) == 2
    for name, frame in zip(names, frames, strict=True):
        entry = entries[name]
        stored = data[entry.offset : entry.offset + entry.stored]
        assert decode_frame(entry.codec, stored, len(frame)) == frame
