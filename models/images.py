"""Images into the tensors that a model's `preprocessor_config.json` asks for (field names of Hugging Face)."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from models.errors import ModelError, RequestError

MAX_PIXELS: Final = 32 << 20
"""More than the sensors of cameras on boxes give; 96 MiB as RGB."""

_FORMATS: Final = ("JPEG", "PNG")
# Pillow's own check comes in two steps, the first of them a warning; ours stands in its place.
Image.MAX_IMAGE_PIXELS = None
_MAX_SIDE: Final = 4096


class ImageSteps(msgspec.Struct, frozen=True, kw_only=True):
    """How an image becomes a tensor; sizes are (height, width) in pixels, `shortest` scales the shorter side."""

    mode: str
    size: tuple[int, int] | None = None
    shortest: int | None = None
    crop: tuple[int, int] | None = None
    resample: int = 2
    scale: float = 1.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


class _Side(msgspec.Struct):
    height: int | None = None
    width: int | None = None
    shortest_edge: int | None = None


class _Config(msgspec.Struct):
    """The members of `preprocessor_config.json` that are honoured; others are left alone."""

    do_resize: bool = True
    size: int | _Side | None = None
    resample: int = 2
    do_center_crop: bool = False
    crop_size: int | _Side | None = None
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: float | tuple[float, ...] = ()
    image_std: float | tuple[float, ...] = ()


def parse_steps(config: Mapping[str, object], channels: int) -> ImageSteps:
    """Read `preprocessor_config.json`; raises ModelError for what it does not honour."""
    try:
        read = msgspec.convert(config, _Config)
    except msgspec.ValidationError as error:
        raise ModelError(f"preprocessor_config.json: {error}") from error
    if channels not in {1, 3}:
        raise ModelError(f"images have 1 or 3 channels, not {channels}")
    size, shortest = _sides(read.size) if read.do_resize else (None, None)
    crop, _ = _sides(read.crop_size) if read.do_center_crop else (None, None)
    return ImageSteps(
        mode="L" if channels == 1 else "RGB",
        size=size,
        shortest=shortest,
        crop=crop,
        resample=_resample(read.resample),
        scale=read.rescale_factor if read.do_rescale else 1.0,
        mean=_per_channel(read.image_mean, channels) if read.do_normalize else (),
        std=_per_channel(read.image_std, channels) if read.do_normalize else (),
    )


def _resample(value: int) -> int:
    if value not in list(Image.Resampling):
        raise ModelError(f"preprocessor_config.json: resample {value} is not known")
    return value


def _sides(size: int | _Side | None) -> tuple[tuple[int, int] | None, int | None]:
    """Return ((height, width), None) or (None, shorter side)."""
    if size is None:
        return None, None
    if isinstance(size, int):
        size = _Side(height=size, width=size)
    sides = [side for side in (size.height, size.width, size.shortest_edge) if side is not None]
    if not sides or any(not 0 < side <= _MAX_SIDE for side in sides):
        raise ModelError(f"preprocessor_config.json: a size must lie in 1 to {_MAX_SIDE} pixels")
    if size.height is not None and size.width is not None:
        return (size.height, size.width), None
    return None, sides[0]


def _per_channel(value: float | tuple[float, ...], channels: int) -> tuple[float, ...]:
    values = (value,) if isinstance(value, float) else value
    if len(values) == 1:
        return values * channels
    if values and len(values) != channels:
        raise ModelError(f"preprocessor_config.json: {len(values)} means or deviations for {channels} channels")
    return values


def decode_base64(text: str, field: str) -> bytes:
    """Return the bytes of an image in base64, with or without a `data:` head; raises RequestError."""
    data = text.partition(",")[2] if text.startswith("data:") else text
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError("bad_request", f"{field}: is not an image in base64") from error


def load_image(data: bytes, steps: ImageSteps, field: str) -> NDArray[np.float32]:
    """Decode and prepare an image as [channels, height, width]; raises RequestError."""
    image = _prepare(_decode(data, field, steps.mode), steps)
    values = np.asarray(image, dtype=np.float32)
    values = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
    values = values * np.float32(steps.scale)
    if steps.mean:
        values = values - np.asarray(steps.mean, dtype=np.float32)[:, None, None]
    if steps.std:
        values = values / np.asarray(steps.std, dtype=np.float32)[:, None, None]
    return np.ascontiguousarray(values, dtype=np.float32)


def _decode(data: bytes, field: str, mode: str) -> Image.Image:
    """Decode a JPEG or PNG, its size checked before its pixels, turned as its EXIF says."""
    try:
        image: Any = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Exception as error:  # on hostile bytes Pillow's readers raise whatever they run into
        raise RequestError("bad_request", f"{field}: is not a JPEG or PNG image") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise RequestError("too_large", f"{field}: {width} x {height} pixels are over the limit of {MAX_PIXELS}")
    try:
        return ImageOps.exif_transpose(image).convert(mode)
    except Exception as error:  # as above
        raise RequestError("bad_request", f"{field}: the image is damaged") from error


def _prepare(image: Image.Image, steps: ImageSteps) -> Image.Image:
    if steps.size is not None:
        height, width = steps.size
        image = image.resize((width, height), Image.Resampling(steps.resample))
    elif steps.shortest is not None:
        scale = steps.shortest / min(image.size)
        width, height = (max(1, min(_MAX_SIDE * 4, int(side * scale))) for side in image.size)
        image = image.resize((width, height), Image.Resampling(steps.resample))
    return image if steps.crop is None else _centre(image, steps.crop)


def _centre(image: Image.Image, crop: tuple[int, int]) -> Image.Image:
    """Cut the middle out, with black where the image is smaller."""
    height, width = crop
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
