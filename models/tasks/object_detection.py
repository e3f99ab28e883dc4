"""object-detection: an image, or base64 images, into labels with scores and boxes in pixels.

Read are the outputs of DETR's kin as the Hugging Face pipeline reads them, of YOLO graphs with and without suppression
inside, and of TensorFlow's detection graphs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.artifact import Artifact
from models.backends.face import Backend, Tensors
from models.errors import ModelError, RequestError
from models.images import Picture
from models.manifest import Manifest
from models.request import Request
from models.tasks.boxes import corners, suppress
from models.tasks.pictures import PictureInput, channels_of, pixel_input, read_pictures
from models.tasks.task import (
    Prepared,
    TokenlessTask,
    check_finite,
    load_labels,
    parse_share,
    parse_whole,
    render_results,
    run_alike,
)

DEFAULT_THRESHOLD: Final = 0.5
DEFAULT_IOU: Final = 0.45
DEFAULT_MOST: Final = 300
_PARAMETERS: Final = frozenset({"threshold"})
_RAW_PARAMETERS: Final = _PARAMETERS | {"iou_threshold", "max_detections"}
_TOP_100: Final = ("conditional", "deformable", "dab")
_TOP_QUERIES: Final = ("rtdetr", "rt_detr", "d_fine", "dfine")
_LARGEST_SHARE: Final = 2.0
"""Coordinates up to here are parts of the image, above it pixels."""


class _Options(msgspec.Struct, frozen=True):
    threshold: float
    iou_threshold: float
    most: int
    pictures: list[Picture]


class Found(NamedTuple):
    """What a graph found in one image: (xmin, ymin, xmax, ymax) in its pixels, best first or in the graph's order."""

    boxes: NDArray[np.float32]
    scores: NDArray[Any]
    classes: NDArray[Any]


class ObjectDetection(TokenlessTask):
    """Pixels into the graph; what its outputs mean is told by their names and shapes."""

    def __init__(self, artifact: Artifact, backend: Backend) -> None:
        config = artifact.read_json("config.json")
        processing = artifact.read_json("preprocessor_config.json")
        self._backend = backend
        self._labels = load_labels(config)
        self._queries = {"logits", "pred_boxes"} <= {spec.name for spec in backend.outputs}
        self._family = str(processing.get("image_processor_type") or config.get("model_type") or "").lower()
        if not self._queries and len(backend.outputs) == 2:
            raise ModelError("object-detection: two outputs that are not logits and pred_boxes cannot be read")
        if not self._queries and "size" not in processing:
            processing = {**_assumed(backend), **processing}
        self._input = PictureInput(list(backend.inputs), processing)

    def prepare(self, request: Request) -> Prepared:
        """Decode the images; raises RequestError."""
        asked = read_pictures(request, _PARAMETERS if self._queries else _RAW_PARAMETERS)
        ready = [self._input.prepare(data, field) for field, data in asked.files]
        options = _Options(
            threshold=parse_share(asked.parameters, "threshold", DEFAULT_THRESHOLD),
            iou_threshold=parse_share(asked.parameters, "iou_threshold", DEFAULT_IOU),
            most=parse_whole(asked.parameters, "max_detections", DEFAULT_MOST),
            pictures=[picture for _, picture in ready],
        )
        return Prepared(items=[item for item, _ in ready], many=asked.many, options=options)

    def run(self, items: Sequence[Tensors]) -> list[Tensors]:
        """Answer a batch of images; those of another size than the one before run apart from it."""
        return run_alike(self._backend, items)

    def interpret(self, prepared: Prepared, results: Sequence[Tensors]) -> bytes:
        """Return what was found in each image."""
        options: _Options = prepared.options
        outputs = [
            self._render(self._find(result, picture, options))
            for result, picture in zip(results, options.pictures, strict=True)
        ]
        return render_results(prepared, outputs)

    def _find(self, result: Tensors, picture: Picture, options: _Options) -> Found:
        for values in result.values():
            check_finite(values)
        if self._queries:
            return _from_queries(result["logits"], result["pred_boxes"], picture, options.threshold, self._family)
        if len(result) >= 3:
            return _from_tensorflow(result, picture, options)
        return self._from_yolo(next(iter(result.values())), picture, options)

    def _from_yolo(self, values: NDArray[Any], picture: Picture, options: _Options) -> Found:
        """Read one output of [4 + classes, N], [N, 5 + classes] or, already suppressed, [N, 6]."""
        if values.ndim != 2:
            raise RequestError("model_failed", f"an output of the shape {list(values.shape)} holds no boxes")
        form = _yolo_form(values.shape, len(self._labels))
        rows = values.T if form == "columns" else values
        if form == "suppressed":
            found = Found(rows[:, :4].astype(np.float32), rows[:, 4], rows[:, 5].astype(np.int64))
        else:
            found = _best_classes(rows, 5 if form == "objectness" else 4)
        found = _above(found, options.threshold)
        boxes = _undone(_as_pixels(found.boxes, values, form, picture), picture)
        if form == "suppressed":
            return Found(boxes[: options.most], found.scores[: options.most], found.classes[: options.most])
        return _suppressed(Found(boxes, found.scores, found.classes), options)

    def _render(self, found: Found) -> list[dict[str, object]]:
        names = ("xmin", "ymin", "xmax", "ymax")
        return [
            {
                "label": self._labels.get(int(number), f"LABEL_{int(number)}"),
                "score": float(score),
                "box": dict(zip(names, map(int, box), strict=True)),
            }
            for box, score, number in zip(found.boxes.tolist(), found.scores, found.classes, strict=True)
        ]


