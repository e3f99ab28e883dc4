"""image-classification: an image, or base64 images, into labels with scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from models.artifact import Artifact
from models.backends.face import Backend, Tensors
from models.manifest import Manifest
from models.request import Request
from models.tasks.pictures import PictureInput, read_pictures
from models.tasks.task import (
    Prepared,
    TokenlessTask,
    load_labels,
    parse_ranking,
    render_ranked,
    run_alike,
)

DEFAULT_TOP_K: Final = 5
_PARAMETERS: Final = frozenset({"top_k", "function_to_apply"})


class ImageClassification(TokenlessTask):
    """Pixels into the graph; `logits`, or its first output, holds a value for each class."""

    def __init__(self, artifact: Artifact, backend: Backend) -> None:
        config = artifact.read_json("config.json")
        self._backend = backend
        self._input = PictureInput(list(backend.inputs), artifact.read_json("preprocessor_config.json"))
        self._labels = load_labels(config)
        names = [spec.name for spec in backend.outputs]
        self._output = "logits" if "logits" in names else names[0]
        classes = backend.outputs[names.index(self._output)].shape[-1:] or (None,)
        single = (len(self._labels) or classes[0] or 2) == 1
        multi = config.get("problem_type") == "multi_label_classification"
        self._function = "sigmoid" if multi or single else "softmax"

    def prepare(self, request: Request) -> Prepared:
        """Decode the images; raises RequestError."""
        pictures = read_pictures(request, _PARAMETERS)
        options = parse_ranking(pictures.parameters, DEFAULT_TOP_K, self._function)
        items = [self._input.prepare(data, field)[0] for field, data in pictures.files]
        return Prepared(items=items, many=pictures.many, options=options)

    def run(self, items: Sequence[Tensors]) -> list[Tensors]:
        """Answer a batch of images; those of another size than the one before run apart from it."""
        return run_alike(self._backend, items)

    def interpret(self, prepared: Prepared, results: Sequence[Tensors]) -> bytes:
        """Return the labels of each image, best first."""
        return render_ranked(prepared, [result[self._output] for result in results], self._labels)


def build(artifact: Artifact, backend: Backend, manifest: Manifest) -> ImageClassification:
    """Make the task for an opened graph."""
    del manifest
    return ImageClassification(artifact, backend)
