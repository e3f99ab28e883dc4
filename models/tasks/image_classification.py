"""image-classification: an image, or base64 images, into labels with scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from models.artifact import Artifact
from models.backends.face import Backend, Tensors, TensorSpec
from models.body import IMAGES
from models.errors import ModelError, RequestError
from models.images import ImageSteps, decode_base64, load_image, parse_steps
from models.manifest import Manifest
from models.request import Request
from models.tasks.task import (
    Prepared,
    TokenlessTask,
    check_fields,
    default_function,
    load_labels,
    parse_function,
    parse_question,
    parse_top_k,
    rank,
    render_results,
    run_stacked,
    scores_of,
)

DEFAULT_TOP_K: Final = 5
_PARAMETERS: Final = frozenset({"top_k", "function_to_apply"})


class _Options(msgspec.Struct, frozen=True):
    top_k: int | None
    function: str


class ImageClassification(TokenlessTask):
    """Pixels into the graph's only input; its first output holds the logits."""

    def __init__(self, artifact: Artifact, backend: Backend) -> None:
        config = artifact.read_json("config.json")
        self._backend = backend
        self._input = backend.inputs[0]
        self._last, channels = channels_of(self._input)
        self._steps: ImageSteps = parse_steps(artifact.read_json("preprocessor_config.json"), channels)
        self._labels = load_labels(config)
        self._function = default_function(config, len(self._labels) or 2)
        self._output = backend.outputs[0].name

    def prepare(self, request: Request) -> Prepared:
        """Decode the images; raises RequestError."""
        if request.content_type in IMAGES:
            return Prepared(items=[self._item(request.body, "body")], options=self._options({}))
        question = parse_question(request, _PARAMETERS)
        options = self._options(question.parameters)
        many = isinstance(question.inputs, list)
        texts = check_fields(question.inputs if many else [question.inputs], str, "an image in base64")
        items = [self._item(decode_base64(text, field), field) for field, text in texts]
        return Prepared(items=items, many=many, options=options)

    def run(self, items: Sequence[Tensors]) -> list[Tensors]:
        """Answer a batch of images of one size."""
        return run_stacked(self._backend, items)

    def interpret(self, prepared: Prepared, results: Sequence[Tensors]) -> bytes:
        """Return the labels of each image, best first."""
        options: _Options = prepared.options
        outputs = [
            rank(scores_of(result[self._output], options.function), self._labels, options.top_k) for result in results
        ]
        return render_results(prepared, outputs)

    def _options(self, parameters: dict[str, object]) -> _Options:
        return _Options(parse_top_k(parameters, DEFAULT_TOP_K), parse_function(parameters, self._function))

    def _item(self, data: bytes, field: str) -> Tensors:
        pixels = load_image(data, self._steps, field)
        pixels = pixels.transpose(1, 2, 0) if self._last else pixels
        wanted = self._input.shape[1:]
        if any(size is not None and size != got for size, got in zip(wanted, pixels.shape, strict=True)):
            message = f"{field}: the model takes {list(wanted)}, the image gives {list(pixels.shape)}"
            raise RequestError("bad_request", message)
        return {self._input.name: pixels.astype(self._input.dtype, copy=False)}


def channels_of(spec: TensorSpec) -> tuple[bool, int]:
    """Return (whether channels come last, their number) of an input for images; raises ModelError."""
    if len(spec.shape) != 4:
        raise ModelError(f"input {spec.name} of {len(spec.shape)} dimensions takes no images")
    for last, size in ((False, spec.shape[1]), (True, spec.shape[3])):
        if size in {1, 3}:
            return last, size
    return False, 3


def build(artifact: Artifact, backend: Backend, manifest: Manifest) -> ImageClassification:
    """Make the task for an opened graph."""
    del manifest
    return ImageClassification(artifact, backend)
