"""image-segmentation: an image, or base64 images, into labelled masks, each a PNG of 0 and 255 at the image's size.

Read are the outputs of SegFormer's kin (a score for each class and pixel) and of DETR's and MaskFormer's (queries, each
with a class and a mask), with the subtasks of the Hugging Face pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec

from models.artifact import Artifact
from models.backends.face import Backend, Tensors
from models.errors import ModelError, RequestError
from models.images import encode_mask
from models.manifest import Manifest
from models.request import Request
from models.tasks.pictures import PictureInput, read_pictures
from models.tasks.segments import (
    Limits,
    Segment,
    best_classes,
    instances,
    panoptic,
    query_scores,
    resize_bilinear,
    semantic,
)
from models.tasks.task import (
    Prepared,
    TokenlessTask,
    check_finite,
    load_labels,
    parse_share,
    render_results,
    run_alike,
)

_PARAMETERS: Final = frozenset({"subtask"})
_QUERY_PARAMETERS: Final = _PARAMETERS | {"threshold", "mask_threshold", "overlap_mask_area_threshold"}
_QUERY_OUTPUTS: Final = (("logits", "pred_masks"), ("class_queries_logits", "masks_queries_logits"))
_MASK2FORMER_SIDE: Final = 384
"""Pixels to which Mask2Former's processor brings every mask before it looks at them."""

MAX_PIXELS: Final = 16 << 20
"""Of an image to segment; each mask of it has as many bytes before it is packed."""


class _Options(msgspec.Struct, frozen=True):
    subtask: str
    limits: Limits
    sizes: list[tuple[int, int]]


class ImageSegmentation(TokenlessTask):
    """Pixels into the graph; what its outputs mean is told by their names."""

    def __init__(self, artifact: Artifact, backend: Backend) -> None:
        processing = artifact.read_json("preprocessor_config.json")
        config = artifact.read_json("config.json")
        self._backend = backend
        self._input = PictureInput(list(backend.inputs), processing)
        self._labels = load_labels(config)
        names = [spec.name for spec in backend.outputs]
        self._queries = next((pair for pair in _QUERY_OUTPUTS if set(pair) <= set(names)), None)
        self._output = "logits" if "logits" in names else names[0]
        family = str(processing.get("image_processor_type") or config.get("model_type") or "").lower()
        if "oneformer" in family:
            raise ModelError("image-segmentation: OneFormer's texts are not made here")
        self._mask2former = family.startswith("mask2former")
        # DETR's own instances are made like its panoptic segments.
        self._drawn = self._queries is not None and self._queries != _QUERY_OUTPUTS[0]

    def prepare(self, request: Request) -> Prepared:
        """Decode the images; raises RequestError."""
        asked = read_pictures(request, _PARAMETERS if self._queries is None else _QUERY_PARAMETERS)
        subtask = self._parse_subtask(asked.parameters)
        limits = Limits(
            parse_share(asked.parameters, "threshold", 0.9),
            parse_share(asked.parameters, "mask_threshold", 0.5),
            parse_share(asked.parameters, "overlap_mask_area_threshold", 0.5),
        )
        ready = [self._input.prepare(data, field) for field, data in asked.files]
        for (field, _), (_, picture) in zip(asked.files, ready, strict=True):
            if picture.size[0] * picture.size[1] > MAX_PIXELS:
                message = f"{field}: {picture.size[1]} x {picture.size[0]} pixels are over {MAX_PIXELS} for masks"
                raise RequestError("too_large", message)
        options = _Options(subtask, limits, [picture.size for _, picture in ready])
        return Prepared(items=[item for item, _ in ready], many=asked.many, options=options)

    def run(self, items: Sequence[Tensors]) -> list[Tensors]:
        """Answer a batch of images; those of another size than the one before run apart from it."""
        return run_alike(self._backend, items)

    def interpret(self, prepared: Prepared, results: Sequence[Tensors]) -> bytes:
        """Return the masks of each image with their labels; semantic ones have no score (null)."""
        options: _Options = prepared.options
        outputs = [
            [self._render(segment) for segment in self._segments(result, size, options)]
            for result, size in zip(results, options.sizes, strict=True)
        ]
        return render_results(prepared, outputs)

    def _segments(self, result: Tensors, size: tuple[int, int], options: _Options) -> Iterator[Segment]:
        if self._queries is None:
            return semantic(best_classes(check_finite(result[self._output]), *size))
        logits, masks = (check_finite(result[name]) for name in self._queries)
        if self._mask2former:
            masks = resize_bilinear(masks, _MASK2FORMER_SIDE, _MASK2FORMER_SIDE)
        if options.subtask == "semantic":
            return semantic(best_classes(query_scores(logits, masks), *size))
        if options.subtask == "instance" and self._drawn:
            return instances(logits, masks, size, options.limits.threshold)
        return panoptic(logits, masks, size, options.limits)

    def _render(self, segment: Segment) -> dict[str, object]:
        label = self._labels.get(segment.number, f"LABEL_{segment.number}")
        return {"label": label, "score": segment.score, "mask": encode_mask(segment.mask)}

    def _parse_subtask(self, parameters: Mapping[str, Any]) -> str:
        able = ("semantic",) if self._queries is None else ("panoptic", "instance", "semantic")
        value = parameters.get("subtask", able[0])
        if value not in able:
            message = f"parameters.subtask: expected {' or '.join(able)}, got {value!r:.40}"
            raise RequestError("bad_request", message)
        return str(value)


def build(artifact: Artifact, backend: Backend, manifest: Manifest) -> ImageSegmentation:
    """Make the task for an opened graph."""
    del manifest
    return ImageSegmentation(artifact, backend)
