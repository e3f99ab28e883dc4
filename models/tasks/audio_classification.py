"""audio-classification: a sound, or base64 WAV files, into labels with scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from models.artifact import Artifact
from models.backends.face import Backend, Tensors
from models.manifest import Manifest
from models.request import Request
from models.tasks.task import (
    Prepared,
    TokenlessTask,
    load_labels,
    parse_function,
    parse_top_k,
    rank,
    render_results,
    run_alike,
    scores_of,
)
from models.tasks.waves import WaveInput, read_waves

_PARAMETERS: Final = frozenset({"top_k", "function_to_apply"})


class _Options(msgspec.Struct, frozen=True):
    top_k: int | None
    function: str


class AudioClassification(TokenlessTask):
    """Samples, or their spectrum, into the graph; `logits`, or its first output, holds a value for each class."""

    def __init__(self, artifact: Artifact, backend: Backend) -> None:
        config = artifact.read_json("config.json")
        self._backend = backend
        self._input = WaveInput(list(backend.inputs), artifact.read_json("preprocessor_config.json"), config)
        self._labels = load_labels(config)
        names = [spec.name for spec in backend.outputs]
        self._output = "logits" if "logits" in names else names[0]

    def prepare(self, request: Request) -> Prepared:
        """Read the sounds; raises RequestError."""
        asked = read_waves(request, _PARAMETERS, self._input.rate)
        options = _Options(parse_top_k(asked.parameters, None), parse_function(asked.parameters, "softmax"))
        items = [self._input.prepare(samples, field) for field, samples in asked.sounds]
        return Prepared(items=items, many=asked.many, options=options)

    def run(self, items: Sequence[Tensors]) -> list[Tensors]:
        """Answer a batch of sounds; those of another length than the one before run apart from it."""
        return run_alike(self._backend, items)

    def interpret(self, prepared: Prepared, results: Sequence[Tensors]) -> bytes:
        """Return the labels of each sound, best first."""
        options: _Options = prepared.options
        outputs = [
            rank(scores_of(result[self._output], options.function), self._labels, options.top_k) for result in results
        ]
        return render_results(prepared, outputs)


def build(artifact: Artifact, backend: Backend, manifest: Manifest) -> AudioClassification:
    """Make the task for an opened graph."""
    del manifest
    return AudioClassification(artifact, backend)
