"""The graphs of an encoder-decoder, as Optimum and transformers.js lay them out: a text read once, then a token a step.

`encoder_model.onnx` goes with `decoder_model_merged.onnx`, or with `decoder_model.onnx` (the first step) and
`decoder_with_past_model.onnx` (the others); without the last the whole answer is computed again at each step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.artifact import Artifact
from models.backends.face import Backend, Tensors
from models.errors import ModelError

Open = Callable[[str], Backend]
"""Opens one of the artifact's graphs by its path."""

_FOLDERS: Final = ("", "onnx/")
_ENCODER: Final = re.compile(r"(?:onnx/)?encoder_model(|_.+)\.onnx")
"""An encoder's name, with what exporters put behind it for a precision."""
_PAST: Final = "past_key_values"
_PRESENT: Final = "present"
_SWITCH: Final = "use_cache_branch"


class Layout(msgspec.Struct, frozen=True):
    """Paths of the graphs; `later` is empty where one graph does every step."""

    encoder: str
    decoder: str
    later: str = ""


class Reading(msgspec.Struct):
    """A text that the encoder has read, and the cache of what has been written about it."""

    states: NDArray[Any]
    mask: NDArray[Any]
    cache: Tensors = {}


class Graphs:
    """An encoder-decoder, opened; every call raises ModelError."""

    def __init__(self, layout: Layout, open_graph: Open) -> None:
        self._encoder = open_graph(layout.encoder)
        self._decoder = open_graph(layout.decoder)
        self._later = open_graph(layout.later) if layout.later else self._decoder
        self._types = {spec.name: spec.dtype for graph in self._all() for spec in graph.inputs}
        self._merged = any(spec.name == _SWITCH for spec in self._decoder.inputs)
        self._cached = self._merged or self._later is not self._decoder
        self.fallbacks: Sequence[str] = [note for graph in self._all() for note in graph.fallbacks]

    def read(self, tokens: Sequence[int]) -> Reading:
        """Run the encoder over a text."""
        ids = np.asarray([tokens], dtype=np.int64)
        mask = np.ones_like(ids)
        results = self._run(self._encoder, {"input_ids": ids, "attention_mask": mask})
        states = results.get("last_hidden_state", next(iter(results.values())))
        return Reading(states, mask)

    def step(self, reading: Reading, written: Sequence[int]) -> NDArray[Any]:
        """Return the scores of the token that follows `written`, whose last one alone is new to the cache."""
        first = not reading.cache
        graph = self._decoder if first else self._later
        tokens = written[-1:] if self._cached and not first else written
        feeds: Tensors = {
            "input_ids": np.asarray([tokens], dtype=np.int64),
            "encoder_attention_mask": reading.mask,
            "encoder_hidden_states": reading.states,
            _SWITCH: np.asarray([not first]),
        }
        results = self._run(graph, feeds | (self._empty() if first else reading.cache))
        if self._cached:
            self._keep(reading, results, first=first)
        scores: NDArray[Any] = results["logits"][0, -1]
        return scores

    def close(self) -> None:
        """Free the graphs."""
        for graph in self._all():
            graph.close()

    def _all(self) -> list[Backend]:
        graphs = [self._encoder, self._decoder]
        return graphs if self._later is self._decoder else [*graphs, self._later]

    def _run(self, graph: Backend, feeds: Mapping[str, NDArray[Any]]) -> Tensors:
        """Run a graph on what it asks for, in its own types."""
        missing = [spec.name for spec in graph.inputs if spec.name not in feeds]
        if missing:
            raise ModelError(f"the graph asks for {missing[0]!r}, which an encoder-decoder has not")
        given = {spec.name: feeds[spec.name].astype(spec.dtype, copy=False) for spec in graph.inputs}
        results = graph.run(given)
        if graph is not self._encoder and "logits" not in results:
            raise ModelError("the decoder's graph has no output 'logits'")
        return results

    def _empty(self) -> Tensors:
        """Return a cache of no tokens, which the merged graph wants to see even at its first step."""
        if not self._merged:
            return {}
        pasts = [spec for spec in self._decoder.inputs if spec.name.startswith(_PAST)]
        # Batch and length are the free sizes; heads and their width are the model's.
        return {spec.name: np.zeros(_empty_shape(spec.shape), spec.dtype) for spec in pasts}

    def _keep(self, reading: Reading, results: Tensors, *, first: bool) -> None:
        """Keep the cache; the text's own part of it is computed by the first step alone."""
        for name, values in results.items():
            if name.startswith(_PRESENT) and (first or ".encoder." not in name):
                reading.cache[name.replace(_PRESENT, _PAST, 1)] = values


def _empty_shape(shape: Sequence[int | None]) -> list[int]:
    if len(shape) != 4 or shape[1] is None or shape[3] is None:
        raise ModelError(f"the cache has the shape {list(shape)}; expected batch, heads, length, width")
    return [1, shape[1], 0, shape[3]]


def _kinds(artifact: Artifact) -> list[str]:
    return sorted({found[1] for path in artifact.files if (found := _ENCODER.fullmatch(path))})


def find_layout(artifact: Artifact) -> Layout:
    """Return where the graphs of an artifact lie; raises ModelError."""
    for kind in _kinds(artifact):
        for folder in _FOLDERS:
            encoder, merged, plain, later = (
                f"{folder}{name}{kind}.onnx"
                for name in ("encoder_model", "decoder_model_merged", "decoder_model", "decoder_with_past_model")
            )
            if encoder in artifact.files and merged in artifact.files:
                return Layout(encoder, merged)
            if encoder in artifact.files and plain in artifact.files:
                return Layout(encoder, plain, later if later in artifact.files else "")
    raise ModelError("the artifact needs encoder_model.onnx with decoder_model_merged.onnx or decoder_model.onnx")
