"""What the tasks that hear sounds share: reading a request's sounds, and what `preprocessor_config.json` asks of them.

Names, defaults and arithmetic are those of Hugging Face's feature extractors for Wav2Vec2, Whisper and AST.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.backends.face import Tensors, TensorSpec
from models.body import SOUNDS
from models.errors import ModelError, RequestError
from models.images import decode_base64
from models.request import Request
from models.sounds import Sound, check_samples, load_wav, resample
from models.spectra import FRAME, HOP, KaldiSpectrum, WhisperSpectrum
from models.tasks.task import check_numbers, json_name, parse_question

TAKES: Final = "audio/wav, or application/json with `inputs` a WAV file in base64"
_FILE: Final = "preprocessor_config.json"
_WHAT: Final = "a WAV file"


class Waves(msgspec.Struct, frozen=True):
    """A request's sounds as (field, samples at the model's rate); `many` is whether a list was sent."""

    sounds: list[tuple[str, NDArray[np.float32]]]
    many: bool
    parameters: dict[str, Any]


class _Config(msgspec.Struct):
    """The members that are honoured; None is the extractor's own default."""

    feature_extractor_type: str = "Wav2Vec2FeatureExtractor"
    sampling_rate: int = 16_000
    do_normalize: bool | None = None
    feature_size: int | None = None
    num_mel_bins: int = 128
    max_length: int = 1024
    mean: float = -4.2677393
    std: float = 4.5689974
    chunk_length: int = 30
    n_fft: int = FRAME
    hop_length: int = HOP
    dither: float = 0.0


class WaveInput:
    """The graph's input for a sound, and the mask of its samples where it has an input for that."""

    def __init__(
        self, inputs: list[TensorSpec], processing: Mapping[str, object], config: Mapping[str, object]
    ) -> None:
        try:
            self._config = msgspec.convert(processing, _Config)
        except msgspec.ValidationError as error:
            raise ModelError(f"{_FILE}: {error}") from error
        self.rate = self._config.sampling_rate
        if not 1_000 <= self.rate <= 192_000:
            raise ModelError(f"{_FILE}: a sampling_rate of {self.rate} Hz cannot be meant")
        self._input = next((spec for spec in inputs if spec.name in {"input_values", "input_features"}), inputs[0])
        self._mask = next((spec for spec in inputs if spec.name == "attention_mask"), None)
        if unknown := [spec.name for spec in inputs if spec not in {self._input, self._mask}]:
            raise ModelError(f"there is nothing to give to the graph's input {unknown[0]!r}")
        kind = _kind(self._config)
        self._least = FRAME if kind == "ast" else least_samples(config)
        self._spectrum = _spectrum(kind, self._config)

    def prepare(self, samples: NDArray[np.float32], field: str) -> Tensors:
        """Return a sound as the graph takes it, without a batch axis; raises RequestError."""
        if len(samples) < self._least:
            message = f"{field}: {len(samples)} samples at {self.rate} Hz are too few; the model needs {self._least}"
            raise RequestError("bad_request", message)
        values = self._values(samples, field).astype(self._input.dtype, copy=False)
        wanted = self._input.shape[1:]
        if len(wanted) != values.ndim or any(
            size is not None and size != got for size, got in zip(wanted, values.shape, strict=True)
        ):
            expected = ["any" if size is None else size for size in wanted]
            message = f"{field}: the model takes {expected}, the sound gives {list(values.shape)}".replace("'", "")
            raise RequestError("bad_request", message)
        item = {self._input.name: values}
        if self._mask is not None:
            item[self._mask.name] = np.ones(len(samples), self._mask.dtype)
        return item

    def _values(self, samples: NDArray[np.float32], field: str) -> NDArray[np.float32]:
        config = self._config
        if isinstance(self._spectrum, WhisperSpectrum):
            self._check_length(len(samples), config.chunk_length * self.rate, field)
            filled = np.zeros(config.chunk_length * self.rate, np.float32)
            filled[: len(samples)] = samples
            return self._spectrum.compute(filled)
        if isinstance(self._spectrum, KaldiSpectrum):
            self._check_length(len(samples), FRAME + config.max_length * HOP - 1, field)
            filled = np.zeros((config.max_length, self._spectrum.bins), np.float32)
            levels = self._spectrum.compute(samples)
            filled[: len(levels)] = levels
            return filled if config.do_normalize is False else (filled - config.mean) / (config.std * 2)
        return _normalised(samples) if config.do_normalize is not False else samples

    def _check_length(self, given: int, most: int, field: str) -> None:
        if given > most:
            message = f"{field}: {given / self.rate:.2f} s are over the model's {most / self.rate:.2f} s"
            raise RequestError("too_large", message)


