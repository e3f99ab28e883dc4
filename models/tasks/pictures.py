"""What the tasks that look at images share: reading a request's images, and feeding them to a graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.backends.face import Tensors, TensorSpec
from models.body import IMAGES
from models.errors import ModelError, RequestError
from models.image_steps import ImageSteps, parse_steps
from models.images import Picture, decode_base64, load_picture
from models.request import Request
from models.tasks.task import check_fields, parse_question

TAKES: Final = "image/jpeg, image/png, or application/json with `inputs` an image in base64"


class Pictures(msgspec.Struct, frozen=True):
    """A request's images, as (field, bytes); `many` is whether a list was sent."""

    files: list[tuple[str, bytes]]
    many: bool
    parameters: dict[str, Any]


def read_pictures(request: Request, known: frozenset[str]) -> Pictures:
    """Return the images of a request whose parameters are among `known`; raises RequestError."""
    if request.content_type in IMAGES:
        return Pictures([("body", request.body)], many=False, parameters={})
    question = parse_question(request, known, TAKES)
    many = isinstance(question.inputs, list)
    texts = check_fields(question.inputs if many else [question.inputs], str, "an image in base64")
    files = [(field, decode_base64(text, field)) for field, text in texts]
    return Pictures(files, many=many, parameters=question.parameters)


class PictureInput:
    """The graph's input for pixels, and the mask of those that are no padding where it has an input for that."""

    def __init__(self, inputs: list[TensorSpec], config: Mapping[str, object]) -> None:
        self._pixels = pixel_input(inputs)
        self._mask = next((spec for spec in inputs if spec.name == "pixel_mask"), None)
        if unknown := [spec.name for spec in inputs if spec not in {self._pixels, self._mask}]:
            raise ModelError(f"there is nothing to give to the graph's input {unknown[0]!r}")
        self._last, channels = channels_of(self._pixels)
        height, width = self._pixels.shape[1:3] if self._last else self._pixels.shape[2:]
        self.height, self.width = height, width
        self.steps: ImageSteps = parse_steps(config, channels)

    def prepare(self, data: bytes, field: str) -> tuple[Tensors, Picture]:
        """Return an image as the graph takes it, without a batch axis; raises RequestError."""
        picture = load_picture(data, self.steps, field, channels_last=self._last)
        wanted, given = self._pixels.shape[1:], picture.values.shape
        if any(size is not None and size != got for size, got in zip(wanted, given, strict=True)):
            message = f"{field}: the model takes {_shape(wanted)}, the image gives {_shape(given)}"
            raise RequestError("bad_request", message)
        item = {self._pixels.name: _as_type(picture.values, self._pixels.dtype)}
        if self._mask is not None:
            item[self._mask.name] = self._mask_of(picture, self._mask)
        return item, picture

    def _mask_of(self, picture: Picture, spec: TensorSpec) -> NDArray[Any]:
        height, width = picture.values.shape[:2] if self._last else picture.values.shape[1:]
        if spec.shape[1] is not None and spec.shape[2] is not None and spec.shape[1:] != (height, width):
            return np.ones(spec.shape[1:], spec.dtype)  # type: ignore[arg-type]
        mask = np.zeros((height, width), spec.dtype)
        mask[: picture.scaled[0], : picture.scaled[1]] = 1
        return mask


def pixel_input(inputs: list[TensorSpec]) -> TensorSpec:
    """Return the input that takes pixels: `pixel_values`, or the only one of four dimensions; raises ModelError."""
    named = [spec for spec in inputs if spec.name == "pixel_values"]
    found = named or [spec for spec in inputs if len(spec.shape) == 4] or inputs[:1]
    if len(found) != 1:
        raise ModelError(f"{len(found)} of the graph's inputs could take images")
    return found[0]


def channels_of(spec: TensorSpec) -> tuple[bool, int]:
    """Return (whether channels come last, their number) of an input for images; raises ModelError."""
    if len(spec.shape) != 4:
        raise ModelError(f"input {spec.name} of {len(spec.shape)} dimensions takes no images")
    for last, size in ((False, spec.shape[1]), (True, spec.shape[3])):
        if size in {1, 3}:
            return last, size
    return False, 3


def _as_type(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Return the values in the graph's type, rounded and held within it where it counts in whole numbers."""
    wanted = np.dtype(dtype)
    if wanted.kind not in "iu":
        return values.astype(wanted, copy=False)
    bounds = np.iinfo(wanted)
    return np.clip(np.rint(values), bounds.min, bounds.max).astype(wanted)


def _shape(sizes: tuple[int | None, ...]) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in sizes) + "]"
