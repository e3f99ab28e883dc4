"""Sounds into letters and labels, on graphs in memory."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from models.artifact import Artifact
from models.backends.face import Tensors, TensorSpec
from models.body import parse_body
from models.errors import ModelError, RequestError
from models.request import Dialect, Request
from models.session import BatchSession
from models.tasks.audio_classification import AudioClassification
from models.tasks.automatic_speech_recognition import SpeechRecognition
from models.tasks.task import Task
from tests.fakes.backend import MemoryBackend
from tests.reference.waves import made

LETTERS = ["<pad>", "|", "A", "B", "<unk>"]
CONFIG: dict[str, object] = {"conv_kernel": [10], "conv_stride": [10]}
PLAIN: dict[str, object] = {"do_normalize": False}
SAMPLES = TensorSpec("input_values", "float32", (None, None))
FILES = ("config.json", "preprocessor_config.json", "vocab.json", "tokenizer_config.json")


def letters(feeds: Mapping[str, NDArray[Any]]) -> Tensors:
    """Return one letter for ten samples: the one that ten times the first of them names."""
    numbers = np.rint(feeds["input_values"][:, ::10] * 10).astype(int)
    return {"logits": np.eye(len(LETTERS), dtype=np.float32)[numbers]}


def loudness(feeds: Mapping[str, NDArray[Any]]) -> Tensors:
    first = next(iter(feeds.values()))
    means = np.abs(first).reshape(len(first), -1).mean(axis=1)
    return {"logits": np.stack([means, 1 - means], axis=1).astype(np.float32)}


def session_of(
    folder: Path,
    kind: type[SpeechRecognition | AudioClassification],
    *,
    processing: dict[str, object] | None = None,
    tokenizer: dict[str, object] | None = None,
    spec: TensorSpec = SAMPLES,
) -> BatchSession:
    function = letters if kind is SpeechRecognition else loudness
    outputs = [TensorSpec("logits", "float32", (None, None, 5) if kind is SpeechRecognition else (None, 2))]
    backend = MemoryBackend([spec], outputs, function)
    vocabulary = {letter: number for number, letter in enumerate(LETTERS)}
    for name, value in zip(
        FILES, (CONFIG, PLAIN if processing is None else processing, vocabulary, tokenizer or {}), strict=True
    ):
        (folder / name).write_text(json.dumps(value))
    with Artifact(folder, FILES) as artifact:
        task: Task = kind(artifact, backend)
    return BatchSession({Dialect.HUGGINGFACE: task}, backend, batch=4)


def submit(session: BatchSession, body: object) -> None:
    read = parse_body("application/json", json.dumps(body).encode())
    session.submit(1, Request(model="m", content_type=read.content_type, body=read.body, dialect=read.dialect))


def ask(session: BatchSession, inputs: object, **parameters: object) -> Any:
    submit(session, {"inputs": inputs, "parameters": parameters})
    (piece,) = session.step()
    assert not piece.code, piece.message
    return json.loads(piece.body)["outputs"]


def spoken(text: str) -> list[float]:
    """Return samples that the graph in memory hears as these letters; `.` is the blank."""
    return [LETTERS.index({".": "<pad>"}.get(sign, sign)) / 10 for sign in text for _ in range(10)]


def test_repeated_letters_are_one_blanks_part_them_and_delimiters_are_spaces(tmp_path: Path) -> None:
    session = session_of(tmp_path, SpeechRecognition)
    assert ask(session, spoken("..AAA.A|||BB.|")) == {"text": "AA B"}
    assert ask(session, spoken("....")) == {"text": ""}
    assert ask(session, [spoken("AB"), spoken("B")]) == [{"text": "AB"}, {"text": "B"}]


def test_letters_and_words_are_placed_in_seconds(tmp_path: Path) -> None:
    session = session_of(tmp_path, SpeechRecognition)
    moment = 10 / 16_000
    chars = ask(session, spoken("AA.|B"), return_timestamps="char")["chunks"]
    assert [chunk["text"] for chunk in chars] == ["A", " ", "B"]
    assert chars[0]["timestamp"] == pytest.approx([0, 2 * moment])
    words = ask(session, spoken("AB|.BA"), return_timestamps="word")["chunks"]
    assert [chunk["text"] for chunk in words] == ["AB", "BA"]
    assert words[1]["timestamp"] == pytest.approx([4 * moment, 6 * moment])


def test_a_long_sound_in_windows_is_the_text_of_the_whole(tmp_path: Path) -> None:
    session = session_of(tmp_path, SpeechRecognition)
    long = "AB|.A" * 30
    whole = ask(session, spoken(long))
    for length in (0.01, 0.02, 0.5):
        assert ask(session, spoken(long), chunk_length_s=length) == whole


def test_the_tokenizers_settings_are_honoured(tmp_path: Path) -> None:
    settings: dict[str, object] = {"do_lower_case": True, "word_delimiter_token": "B", "pad_token": {"content": "|"}}
    session = session_of(tmp_path, SpeechRecognition, tokenizer=settings)
    assert ask(session, spoken("A|ABA")) == {"text": "aa a"}


@pytest.mark.parametrize(
    ("inputs", "parameters", "message"),
    [
        ([0.1] * 9, {}, "inputs: 9 samples at 16000 Hz are too few; the model needs 10"),
        ("no sound", {}, "inputs: is not a WAV file in base64"),
        ({"raw": [0.1]}, {}, "inputs: expected a WAV file in base64, a list of samples"),
        ({"raw": [0.1], "sampling_rate": 0}, {}, "inputs.sampling_rate: expected 1000 to 384000, got 0"),
        ({"raw": [0.1, None], "sampling_rate": 8000}, {}, "inputs.raw[1]: expected a number, got null"),
        ([0.1] * 99, {"chunk_length_s": -1}, "parameters.chunk_length_s: expected seconds from 0 to 3600"),
        ([0.1] * 99, {"chunk_length_s": 0.01, "stride_length_s": 0.005}, "parameters.stride_length_s: both ends"),
        ([0.1] * 99, {"return_timestamps": True}, "parameters.return_timestamps: expected char or word"),
        ([0.1] * 99, {"language": "en"}, "parameters.language: is not known for this model"),
    ],
)
def test_a_wrong_sound_or_parameter_is_refused_by_its_field(
    tmp_path: Path, inputs: object, parameters: dict[str, object], message: str
) -> None:
    session = session_of(tmp_path, SpeechRecognition)
    with pytest.raises(RequestError) as caught:
        submit(session, {"inputs": inputs, "parameters": parameters})
    assert caught.value.code == "bad_request"
    assert caught.value.message.startswith(message)


def test_a_text_is_told_what_the_model_takes(tmp_path: Path) -> None:
    session = session_of(tmp_path, SpeechRecognition)
    with pytest.raises(RequestError, match=r"expected audio/wav, or application/json .* got text/plain"):
        session.submit(1, Request(model="m", content_type="text/plain", body=b"hi", dialect=Dialect.HUGGINGFACE))


def test_every_label_of_a_sound_is_given_unless_fewer_are_asked_for(tmp_path: Path) -> None:
    session = session_of(tmp_path, AudioClassification)
    body = base64.b64encode(made("s16-8000-2-900-4")).decode()
    assert [entry["label"] for entry in ask(session, body)] == ["LABEL_1", "LABEL_0"]
    assert len(ask(session, [body, body], top_k=1)[1]) == 1


@pytest.mark.parametrize(
    ("processing", "frames", "most_s"),
    [
        ({"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 8, "chunk_length": 1}, (8, 100), 1.0),
        ({"feature_extractor_type": "ASTFeatureExtractor", "num_mel_bins": 8, "max_length": 100}, (100, 8), 1.02),
    ],
)
def test_a_sound_beyond_the_models_length_is_refused_and_never_cut(
    tmp_path: Path, processing: dict[str, object], frames: tuple[int, int], most_s: float
) -> None:
    spec = TensorSpec("input_features", "float32", (None, *frames))
    session = session_of(tmp_path, AudioClassification, processing=processing, spec=spec)
    assert len(ask(session, [0.1] * 16_000)) == 2
    with pytest.raises(RequestError) as caught:
        submit(session, {"inputs": [0.1] * 17_000})
    assert caught.value.code == "too_large"
    assert f"1.06 s are over the model's {most_s:.2f} s" in caught.value.message


@pytest.mark.parametrize(
    ("processing", "words"),
    [
        ({"feature_extractor_type": "ClapFeatureExtractor"}, "'ClapFeatureExtractor' is not known"),
        ({"sampling_rate": 3}, "3 Hz cannot be meant"),
        ({"sampling_rate": "fast"}, "preprocessor_config.json"),
        ({"feature_extractor_type": "ASTFeatureExtractor", "max_length": -1}, "max_length of -1"),
    ],
)
def test_a_configuration_that_cannot_be_honoured_is_the_models_fault(
    tmp_path: Path, processing: dict[str, object], words: str
) -> None:
    with pytest.raises(ModelError, match=words):
        session_of(tmp_path, AudioClassification, processing=processing)
