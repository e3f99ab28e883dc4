"""automatic-speech-recognition: sounds into text, by nets that give a letter for each moment (CTC, Graves 2006).

Letters are read as Wav2Vec2's tokenizer reads them. A long sound goes in overlapping windows where `chunk_length_s`
asks for it, by the rule of the Hugging Face pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.artifact import Artifact
from models.backends.face import Backend, Tensors
from models.errors import ModelError, RequestError
from models.manifest import Manifest
from models.request import Request
from models.tasks.task import Prepared, TokenlessTask, check_finite, render_results, run_alike
from models.tasks.waves import WaveInput, read_waves

_PARAMETERS: Final = frozenset({"chunk_length_s", "stride_length_s", "return_timestamps"})
_CLEANED: Final = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
"""What English tokenizers put spaces before, where the tokenizer's configuration asks to take them away again."""


class Letters(msgspec.Struct, frozen=True, kw_only=True):
    """The net's alphabet: `blank` parts equal letters, `delimiter` parts words."""

    names: dict[int, str]
    blank: str
    delimiter: str
    space: str
    lower: bool
    clean: bool


class _Window(msgspec.Struct, frozen=True):
    """A part of a sound: its samples, and those at both ends whose letters belong to its neighbours."""

    length: int
    left: int
    right: int


class _Options(msgspec.Struct, frozen=True):
    windows: list[list[_Window]]
    """The windows of each sound."""
    cut: bool
    timestamps: str


class SpeechRecognition(TokenlessTask):
    """Samples into the graph; `logits` holds [moments, letters]."""

    def __init__(self, artifact: Artifact, backend: Backend) -> None:
        config = artifact.read_json("config.json")
        self._backend = backend
        self._input = WaveInput(list(backend.inputs), artifact.read_json("preprocessor_config.json"), config)
        self._letters = load_letters(artifact)
        self._ratio = samples_per_moment(config)
        names = [spec.name for spec in backend.outputs]
        if "encoder_hidden_states" in {spec.name for spec in backend.inputs} or "last_hidden_state" in names:
            raise ModelError("automatic-speech-recognition: only nets with CTC letters (logits) are read here")
        self._output = "logits" if "logits" in names else names[0]

    def prepare(self, request: Request) -> Prepared:
        """Read the sounds and cut long ones into windows, where that is asked for; raises RequestError."""
        asked = read_waves(request, _PARAMETERS, self._input.rate)
        timestamps = _parse_timestamps(asked.parameters)
        chunk = self._parse_chunk(asked.parameters)
        items: list[Tensors] = []
        windows: list[list[_Window]] = []
        for field, samples in asked.sounds:
            parts = _windows(len(samples), chunk) if chunk else [(0, _Window(len(samples), 0, 0))]
            windows.append([window for _, window in parts])
            items += [self._input.prepare(samples[at : at + window.length], field) for at, window in parts]
        return Prepared(items=items, many=asked.many, options=_Options(windows, chunk is not None, timestamps))

    def run(self, items: Sequence[Tensors]) -> list[Tensors]:
        """Answer a batch of windows; those of another length than the one before run apart from it."""
        return run_alike(self._backend, items)

    def interpret(self, prepared: Prepared, results: Sequence[Tensors]) -> bytes:
        """Return the text of each sound, and where its letters or words lie if that was asked."""
        options: _Options = prepared.options
        outputs, at = [], 0
        for windows in options.windows:
            mine, at = results[at : at + len(windows)], at + len(windows)
            parts = [
                self._moments(result, window, cut=options.cut) for result, window in zip(mine, windows, strict=True)
            ]
            outputs.append(self._render(np.concatenate(parts), options.timestamps))
        return render_results(prepared, outputs)

    def _moments(self, result: Tensors, window: _Window, *, cut: bool) -> NDArray[Any]:
        """Return the best letter of each moment, without those that are the neighbours'."""
        best = np.asarray(check_finite(result[self._output]).argmax(axis=-1))
        if not cut:
            return best
        moments = round(window.length / self._ratio)
        left = round(window.left / window.length * moments)
        right = round(window.right / window.length * moments)
        return best[left : moments - right]

    def _render(self, numbers: NDArray[Any], timestamps: str) -> dict[str, object]:
        spelt = spell(numbers, self._letters)
        text = "".join(letter for letter, _, _ in spelt).strip()
        text = text.lower() if self._letters.lower else text
        if self._letters.clean:
            for spaced, plain in _CLEANED:
                text = text.replace(spaced, plain)
        if not timestamps:
            return {"text": text}
        spelt = spelt if timestamps == "char" else _words(spelt, self._letters.space)
        second = self._ratio / self._input.rate
        chunks = [{"text": part, "timestamp": [start * second, end * second]} for part, start, end in spelt]
        return {"text": text, "chunks": chunks}

    def _parse_chunk(self, parameters: Mapping[str, Any]) -> tuple[int, int, int] | None:
        """Return (samples of a window, of its left and its right end) in whole moments; None where all is one."""
        length = _seconds(parameters, "chunk_length_s", 0.0)
        given = parameters.get("stride_length_s")
        ends = given if isinstance(given, list) and len(given) == 2 else [length / 6 if given is None else given] * 2
        left_s, right_s = (_seconds({"stride_length_s": end}, "stride_length_s", 0.0) for end in ends)
        if not length:
            return None
        chunk, left, right = (
            round(seconds * self._input.rate / self._ratio) * self._ratio for seconds in (length, left_s, right_s)
        )
        if chunk <= left + right:
            message = "parameters.stride_length_s: both ends together must be shorter than chunk_length_s"
            raise RequestError("bad_request", message)
        return chunk, left, right


