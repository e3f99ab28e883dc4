"""What a graph is fed while its task answers questions: the examples that static quantisation takes its ranges from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from models.artifact import Artifact
from models.backends.face import Backend, Tensors, TensorSpec
from models.errors import ModelError, RequestError
from models.manifest import Golden, Manifest, Variant
from models.record import answer_alone, golden_request
from models.session import batch_session, open_graph

Feeds = Mapping[str, NDArray[Any]]
"""What a graph was fed once, by input."""


class _Recorder:
    """A backend that keeps what it is fed."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.inputs: Sequence[TensorSpec] = backend.inputs
        self.outputs: Sequence[TensorSpec] = backend.outputs
        self.fallbacks: Sequence[str] = backend.fallbacks
        self.fed: list[Feeds] = []

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Tensors:
        self.fed.append(dict(feeds))
        return self._backend.run(feeds)

    def close(self) -> None:
        self._backend.close()


def record_feeds(folder: Path, manifest: Manifest, variant: Variant, questions: Sequence[Golden]) -> list[Feeds]:
    """Return what a variant's graph is fed for each question; raises ModelError naming one that is not answered."""
    with Artifact(folder, variant.files) as artifact:
        recorder = _Recorder(open_graph(artifact, manifest.format, threads=1))
        session = batch_session(artifact, manifest, recorder)
    try:
        for number, question in enumerate(questions, 1):
            piece = answer_alone(session, golden_request(manifest, question))
            if piece.code:
                raise ModelError(f"sample {number} is not answered: {piece.code}: {piece.message}")
    except RequestError as error:
        raise ModelError(f"a sample is no request: {error.message}") from error
    finally:
        session.close()
    return recorder.fed
