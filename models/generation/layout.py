"""What a folder says of its decoder: `genai_config.json` of onnxruntime-genai, or else the model's `config.json`."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from models.artifact import Artifact
from models.errors import ModelError
from models.generation.options import Sampling

_CONTEXT_NAMES: Final = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
_SAMPLING: Final = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_GRAPHS: Final = ("model.onnx", "onnx/model.onnx", "decoder_model_merged.onnx", "onnx/decoder_model_merged.onnx")


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """A decoder's graph and what it does not say itself; `heads`, `head_size` and `vocabulary` are 0 where unknown.

    `context_tokens` bounds prompt and answer together; `sampling` is how the model's makers want tokens drawn.
    """

    graph: str
    context_tokens: int
    end_tokens: frozenset[int]
    heads: int
    head_size: int
    vocabulary: int
    sampling: Sampling
    max_new_tokens: int = 0


class _Decoder(msgspec.Struct):
    filename: str
    head_size: int = 0
    num_key_value_heads: int = 0


class _Model(msgspec.Struct):
    context_length: int
    decoder: _Decoder
    vocab_size: int = 0
    eos_token_id: int | list[int] = []


class _Genai(msgspec.Struct):
    """The members of `genai_config.json` that are read here."""

    model: _Model
    search: dict[str, Any] = {}


def read_layout(artifact: Artifact) -> Layout:
    """Return what the artifact's files say; raises ModelError naming the file and the member."""
    settings = artifact.read_json("generation_config.json")
    if "genai_config.json" in artifact.files:
        return _read_genai(artifact, settings)
    return _read_plain(artifact, settings)


def _read_genai(artifact: Artifact, settings: dict[str, object]) -> Layout:
    raw = artifact.read_json("genai_config.json")
    try:
        config = msgspec.convert(raw, _Genai)
    except msgspec.ValidationError as error:
        raise ModelError(f"genai_config.json: {error}") from error
    for path in _file_names(raw):
        artifact.check(path)
    decoder = config.model.decoder
    return Layout(
        graph=decoder.filename,
        context_tokens=_positive("genai_config.json: model.context_length", config.model.context_length),
        end_tokens=_tokens(config.model.eos_token_id) | _tokens(settings.get("eos_token_id")),
        heads=decoder.num_key_value_heads,
        head_size=decoder.head_size,
        vocabulary=config.model.vocab_size,
        sampling=_sampling(config.search),
        max_new_tokens=_whole(settings.get("max_new_tokens")),
    )


def _read_plain(artifact: Artifact, settings: dict[str, object]) -> Layout:
    """Read a folder as Optimum and transformers.js lay it out."""
    config = artifact.read_json("config.json")
    inner = config.get("text_config")
    text: dict[str, Any] = inner if isinstance(inner, dict) else config
    context = next((size for name in _CONTEXT_NAMES if (size := _whole(text.get(name)))), 0)
    heads = _whole(text.get("num_attention_heads")) or _whole(text.get("n_head"))
    width = _whole(text.get("hidden_size")) or _whole(text.get("n_embd"))
    ends = settings.get("eos_token_id", config.get("eos_token_id"))
    return Layout(
        graph=artifact.named(*_GRAPHS, suffix=".onnx"),
        context_tokens=_positive(f"config.json: one of {', '.join(_CONTEXT_NAMES)}", context),
        end_tokens=_tokens(ends),
        heads=_whole(text.get("num_key_value_heads")) or heads,
        head_size=_whole(text.get("head_dim")) or (width // heads if heads else 0),
        vocabulary=_whole(text.get("vocab_size")),
        sampling=_sampling(settings),
        max_new_tokens=_whole(settings.get("max_new_tokens")),
    )


def _sampling(settings: dict[str, Any]) -> Sampling:
    """Return how tokens are drawn where the asker says nothing; the likeliest unless `do_sample` is set."""
    given = {name: _number(settings.get(name)) for name in _SAMPLING}
    sample = settings.get("do_sample") is True
    return Sampling(
        temperature=(given["temperature"] or 1.0) if sample else 0.0,
        top_k=int(given["top_k"] or 0) or None,
        top_p=given["top_p"],
        min_p=given["min_p"],
        repetition_penalty=given["repetition_penalty"] or None,
    )


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 else None


def _tokens(value: object) -> frozenset[int]:
    values = value if isinstance(value, list) else [value]
    return frozenset(token for token in values if isinstance(token, int) and token >= 0)


def _whole(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _positive(what: str, value: int) -> int:
    if value < 1:
        raise ModelError(f"{what}: must be there and at least 1")
    return value


def _file_names(value: Any, key: str = "") -> list[str]:
    """Return every text under a key that names a file or a library, at any depth."""
    if isinstance(value, dict):
        return [name for inner, item in value.items() for name in _file_names(item, inner)]
    if isinstance(value, list):
        return [name for item in value for name in _file_names(item, key)]
    suspect = key.endswith(("filename", "path", "library"))
    return [value] if suspect and isinstance(value, str) else []
