"""Log-mel spectra of sounds, as Whisper's and the audio spectrogram transformer's extractors make them.

Pure: no I/O, no clock. Mel scales: Slaney's (Auditory Toolbox, 1998) and Kaldi's.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

FRAME: Final = 400
HOP: Final = 160
"""Samples at 16 kHz: 25 and 10 ms."""

_KALDI_FFT: Final = 512
_KALDI_LOWEST_HZ: Final = 20.0
_PREEMPHASIS: Final = 0.97
_EPSILON: Final = float(np.finfo(np.float32).eps)
_BLOCK: Final = 512
"""Frames that are transformed at once, so that a long sound takes little memory."""


class WhisperSpectrum:
    """[bins, frames] of log10 mel power, clamped to 8 below the loudest and moved to about -1 to 1."""

    def __init__(self, rate: int, bins: int, fft: int = FRAME, hop: int = HOP) -> None:
        self._fft, self._hop = fft, hop
        self._window = np.hanning(fft + 1)[:-1]
        self._filters = _slaney_filters(rate, bins, fft)

    def compute(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the spectrum of samples that are at least as many as one frame."""
        padded = np.pad(samples, self._fft // 2, mode="reflect")
        frames = np.lib.stride_tricks.sliding_window_view(padded, self._fft)[:: self._hop][:-1]
        parts = [
            np.maximum(1e-10, _power(frames[at : at + _BLOCK] * self._window, self._fft) @ self._filters)
            for at in range(0, len(frames), _BLOCK)
        ]
        levels = np.log10(np.concatenate(parts)).astype(np.float32).T
        levels = np.maximum(levels, levels.max() - np.float32(8.0))
        return np.ascontiguousarray((levels + np.float32(4.0)) / np.float32(4.0))


class KaldiSpectrum:
    """[frames, bins] of log mel power over frames without their mean, as Kaldi's filter banks."""

    def __init__(self, rate: int, bins: int) -> None:
        self._window = np.hanning(FRAME)
        self._filters = _kaldi_filters(rate, bins)
        self.bins = bins

    def compute(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the spectrum; sounds shorter than one frame have none."""
        if len(samples) < FRAME:
            return np.zeros((0, self.bins), np.float32)
        frames = np.lib.stride_tricks.sliding_window_view(samples, FRAME)[::HOP]
        parts = [self._levels(frames[at : at + _BLOCK]) for at in range(0, len(frames), _BLOCK)]
        return np.concatenate(parts).astype(np.float32)

    def _levels(self, frames: NDArray[np.float32]) -> NDArray[np.float64]:
        centred = frames.astype(np.float64)
        centred -= centred.mean(axis=1, keepdims=True)
        raised = np.empty_like(centred)
        raised[:, 0] = centred[:, 0] * (1 - _PREEMPHASIS)
        raised[:, 1:] = centred[:, 1:] - _PREEMPHASIS * centred[:, :-1]
        mel = _power(raised * self._window, _KALDI_FFT) @ self._filters
        return np.asarray(np.log(np.maximum(_EPSILON, mel)))


def _power(frames: NDArray[Any], fft: int) -> NDArray[np.float64]:
    # Single precision between the two, as the reference keeps its complex numbers.
    return np.abs(np.fft.rfft(frames, fft, axis=1).astype(np.complex64)).astype(np.float64) ** 2


def _slaney_filters(rate: int, bins: int, fft: int) -> NDArray[np.float64]:
    """Return [fft bins, mel bins] of triangles with equal area, from 0 to 8 kHz."""
    edges = _slaney_hz(np.linspace(0.0, _slaney_mel(8000.0), bins + 2))
    filters = _triangles(np.linspace(0, rate // 2, fft // 2 + 1), edges)
    return np.asarray(filters * (2.0 / (edges[2:] - edges[:-2])))


def _kaldi_filters(rate: int, bins: int) -> NDArray[np.float64]:
    """Return [fft bins, mel bins] of triangles on the mel axis, from 20 Hz to half the rate."""
    points = _kaldi_mel(rate / _KALDI_FFT * np.arange(_KALDI_FFT // 2 + 1))
    lowest, highest = _kaldi_mel(np.asarray([_KALDI_LOWEST_HZ, rate // 2]))
    return _triangles(points, np.linspace(lowest, highest, bins + 2))


def _triangles(points: NDArray[np.float64], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    widths = np.diff(edges)
    distances = edges[None, :] - points[:, None]
    rising, falling = -distances[:, :-2] / widths[:-1], distances[:, 2:] / widths[1:]
    return np.maximum(0.0, np.minimum(rising, falling))


def _slaney_mel(hz: float) -> float:
    """Return mels: linear to 1 kHz, logarithmic above."""
    return 15.0 + float(np.log(hz / 1000.0)) * 27.0 / float(np.log(6.4)) if hz >= 1000.0 else 3.0 * hz / 200.0


def _slaney_hz(mels: NDArray[np.float64]) -> NDArray[np.float64]:
    above = 1000.0 * np.exp(np.log(6.4) / 27.0 * (mels - 15.0))
    return np.where(mels >= 15.0, above, 200.0 * mels / 3.0)


def _kaldi_mel(hz: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(1127.0 * np.log(1.0 + hz / 700.0))