def load_letters(artifact: Artifact) -> Letters:
    """Read the alphabet of `vocab.json`, or of `tokenizer.json`; raises ModelError."""
    settings = artifact.read_json("tokenizer_config.json")
    table: object = artifact.read_json("vocab.json")
    language = settings.get("target_lang")
    if isinstance(table, dict) and isinstance(language, str):
        table = table.get(language)
    if not table:
        model = artifact.read_json("tokenizer.json").get("model")
        table = model.get("vocab") if isinstance(model, dict) else None
    try:
        names = {number: name for name, number in msgspec.convert(table, dict[str, int]).items()}
        added = msgspec.convert(settings.get("added_tokens_decoder", {}), dict[str, dict[str, Any]])
    except msgspec.ValidationError as error:
        raise ModelError(f"the letters of vocab.json or tokenizer.json cannot be read: {error}") from error
    names |= {int(number): str(token.get("content")) for number, token in added.items() if number.isdigit()}
    return Letters(
        names=names,
        blank=_token(artifact, settings, "pad_token", "<pad>"),
        delimiter=_token(artifact, settings, "word_delimiter_token", "|"),
        space=_token(artifact, settings, "replace_word_delimiter_char", " "),
        lower=settings.get("do_lower_case") is True,
        clean=settings.get("clean_up_tokenization_spaces") is True,
    )


def _token(artifact: Artifact, settings: Mapping[str, object], name: str, default: str) -> str:
    special = artifact.read_json("special_tokens_map.json")
    value = settings.get(name, special.get(name, default))
    value = value.get("content", default) if isinstance(value, dict) else value
    return value if isinstance(value, str) else default


def samples_per_moment(config: Mapping[str, object]) -> int:
    """Return how many samples the net's convolutions turn into one moment: the product of `conv_stride`."""
    strides = config.get("conv_stride", config.get("inputs_to_logits_ratio", 320))
    values = strides if isinstance(strides, list) else [strides]
    if not values or any(not isinstance(value, int) or value < 1 for value in values):
        raise ModelError("config.json: conv_stride holds no strides")
    return math.prod(values)


def spell(numbers: NDArray[Any], letters: Letters) -> list[tuple[str, int, int]]:
    """Return (letter, first moment, moment after the last): repetitions are one letter, blanks are none."""
    if not len(numbers):
        return []
    names = [letters.names.get(int(number), "<unk>") for number in numbers]
    changes = [0, *(at for at in range(1, len(names)) if names[at] != names[at - 1]), len(names)]
    return [
        (letters.space if names[start] == letters.delimiter else names[start], start, end)
        for start, end in pairwise(changes)
        if names[start] != letters.blank
    ]


def _words(spelt: Sequence[tuple[str, int, int]], space: str) -> list[tuple[str, int, int]]:
    words: list[tuple[str, int, int]] = []
    inside = False
    for letter, start, end in spelt:
        if letter == space:
            inside = False
        elif inside:
            word, since, _ = words[-1]
            words[-1] = (word + letter, since, end)
        else:
            words.append((letter, start, end))
            inside = True
    return words


def _windows(samples: int, chunk: tuple[int, int, int]) -> list[tuple[int, _Window]]:
    """Return (first sample, window) of each part of a sound; the first has no left end, the last no right one."""
    length, left, right = chunk
    parts: list[tuple[int, _Window]] = []
    for start in range(0, samples, length - left - right):
        size = min(length, samples - start)
        last = start + length >= samples
        before = 0 if start == 0 else left
        if size > before:
            parts.append((start, _Window(size, before, 0 if last else right)))
        if last:
            break
    return parts


def _seconds(parameters: Mapping[str, Any], name: str, default: float) -> float:
    value = parameters.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 3600:
        raise RequestError("bad_request", f"parameters.{name}: expected seconds from 0 to 3600, got {value!r:.40}")
    return float(value)


def _parse_timestamps(parameters: Mapping[str, Any]) -> str:
    value = parameters.get("return_timestamps") or ""
    if value not in {"", "char", "word"}:
        raise RequestError("bad_request", f"parameters.return_timestamps: expected char or word, got {value!r:.40}")
    return str(value)


def build(artifact: Artifact, backend: Backend, manifest: Manifest) -> SpeechRecognition:
    """Make the task for an opened graph."""
    del manifest
    return SpeechRecognition(artifact, backend)
