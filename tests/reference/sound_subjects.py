"""Nets that hear: classifiers on samples and on spectra, and CTC recognisers."""

from __future__ import annotations

import base64
import io
import json
import math
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from scipy.io import wavfile
from transformers import pipeline

from tests.reference import waves
from tests.reference.case import Case, Subject
from tests.reference.exporting import export, small

_RATE = 16_000
_NET = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": [8, 8, 8],
    "conv_stride": [5, 4, 4],
    "conv_kernel": [10, 8, 4],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 12,
    "mask_time_prob": 0.0,
}
_LETTERS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAOINSHRDLU'.", "é"]
_AST = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_length": 64,
    "num_mel_bins": 32,
}
_WHISPER = {
    "d_model": 8,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 16,
    "num_mel_bins": 20,
    "classifier_proj_size": 12,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "decoder_start_token_id": 0,
}
Net = Callable[[random.Random], tuple[Any, Any]]


def subjects() -> list[Subject]:
    """Return every subject of this module."""
    return [
        _classifier("wav2vec2", lambda chance: _raw(chance, "Wav2Vec2ForSequenceClassification")),
        _classifier("hubert", lambda chance: _raw(chance, "HubertForSequenceClassification", normalize=False)),
        _classifier("ast", _ast, longest=9000),
        _classifier("whisper", _whisper, most=6),
        _recogniser("wav2vec2", "Wav2Vec2ForCTC"),
        _recogniser("hubert", "HubertForCTC", do_lower_case=True, clean_up_tokenization_spaces=True),
    ]


def _raw(chance: random.Random, kind: str, *, normalize: bool = True, labels: int = 6) -> tuple[Any, Any]:
    prefix = kind.split("For", maxsplit=1)[0]
    config = getattr(transformers, f"{prefix}Config")(**_NET, num_labels=labels, vocab_size=len(_LETTERS))
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=normalize, return_attention_mask=False)
    return small(chance, getattr(transformers, kind), config), extractor


def _ast(chance: random.Random) -> tuple[Any, Any]:
    config = transformers.ASTConfig(**_AST, num_labels=6)
    extractor = transformers.ASTFeatureExtractor(max_length=64, num_mel_bins=32)
    return small(chance, transformers.ASTForAudioClassification, config), extractor


def _whisper(chance: random.Random) -> tuple[Any, Any]:
    config = transformers.WhisperConfig(**_WHISPER, num_labels=6)
    extractor = transformers.WhisperFeatureExtractor(feature_size=20)
    return small(chance, transformers.WhisperForAudioClassification, config), extractor


def _classifier(name: str, net: Net, longest: int = 40_000, most: int = 99) -> Subject:
    def make(folder: Path, chance: random.Random, inputs: int) -> list[Case]:
        model, extractor = net(chance)
        _export(model, extractor, folder, "audio-classification")
        pipe = pipeline("audio-classification", model=model, feature_extractor=extractor, device="cpu")
        names = list(_names(chance, inputs, longest))[:most]
        cases = [_sound(name, pipe(heard(name))) for name in names]
        for settings in ({"top_k": 1}, {"top_k": 99}, {"function_to_apply": "sigmoid", "top_k": 6}):
            body = {"inputs": _numbers(names[0], 900), "parameters": settings}
            cases.append(Case(body=body, expected=pipe(np.asarray(body["inputs"], np.float32), **settings)))
        raw = {"raw": _numbers(names[1], 600), "sampling_rate": 8000}
        resampled = resample(np.asarray(raw["raw"], np.float32), 8000)
        return [
            *cases,
            Case(body={"inputs": [raw, raw]}, expected=pipe([resampled] * 2)),
            *_refused(short=name == "whisper"),
        ]

    return Subject(f"audio-classification-{name}", "audio-classification", make)


def _recogniser(name: str, kind: str, **settings: Any) -> Subject:
    def make(folder: Path, chance: random.Random, inputs: int) -> list[Case]:
        model, extractor = _raw(chance, kind)
        tokenizer = _tokenizer(**settings)
        _export(model, extractor, folder, "automatic-speech-recognition", tokenizer)
        pipe = pipeline(
            "automatic-speech-recognition",
            model=model,
            feature_extractor=extractor,
            tokenizer=tokenizer,
            device="cpu",
        )
        names = list(_names(chance, inputs, 40_000))
        cases = [_sound(name, pipe(heard(name))) for name in names]
        short = f"s16-16000-1-1500-{chance.randrange(1 << 30)}"
        text = base64.b64encode(waves.made(short)).decode()
        for parameters in _ways():
            answer = pipe(heard(short), **parameters)
            cases.append(Case(body={"inputs": text, "parameters": parameters}, expected=answer))
        body = {"inputs": [0.1] * 999, "parameters": {"chunk_length_s": 0.01, "stride_length_s": 1}}
        return [*cases, Case(body=body, error="bad_request"), *_refused()]

    return Subject(f"automatic-speech-recognition-{name}", "automatic-speech-recognition", make)