def _kind(config: _Config) -> Literal["raw", "whisper", "ast"]:
    name = config.feature_extractor_type.removesuffix("FeatureExtractor").removesuffix("Fast")
    if name == "Wav2Vec2":
        return "raw"
    if name == "Whisper" and not config.dither:
        return "whisper"
    if name == "AST":
        return "ast"
    raise ModelError(f"{_FILE}: the extractor {config.feature_extractor_type[:80]!r} is not known here")


def _spectrum(kind: str, config: _Config) -> WhisperSpectrum | KaldiSpectrum | None:
    if kind == "raw":
        return None
    bins = (config.feature_size or 80) if kind == "whisper" else config.num_mel_bins
    sizes = {"bins": bins, "n_fft": config.n_fft, "hop_length": config.hop_length, "max_length": config.max_length}
    for name, size in {**sizes, "chunk_length": config.chunk_length}.items():
        if not 0 < size <= 1 << 16:
            raise ModelError(f"{_FILE}: {name} of {size} cannot be meant")
    if kind == "whisper":
        return WhisperSpectrum(config.sampling_rate, bins, config.n_fft, config.hop_length)
    return KaldiSpectrum(config.sampling_rate, bins)


def _normalised(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return samples of mean 0 and variance 1."""
    return np.asarray((samples - samples.mean()) / np.sqrt(samples.var() + np.float32(1e-7)))


def least_samples(config: Mapping[str, object]) -> int:
    """Return the fewest samples that a net's convolutions (`conv_kernel`, `conv_stride`) turn into one frame."""
    kernels, strides = config.get("conv_kernel"), config.get("conv_stride")
    least = 1
    if isinstance(kernels, list) and isinstance(strides, list) and len(kernels) == len(strides):
        for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
            if isinstance(kernel, int) and isinstance(stride, int):
                least = (least - 1) * stride + kernel
    return max(1, least)


def read_waves(request: Request, known: frozenset[str], rate: int) -> Waves:
    """Return the sounds of a request, at `rate` Hz, whose parameters are among `known`; raises RequestError."""
    if request.content_type in SOUNDS:
        return Waves([("body", load_wav(request.body, "body", rate))], many=False, parameters={})
    question = parse_question(request, known, TAKES)
    inputs = question.inputs
    many = isinstance(inputs, list) and isinstance(inputs[0], str | dict | list)
    values = inputs if many else [inputs]
    fields = [f"inputs[{at}]" if len(values) > 1 else "inputs" for at in range(len(values))]
    sounds = [(field, _samples(value, field, rate)) for field, value in zip(fields, values, strict=True)]
    return Waves(sounds, many=many, parameters=question.parameters)


def _samples(value: object, field: str, rate: int) -> NDArray[np.float32]:
    """Read a WAV file in base64, `{"raw", "sampling_rate"}`, or plain samples at the model's rate."""
    if isinstance(value, str):
        return load_wav(decode_base64(value, field, _WHAT), field, rate)
    if isinstance(value, list):
        return _raw(value, field)
    if isinstance(value, dict) and value.keys() == {"raw", "sampling_rate"}:
        given = value["sampling_rate"]
        if not isinstance(given, int) or isinstance(given, bool) or not 1_000 <= given <= 384_000:
            raise RequestError("bad_request", f"{field}.sampling_rate: expected 1000 to 384000, got {given!r:.40}")
        return resample(Sound(_raw(value["raw"], f"{field}.raw"), given), rate, field)
    expected = "a WAV file in base64, a list of samples, or an object of `raw` and `sampling_rate`"
    raise RequestError("bad_request", f"{field}: expected {expected}, got {json_name(value)}")


def _raw(values: object, field: str) -> NDArray[np.float32]:
    samples = check_numbers(values, "float32", field)
    if not len(samples):
        raise RequestError("bad_request", f"{field}: the sound has no samples")
    check_samples(samples, field)
    return samples
