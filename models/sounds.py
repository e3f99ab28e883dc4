"""WAV files into samples, and samples to another rate. Pure: no I/O, no clock.

The container is RIFF (IBM and Microsoft, 1991) with WAVEFORMATEX; resampling is a windowed sinc (J. O. Smith, "Digital
Audio Resampling") with the width, roll-off and window that torchaudio's `resample` has as its own, since that is what
the Hugging Face pipelines call.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.errors import RequestError

MAX_SAMPLES: Final = 16_000 * 60 * 30
"""Of one channel, before and after resampling: half an hour at 16 kHz, 115 MB as float32."""

MAX_CHANNELS: Final = 64
MIN_RATE: Final = 1_000
MAX_RATE: Final = 384_000
STREAMED: Final = 0x7FFF_0000
"""Sizes from here on stand in headers that were written before the end was known."""

_PCM: Final = 1
_FLOAT: Final = 3
_EXTENSIBLE: Final = 0xFFFE
_CROSSINGS: Final = 6
_ROLL_OFF: Final = 0.99
_BLOCK: Final = 1 << 16


class Sound(msgspec.Struct, frozen=True):
    """One channel of float32 samples, about -1 to 1, `rate` of them a second."""

    samples: NDArray[np.float32]
    rate: int


class _Format(msgspec.Struct, frozen=True):
    kind: int
    channels: int
    rate: int
    align: int
    bits: int


def load_wav(data: bytes, field: str, rate: int) -> NDArray[np.float32]:
    """Return a WAV file's samples at `rate` Hz, its channels averaged; raises RequestError."""
    sound = read_wav(data, field)
    return resample(sound, rate, field)


def read_wav(data: bytes, field: str) -> Sound:
    """Return a WAV file's samples as they are, its channels averaged; raises RequestError."""
    found, body = _format_and_body(data, field)
    _check_format(found, field)
    if len(body) // found.align > MAX_SAMPLES:
        raise RequestError("too_large", f"{field}: {len(body) // found.align} samples are over {MAX_SAMPLES}")
    if not body:
        raise RequestError("bad_request", f"{field}: the sound has no samples")
    samples = _numbers(body, found).reshape(-1, found.channels)
    mono = samples[:, 0] if found.channels == 1 else samples.mean(axis=1)
    mono = np.ascontiguousarray(mono, np.float32)
    check_samples(mono, field)
    return Sound(mono, found.rate)


def check_samples(samples: NDArray[np.float32], field: str) -> None:
    """Raise RequestError for samples that are no numbers."""
    if not np.isfinite(samples).all():
        at = int(np.flatnonzero(~np.isfinite(samples))[0])
        raise RequestError("bad_request", f"{field}: sample {at} is not a number")


def _format_and_body(data: bytes, field: str) -> tuple[_Format, memoryview]:
    """Find the format and the samples; a size beyond the file is refused, unless it says that nobody knew it."""
    if len(data) < 12 or data[:4] not in {b"RIFF", b"RF64"} or data[8:12] != b"WAVE":
        raise RequestError("bad_request", f"{field}: is not a WAV file")
    found: _Format | None = None
    for kind, size, body in _chunks(data):
        if kind == b"fmt ":
            found = _parse_format(body, field)
        elif kind == b"data" and found is None:
            raise RequestError("bad_request", f"{field}: the WAV file has samples before their format")
        elif kind == b"data" and found is not None:
            return found, _body(body, size, found, field)
    missing = "format" if found is None else "samples"
    raise RequestError("bad_request", f"{field}: the WAV file has no {missing}; it may be cut short")


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, memoryview]]:
    """Give (name, size as it is claimed, bytes that are there) of each chunk."""
    view, at = memoryview(data), 12
    while at + 8 <= len(data):
        (size,) = struct.unpack_from("<I", data, at + 4)
        yield data[at : at + 4], size, view[at + 8 : at + 8 + size]
        at += 8 + size + size % 2


def _parse_format(body: memoryview, field: str) -> _Format:
    if len(body) < 16:
        raise RequestError("bad_request", f"{field}: the WAV file's format is cut short")
    kind, channels, rate, _, align, bits = struct.unpack_from("<HHIIHH", body)
    if kind == _EXTENSIBLE and len(body) >= 26:
        (kind,) = struct.unpack_from("<H", body, 24)
    return _Format(kind, channels, rate, align, bits)