def _ways() -> Iterator[dict[str, Any]]:
    yield {"return_timestamps": "char"}
    yield {"return_timestamps": "word"}
    for chunk in (0.03, 0.05, 3.0):
        yield {"chunk_length_s": chunk}
    yield {"chunk_length_s": 0.05, "stride_length_s": [0.01, 0.005], "return_timestamps": "word"}
    yield {"chunk_length_s": 0.05, "stride_length_s": 0.0}


def heard(name: str) -> NDArray[np.float32]:
    """Return what a reader of its own and torchaudio's formula make of a file, as the pipelines would get it."""
    rate, values = wavfile.read(io.BytesIO(waves.made(name)))
    floats = values.astype(np.float64)
    if values.dtype == np.uint8:
        floats = (floats - 128) / 128
    elif values.dtype.kind == "i":
        floats /= -float(np.iinfo(values.dtype).min)
    mono = floats if floats.ndim == 1 else floats.mean(axis=1)
    return resample(mono.astype(np.float32), rate)


def resample(samples: NDArray[np.float32], rate: int) -> NDArray[np.float32]:
    """Return samples at 16 kHz, by a convolution with the kernels that torchaudio's documentation describes."""
    if rate == _RATE:
        return samples
    common = math.gcd(rate, _RATE)
    old, new = rate // common, _RATE // common
    cut, crossings = min(old, new) * 0.99, 6
    width = math.ceil(crossings * old / cut)
    moments = (torch.arange(-width, width + old, dtype=torch.float64) / old)[None] - torch.arange(new)[:, None] / new
    moments = (moments * cut).clamp(-crossings, crossings)
    kernels = torch.sinc(moments) * torch.cos(moments * math.pi / crossings / 2) ** 2 * cut / old
    padded = torch.nn.functional.pad(torch.from_numpy(samples).double()[None, None], (width, width + old))
    found = torch.nn.functional.conv1d(padded, kernels[:, None], stride=old)
    flat = found.transpose(1, 2).reshape(-1)[: -(-new * len(samples) // old)]
    return np.asarray(flat.float().numpy())


def _names(chance: random.Random, count: int, longest: int) -> Iterator[str]:
    """Give the names of sounds of every kind of sample, and generated ones of many rates and lengths."""
    for kind in ("u8", "s16", "s24", "s32", "f32", "f64"):
        yield f"{kind}-16000-{chance.choice([1, 2])}-{chance.randint(3000, longest // 2)}-{chance.randrange(1 << 30)}"
    for rate in (8000, 11_025, 22_050, 44_100, 48_000):
        yield f"s16-{rate}-2-{min(longest, 16_000) * rate // 32_000}-{chance.randrange(1 << 30)}"
    for _ in range(count):
        rate = chance.choice([8000, 16_000, 32_000])
        yield f"s16-{rate}-1-{chance.randint(2000, longest) * rate // 32_000}-{chance.randrange(1 << 30)}"


def _sound(name: str, answer: Any) -> Case:
    return Case(made=name, content_type="audio/wav", expected=answer)


def _numbers(name: str, most: int) -> list[float]:
    return [round(float(value), 4) for value in heard(name)[:most]]


def _refused(*, short: bool = False) -> list[Case]:
    whole = waves.made("s16-16000-1-900-3")
    few = [] if short else [Case(body={"inputs": [0.1, 0.2, 0.3]}, error="bad_request")]
    return [
        *few,
        Case(content=whole[:-100], content_type="audio/wav", error="bad_request"),
        Case(content=whole[:30], content_type="audio/wav", error="bad_request"),
        Case(body={"inputs": "no sound"}, error="bad_request"),
        Case(made="s16-16000-1-0-1", content_type="audio/wav", error="bad_request"),
    ]


def _tokenizer(**settings: Any) -> Any:
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "vocab.json"
        path.write_text(json.dumps({letter: number for number, letter in enumerate(_LETTERS)}))
        return transformers.Wav2Vec2CTCTokenizer(str(path), **settings)


def _export(model: Any, extractor: Any, folder: Path, task: str, *tokenizers: Any) -> None:
    export(model, [extractor, *tokenizers], folder, task)
    for tokenizer in tokenizers:
        tokenizer.save_pretrained(folder)
