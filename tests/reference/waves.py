"""Sounds made by code, the same wherever they are made: `s16-8000-2-4000-7` says what is in one.

That is the kind of sample (`u8`, `s16`, `s24`, `s32`, `f32`, `f64`), the rate in Hz, channels, samples, and the seed.
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray


def made(name: str) -> bytes:
    """Return the WAV file that a name stands for."""
    kind, rate, channels, count, seed = name.split("-")
    return wav(samples(int(count), int(channels), int(rate), int(seed)), kind, int(rate))


def samples(count: int, channels: int, rate: int, seed: int) -> NDArray[np.float64]:
    """Return [count, channels] of a few tones that come and go, and noise, from numpy's frozen generator."""
    chance = np.random.RandomState(seed)
    moments = np.arange(count)[:, None] / rate
    tones = chance.uniform(80, 3500, (6, 1, channels))
    swells = np.sin(moments * chance.uniform(1, 30, (6, 1, channels)) + chance.uniform(0, 6, (6, 1, channels)))
    whole = (np.sin(2 * np.pi * tones * moments) * swells).sum(axis=0)
    sound: NDArray[np.float64] = np.clip(
        whole * chance.uniform(0.02, 0.2) + chance.uniform(-0.02, 0.02, (count, channels)), -0.99, 0.99
    )
    return sound


def wav(values: NDArray[np.float64], kind: str, rate: int) -> bytes:
    """Return the samples as a WAV file."""
    channels, bits = values.shape[1], int(kind[1:])
    if kind == "u8":
        body = np.rint(values * 127 + 128).astype(np.uint8).tobytes()
    elif kind == "s24":
        wide = np.rint(values * (2**23 - 1)).astype("<i4").reshape(-1, 1).view(np.uint8)
        body = wide[:, :3].tobytes()
    elif kind.startswith("s"):
        body = np.rint(values * (2 ** (bits - 1) - 1)).astype(f"<i{bits // 8}").tobytes()
    else:
        body = values.astype(f"<f{bits // 8}").tobytes()
    align = channels * bits // 8
    head = struct.pack("<HHIIHH", 3 if kind.startswith("f") else 1, channels, rate, rate * align, align, bits)
    parts = b"WAVEfmt " + struct.pack("<I", len(head)) + head + b"data" + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", len(parts)) + parts