def _check_format(found: _Format, field: str) -> None:
    depths = {_PCM: (8, 16, 24, 32), _FLOAT: (32, 64)}.get(found.kind)
    if depths is None:
        message = f"{field}: the WAV file's samples are of kind {found.kind}; PCM (1) and float (3) are read here"
        raise RequestError("bad_request", message)
    if found.bits not in depths:
        expected = ", ".join(map(str, depths))
        raise RequestError("bad_request", f"{field}: samples of {found.bits} bits; expected {expected}")
    if not 1 <= found.channels <= MAX_CHANNELS:
        raise RequestError("bad_request", f"{field}: {found.channels} channels; expected 1 to {MAX_CHANNELS}")
    if not MIN_RATE <= found.rate <= MAX_RATE:
        raise RequestError("bad_request", f"{field}: a rate of {found.rate} Hz; expected {MIN_RATE} to {MAX_RATE}")
    if found.align != found.channels * found.bits // 8:
        message = f"{field}: the WAV file says {found.align} bytes for {found.channels} samples of {found.bits} bits"
        raise RequestError("bad_request", message)


def _body(body: memoryview, size: int, found: _Format, field: str) -> memoryview:
    if size > len(body) and size < STREAMED:
        message = f"{field}: the WAV file claims {size} bytes of samples and holds {len(body)}; it is cut short"
        raise RequestError("bad_request", message)
    align = max(1, found.align)
    if size <= len(body) and size % align:
        raise RequestError("bad_request", f"{field}: {size} bytes are no whole number of {align} for each moment")
    # Of a stream that somebody ended, what is less than one moment is no sound yet.
    return body[: len(body) // align * align]


def _numbers(body: memoryview, found: _Format) -> NDArray[np.float32]:
    """Return the samples as float32, whole numbers as parts of their range."""
    if found.kind == _FLOAT:
        with np.errstate(over="ignore", invalid="ignore"):
            return np.frombuffer(body, f"<f{found.bits // 8}").astype(np.float32)
    if found.bits == 8:
        return (np.frombuffer(body, np.uint8).astype(np.float32) - np.float32(128)) / np.float32(128)
    if found.bits == 24:
        wide = np.zeros((len(body) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(body, np.uint8).reshape(-1, 3)
        return _scaled(wide.view("<i4").ravel(), 32)
    return _scaled(np.frombuffer(body, f"<i{found.bits // 8}"), found.bits)


def _scaled(values: NDArray[Any], bits: int) -> NDArray[np.float32]:
    return values.astype(np.float32) * np.float32(0.5 ** (bits - 1))


def resample(sound: Sound, rate: int, field: str) -> NDArray[np.float32]:
    """Return the samples at another rate, in Hz; raises RequestError for more than MAX_SAMPLES of them."""
    if sound.rate == rate:
        return sound.samples
    common = math.gcd(sound.rate, rate)
    old, new = sound.rate // common, rate // common
    count = -(-new * len(sound.samples) // old)
    if count > MAX_SAMPLES:
        raise RequestError("too_large", f"{field}: {count} samples at {rate} Hz are over {MAX_SAMPLES}")
    width = math.ceil(_CROSSINGS * old / (min(old, new) * _ROLL_OFF))
    after = (-(-count // new) + 1) * old + 2 * width
    padded = np.pad(sound.samples, (width, max(0, after - len(sound.samples))))
    result = np.empty(count, np.float32)
    for phase in range(min(new, count)):
        _fill_phase(result[phase::new], padded, phase, old, new, width)
    return result


def _fill_phase(
    result: NDArray[np.float32], padded: NDArray[np.float32], phase: int, old: int, new: int, width: int
) -> None:
    """Compute every `new`-th output sample from `phase` on: one filter over windows that lie `old` samples apart."""
    first = phase * old // new
    taps = _filter(first - phase * old / new, old, new, width)
    windows = np.lib.stride_tricks.as_strided(
        padded[first:], (len(result), len(taps)), (old * padded.itemsize, padded.itemsize), writeable=False
    )
    for at in range(0, len(result), _BLOCK):
        result[at : at + _BLOCK] = windows[at : at + _BLOCK] @ taps


def _filter(offset: float, old: int, new: int, width: int) -> NDArray[np.float32]:
    """Return the filter around an output sample that lies `-offset` input samples after its window's middle."""
    cut = min(old, new) * _ROLL_OFF / old
    at = np.clip((np.arange(-width, width + 1) + offset) * cut, -_CROSSINGS, _CROSSINGS)
    window = np.cos(at * math.pi / _CROSSINGS / 2) ** 2
    return np.asarray(np.sinc(at) * window * cut, np.float32)
