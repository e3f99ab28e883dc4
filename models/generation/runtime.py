"""onnxruntime-genai behind a small face: a model opened, and generations that are stepped one token at a time.

Each generation has its own `Generator`, so that requests join and leave at any step. (`Engine` batches on a GPU only;
on a CPU it makes late askers wait until every member of the running batch has ended.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Final, Protocol

import msgspec
import numpy as np
import onnxruntime_genai as og

from models.artifact import Artifact
from models.backends.external import external_files
from models.errors import ModelError
from models.generation.options import Sampling

MAX_GRAPH_BYTES: Final = (2 << 30) - 1
PART_TOKENS: Final = 128
"""A prompt is computed in parts of this length, so that other texts and the counting of tokens go on between."""


class Generation(Protocol):
    """One running generation."""

    def step(self) -> int | None:
        """Compute and return the next token, or None after a part of the prompt. Raises ModelError."""


class Runtime(Protocol):
    """A generating model; `context_tokens` bounds prompt and answer together."""

    context_tokens: int
    end_tokens: frozenset[int]

    def start(self, prompt: Sequence[int], max_tokens: int, sampling: Sampling) -> Generation:
        """Prepare a generation without computing anything."""


class _Decoder(msgspec.Struct):
    filename: str


class _Model(msgspec.Struct):
    context_length: int
    decoder: _Decoder
    eos_token_id: int | list[int] = []


class _Config(msgspec.Struct):
    """The members of `genai_config.json` that are read here; the runtime reads the others."""

    model: _Model


class GenaiRuntime:
    """A folder in onnxruntime-genai's layout, opened on the processor."""

    def __init__(self, artifact: Artifact, *, threads: int) -> None:
        config = _read_config(artifact)
        self.context_tokens = config.model.context_length
        ends = config.model.eos_token_id
        self.end_tokens = frozenset(ends if isinstance(ends, list) else [ends])
        # Nothing leaves a box but what its owner sends.
        og.disable_telemetry_events()
        try:
            self._model = og.Model(_runtime_config(artifact, threads))
        except Exception as error:  # the runtime's exceptions share no base class
            raise ModelError(f"onnxruntime-genai refuses the model: {str(error)[:300]}") from error

    def start(self, prompt: Sequence[int], max_tokens: int, sampling: Sampling) -> GenaiGeneration:
        """Prepare a generation of at most `max_tokens`; its memory is taken at its first step."""
        return GenaiGeneration(self._model, prompt, max_tokens, sampling)


class GenaiGeneration:
    """One `Generator` with its own cache."""

    def __init__(self, model: og.Model, prompt: Sequence[int], max_tokens: int, sampling: Sampling) -> None:
        self._model = model
        tokens = np.asarray(prompt, dtype=np.int32)
        self._parts = deque(np.split(tokens, range(PART_TOKENS, len(tokens), PART_TOKENS)))
        self._options = search_options(len(prompt) + max_tokens, sampling)
        self._generator: og.Generator | None = None

    def step(self) -> int | None:
        """Compute and return the next token, or None after a part of the prompt; raises ModelError."""
        try:
            if self._generator is None:
                params = og.GeneratorParams(self._model)
                params.set_search_options(**self._options)
                self._generator = og.Generator(self._model, params)
            if self._parts:
                self._generator.append_tokens(self._parts.popleft())
                if self._parts:
                    return None
            self._generator.generate_next_token()
            return int(self._generator.get_next_tokens()[0])
        except Exception as error:  # as above
            raise ModelError(f"onnxruntime-genai: {str(error)[:300]}") from error


def search_options(max_length: int, sampling: Sampling) -> dict[str, Any]:
    """Return the runtime's search options; what the asker left open stays as the model's folder says."""
    options: dict[str, Any] = {"max_length": max_length, "batch_size": 1, "num_beams": 1}
    if sampling.temperature is not None:
        options["do_sample"] = sampling.temperature > 0
        if sampling.temperature > 0:
            options["temperature"] = sampling.temperature
    for name in ("top_k", "top_p", "repetition_penalty"):
        if (value := getattr(sampling, name)) is not None:
            options[name] = value
    if sampling.seed is not None:
        options["random_seed"] = sampling.seed
    return options


def _read_config(artifact: Artifact) -> _Config:
    """Read `genai_config.json`, and hold every file that it leads to against the artifact's list."""
    raw = artifact.read_json("genai_config.json")
    try:
        config = msgspec.convert(raw, _Config)
    except msgspec.ValidationError as error:
        raise ModelError(f"genai_config.json: {error}") from error
    for path in _file_names(raw):
        artifact.check(path)
    graph = artifact.read(config.model.decoder.filename, MAX_GRAPH_BYTES)
    for path in external_files(graph):
        artifact.check(path)
    return config


def _file_names(value: Any, key: str = "") -> list[str]:
    """Return every text under a key that names a file or a library, at any depth."""
    if isinstance(value, dict):
        return [name for inner, item in value.items() for name in _file_names(item, inner)]
    if isinstance(value, list):
        return [name for item in value for name in _file_names(item, key)]
    suspect = key.endswith(("filename", "path", "library")) or key == "adapter_filename"
    return [value] if suspect and isinstance(value, str) else []


def _runtime_config(artifact: Artifact, threads: int) -> og.Config:
    config = og.Config(str(artifact.folder))
    config.clear_providers()
    session = {"intra_op_num_threads": threads, "inter_op_num_threads": 1, "session.intra_op.allow_spinning": "0"}
    config.overlay(msgspec.json.encode({"model": {"decoder": {"session_options": session}}}).decode())
    return config