def _from_queries(
    logits: NDArray[Any], pred_boxes: NDArray[Any], picture: Picture, threshold: float, family: str
) -> Found:
    """Read DETR's outputs: [queries, classes] and boxes as parts of the image, as its processor does."""
    height, width = picture.size
    boxes = corners(pred_boxes) * np.asarray([width, height, width, height], np.float32)
    logits = logits.astype(np.float32, copy=False)
    plain = family.replace("-", "_")
    if any(word in plain for word in _TOP_100 + _TOP_QUERIES):
        most = 100 if any(word in plain for word in _TOP_100) else logits.shape[0]
        scores = (1 / (1 + np.exp(-logits.astype(np.float64)))).ravel()
        best = np.argsort(-scores, kind="stable")[:most]
        found = Found(boxes[best // logits.shape[1]], scores[best], best % logits.shape[1])
    else:
        # The last class stands for no object.
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares = (powers / powers.sum(axis=1, keepdims=True))[:, :-1]
        classes = shares.argmax(axis=1)
        found = Found(boxes, np.take_along_axis(shares, classes[:, None], axis=1)[:, 0], classes)
    return _above(found, threshold)


def _from_tensorflow(result: Tensors, picture: Picture, options: _Options) -> Found:
    """Read boxes as (ymin, xmin, ymax, xmax) in parts of the image, with classes, scores and how many there are."""
    boxes = next((values for values in result.values() if values.ndim == 2 and values.shape[1] == 4), None)
    flat = {name: values for name, values in result.items() if values.ndim == 1}
    if boxes is None or len(flat) != 2:
        raise RequestError("model_failed", "the graph's outputs are not those of a detector")
    classes, scores = _classes_and_scores(flat)
    counts = [int(values) for values in result.values() if values.ndim == 0]
    count = max(0, min([*counts, len(scores)]))
    edges = boxes[:count, [1, 0, 3, 2]].astype(np.float32)
    found = _above(Found(edges, scores[:count], classes[:count].astype(np.int64)), options.threshold)
    most = options.most
    return Found(_undone(_times_input(found.boxes, picture), picture)[:most], found.scores[:most], found.classes[:most])


def _classes_and_scores(flat: Mapping[str, NDArray[Any]]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Tell classes from scores by their names, else by being whole numbers, else by the usual order."""
    (first, one), (second, two) = flat.items()
    if "score" in first.lower() or "class" in second.lower():
        return two, one
    named = "score" in second.lower() or "class" in first.lower()
    if not named and (two == np.rint(two)).all() and not (one == np.rint(one)).all():
        return two, one
    return one, two


def _yolo_form(shape: tuple[int, ...], classes: int) -> str:
    """Tell which way round a YOLO graph gives its boxes; the number of labels decides first, then the shape."""
    rows, columns = shape
    if classes and rows == 4 + classes:
        return "columns"
    if classes and columns == 5 + classes:
        return "objectness"
    if classes and columns == 4 + classes:
        return "rows"
    if columns == 6:
        return "suppressed"
    return "columns" if rows < columns else "objectness"


def _best_classes(rows: NDArray[Any], head: int) -> Found:
    """Return each row's box and best class; with a head of 5 its score counts by how surely there is an object."""
    if rows.shape[1] <= head:
        raise RequestError("model_failed", f"rows of {rows.shape[1]} numbers hold no classes")
    shares = rows[:, head:]
    classes = shares.argmax(axis=1)
    scores = shares[np.arange(len(rows)), classes]
    return Found(corners(rows[:, :4]), scores * rows[:, 4] if head == 5 else scores, classes)


def _above(found: Found, threshold: float) -> Found:
    kept = found.scores > threshold
    return Found(found.boxes[kept], found.scores[kept], found.classes[kept])


def _as_pixels(boxes: NDArray[np.float32], values: NDArray[Any], form: str, picture: Picture) -> NDArray[np.float32]:
    """Return boxes in pixels of the graph's input, where some exports give parts of it."""
    whole = values[:4] if form == "columns" else values[:, :4]
    if not whole.size or whole.max() > _LARGEST_SHARE:
        return boxes
    return _times_input(boxes, picture)


def _times_input(boxes: NDArray[np.float32], picture: Picture) -> NDArray[np.float32]:
    height, width = picture.values.shape[:2] if picture.channels_last else picture.values.shape[1:]
    return boxes * np.asarray([width, height, width, height], np.float32)


def _undone(boxes: NDArray[np.float32], picture: Picture) -> NDArray[np.float32]:
    """Return boxes in pixels of the image itself, out of the letterbox, scaling or cut that the graph saw."""
    top, left = picture.at
    down, across = picture.size[0] / picture.scaled[0], picture.size[1] / picture.scaled[1]
    moved = boxes - np.asarray([left, top, left, top], np.float32)
    return _clipped(moved * np.asarray([across, down, across, down], np.float32), picture)


def _clipped(boxes: NDArray[np.float32], picture: Picture) -> NDArray[np.float32]:
    height, width = picture.size
    return np.clip(boxes, 0, np.asarray([width, height, width, height], np.float32))


def _suppressed(found: Found, options: _Options) -> Found:
    kept = suppress(found.boxes, found.scores, found.classes, options.iou_threshold, options.most)
    return Found(found.boxes[kept], found.scores[kept], found.classes[kept])


def _assumed(backend: Backend) -> dict[str, object]:
    """Return how images are made ready for a detector whose folder does not say: as those who train them do."""
    spec = pixel_input(list(backend.inputs))
    last, _ = channels_of(spec)
    height, width = spec.shape[1:3] if last else spec.shape[2:]
    size = {"height": height or 640, "width": width or 640}
    if len(backend.outputs) < 3:
        return {"size": size, "letterbox": True, "do_normalize": False}
    if spec.dtype == "uint8":
        return {"size": size, "do_rescale": False, "do_normalize": False}
    return {"size": size, "image_mean": 0.5, "image_std": 0.5}


def build(artifact: Artifact, backend: Backend, manifest: Manifest) -> ObjectDetection:
    """Make the task for an opened graph."""
    del manifest
    return ObjectDetection(artifact, backend)
