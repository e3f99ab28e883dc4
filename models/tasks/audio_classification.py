"""audio-classification: a sound, or base64 WAV files, into labels with scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from models.artifact import Artifact
from models.backends.face import Backend, Tensors
from models.manifest import Manifest
from models.request import Request
from models.tasks.task import (
    Prepared,
    TokenlessTask,
    load_labels,
    parse_ranking,
    render_ranked,
    run_alike,
)
from models.tasks.waves import WaveInput, read_waves

_PARAMETERS: Final = frozenset({"top_k", "function_to_apply"})


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
        options = parse_ranking(asked.parameters, None, "softmax")
        items = [self._input.prepare(samples, field) for field, samples in asked.sounds]
        return Prepared(items=items, many=asked.many, options=options)

    def run(self, items: Sequence[Tensors]) -> list[Tensors]:
        """Answer a batch of sounds; those of another length than the one before run apart from it."""
        return run_alike(self._backend, items)

    def interpret(self, prepared: Prepared, results: Sequence[Tensors]) -> bytes:
        """Return the labels of each sound, best first."""
        return render_ranked(prepared, [result[self._output] for result in results], self._labels)


def build(artifact: Artifact, backend: Backend, manifest: Manifest) -> AudioClassification:
    """Make the task for an opened graph."""
    del manifest
    return AudioClassification(artifact, backend)
