"""WAV files into samples, and the files that mean harm."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import RequestError
from models.sounds import MAX_SAMPLES, Sound, load_wav, read_wav, resample
from tests.reference.waves import samples, wav

RATE = 16_000


def riff(form: bytes, body: bytes, size: int | None = None) -> bytes:
    """Return a WAV file with this format and these bytes, whose size it may lie about."""
    claimed = len(body) if size is None else size
    parts = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", claimed) + body
    return b"RIFF" + struct.pack("<I", len(parts)) + parts


def form(kind: int = 1, channels: int = 1, rate: int = RATE, bits: int = 16, align: int | None = None) -> bytes:
    wide = channels * bits // 8 if align is None else align
    return struct.pack("<HHIIHH", kind, channels, rate, rate * wide & 0xFFFFFFFF, wide, bits)


def refusal(data: bytes) -> RequestError:
    with pytest.raises(RequestError) as caught:
        load_wav(data, "inputs[2]", RATE)
    return caught.value


@pytest.mark.parametrize(("kind", "step"), [("u8", 2**-7), ("s16", 2**-15), ("s24", 2**-22), ("f32", 1e-7)])
def test_every_kind_of_sample_is_read_as_what_it_stands_for(kind: str, step: float) -> None:
    values = samples(500, 1, RATE, 3)
    sound = read_wav(wav(values, kind, 8000), "body")
    assert sound.rate == 8000
    assert np.abs(sound.samples - values[:, 0]).max() <= step


@pytest.mark.parametrize("kind", ["s32", "f64"])
def test_the_widest_samples_keep_single_precision(kind: str) -> None:
    values = samples(500, 1, RATE, 3)
    assert np.abs(read_wav(wav(values, kind, RATE), "body").samples - values[:, 0]).max() < 1e-6


def test_channels_are_averaged() -> None:
    values = samples(100, 3, RATE, 5)
    assert read_wav(wav(values, "f32", RATE), "b").samples == pytest.approx(values.mean(axis=1), abs=1e-6)


def test_other_chunks_and_the_extensible_form_are_read() -> None:
    extensible = form(0xFFFE) + struct.pack("<HHIH14s", 22, 16, 4, 1, bytes(14))
    body = struct.pack("<4h", 0, 16384, -16384, 0)
    data = bytearray(riff(extensible, body))
    data[12:12] = b"LIST" + struct.pack("<I", 3) + b"abc\0"
    assert read_wav(bytes(data), "body").samples.tolist() == [0.0, 0.5, -0.5, 0.0]


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000])
def test_a_stream_whose_end_nobody_knew_is_read_to_its_end(size: int) -> None:
    assert len(read_wav(riff(form(), bytes(11), size), "body").samples) == 5


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is not a WAV file"),
        (b"RIFF\0\0\0\0WAVE", "has no format"),
        (riff(form(), b"")[:36], "has no samples"),
        (riff(form(), b""), "has no samples"),
        (riff(form(), bytes(10), 1000), "claims 1000 bytes of samples and holds 10"),
        (riff(form(), bytes(5)), "5 bytes are no whole number of 2"),
        (riff(form(rate=0), bytes(4)), "a rate of 0 Hz"),
        (riff(form(rate=4_000_000), bytes(4)), "a rate of 4000000 Hz"),
        (riff(form(channels=0), bytes(4)), "0 channels; expected 1 to 64"),
        (riff(form(channels=1000), bytes(4000)), "1000 channels; expected 1 to 64"),
        (riff(form(bits=12, align=2), bytes(4)), "samples of 12 bits; expected 8, 16, 24, 32"),
        (riff(form(kind=3, bits=16), bytes(4)), "samples of 16 bits; expected 32, 64"),
        (riff(form(kind=85), bytes(4)), "of kind 85"),
        (riff(form(align=7), bytes(14)), "says 7 bytes for 1 samples of 16 bits"),
        (riff(form()[:10], bytes(4)), "format is cut short"),
        (riff(form(kind=3, bits=32), struct.pack("<2f", 0.0, float("nan"))), "sample 1 is not a number"),
        (riff(form(kind=3, bits=64), struct.pack("<2d", 1e300, 0.0)), "sample 0 is not a number"),
    ],
)
def test_a_header_that_lies_is_refused_by_what_is_wrong(data: bytes, words: str) -> None:
    error = refusal(data)
    assert (error.code, error.message.startswith("inputs[2]: ")) == ("bad_request", True)
    assert words in error.message


def test_samples_before_their_format_are_refused() -> None:
    data = b"RIFF\0\0\0\0WAVEdata" + struct.pack("<I", 4) + bytes(4)
    assert "before their format" in refusal(data).message


def test_a_sound_that_would_grow_beyond_the_bound_is_refused_before_it_grows() -> None:
    sound = Sound(np.zeros(MAX_SAMPLES // 10, np.float32), 1000)
    with pytest.raises(RequestError) as caught:
        resample(sound, RATE, "body")
    assert caught.value.code == "too_large"


@pytest.mark.parametrize("rate", [8000, 11_025, 22_050, 44_100, 48_000, 44_101])
def test_a_tone_is_the_same_tone_at_another_rate(rate: int) -> None:
    moments = np.arange(rate // 8) / rate
    tone = np.sin(2 * np.pi * 440 * moments).astype(np.float32)
    found = resample(Sound(tone, rate), RATE, "body")
    wanted = np.sin(2 * np.pi * 440 * np.arange(len(found)) / RATE)
    assert len(found) == -(-len(tone) * RATE // rate)
    assert np.abs(found - wanted)[200:-200].max() < 5e-3


def test_what_the_lower_rate_cannot_hold_is_taken_away() -> None:
    tone = np.sin(2 * np.pi * 11_000 * np.arange(24_000) / 48_000).astype(np.float32)
    assert np.abs(resample(Sound(tone, 48_000), RATE, "body"))[100:-100].max() < 0.01


@settings(max_examples=40)
@given(st.data())
def test_any_change_to_a_sound_is_read_or_refused(data: st.DataObject) -> None:
    raw = bytearray(wav(samples(60, 2, 8000, 1), data.draw(st.sampled_from(["s16", "f32", "s24"])), 8000))
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        load_wav(bytes(raw), "body", RATE)
    except RequestError as error:
        assert error.code in {"bad_request", "too_large"}  # noqa: PT017 - either outcome is right
