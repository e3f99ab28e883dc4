"""What a `preprocessor_config.json` asks to be done with an image. Pure: no I/O, no clock.

Names, defaults and rules of rounding are those of the image processors of Hugging Face's transformers 4.57, by the name
of the processor; a file that names none says everything itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, Literal

import msgspec

from models.errors import ModelError

MAX_SIDE: Final = 4096
"""Pixels that a configuration may ask for on one side."""

_FILE: Final = "preprocessor_config.json"
_RESAMPLINGS: Final = range(6)
"""Pillow's numbers: nearest, Lanczos, bilinear, bicubic, box, Hamming."""

Rule = Literal["plain", "detr", "yolos", "maskformer", "within", "letterbox"]


class Scaling(msgspec.Struct, frozen=True, kw_only=True):
    """How large an image becomes, in pixels: exactly `height` x `width`, or by its shorter side, up to `longest`.

    With the rules `within` and `letterbox` height and width are the most that the scaled image may have.
    """

    height: int = 0
    width: int = 0
    shortest: int = 0
    longest: int = 0
    rule: Rule = "plain"
    divisor: int = 0


class ImageSteps(msgspec.Struct, frozen=True, kw_only=True):
    """How an image becomes a tensor: pixel x `factors` + `offsets`, by channel of the graph.

    `crop` and `pad` are (height, width): cut out of the middle, and filled up at the right and bottom with zeros, or,
    for a letterbox, all around with `fill`, a value from 0 to 255.
    """

    channels: int
    scaling: Scaling | None = None
    crop: tuple[int, int] | None = None
    pad: tuple[int, int] | None = None
    fill: int = 0
    resample: int = 2
    reverse_channels: bool = False
    factors: tuple[float, ...]
    offsets: tuple[float, ...]


class _Side(msgspec.Struct):
    height: int | None = None
    width: int | None = None
    shortest_edge: int | None = None
    longest_edge: int | None = None
    max_height: int | None = None
    max_width: int | None = None


_Size = int | tuple[int, int] | _Side
_Numbers = float | tuple[float, ...]


class _Config(msgspec.Struct):
    """The members that are honoured; None is the processor's own default."""

    image_processor_type: str | None = None
    feature_extractor_type: str | None = None
    do_resize: bool | None = None
    size: _Size | None = None
    max_size: int | None = None
    size_divisor: int | None = None
    crop_pct: float | None = None
    resample: int | None = None
    do_center_crop: bool | None = None
    crop_size: _Size | None = None
    do_rescale: bool | None = None
    rescale_factor: float | None = None
    rescale_offset: bool | None = None
    do_normalize: bool | None = None
    image_mean: _Numbers | None = None
    image_std: _Numbers | None = None
    include_top: bool | None = None
    do_flip_channel_order: bool | None = None
    do_pad: bool | None = None
    pad_size: _Side | None = None
    keep_aspect_ratio: bool | None = None
    letterbox: bool = False


_HALF: Final = (0.5, 0.5, 0.5)
_IMAGENET: Final = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLIP: Final = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class _Processor(msgspec.Struct, frozen=True):
    """One image processor: its defaults, whether one number means a square, and how it rounds and crops."""

    size: _Size | None = 224
    mean_std: tuple[tuple[float, ...], tuple[float, ...]] = (_HALF, _HALF)
    resample: int = 2
    square: bool = True
    crop: int = 0
    normalize: bool = True
    rule: Rule = "plain"
    crop_pct: float = 0.0
    kind: Literal["", "convnext", "efficientnet", "levit", "mobilevit", "poolformer"] = ""


_DETR: Final = _Processor(_Side(shortest_edge=800, longest_edge=1333), _IMAGENET, square=False, rule="detr")
_MASKFORMER: Final = msgspec.structs.replace(_DETR, rule="maskformer")
_MOBILENET: Final = _Processor(256, square=False, crop=224)
_BEIT: Final = _Processor(256, resample=3, crop=224)
_BIT: Final = _Processor(224, _CLIP, resample=3, square=False, crop=224)
_RT_DETR: Final = _Processor(640, _IMAGENET, normalize=False, rule="detr")
_PROCESSORS: Final = {
    "": _Processor(None, ((), ())),
    "Beit": _BEIT,
    "Bit": _BIT,
    "CLIP": _BIT,
    "ChineseCLIP": _BIT,
    "ConditionalDetr": _DETR,
    "ConvNext": _Processor(384, square=False, crop_pct=0.875, kind="convnext"),
    "DPT": _Processor(384, resample=3),
    "DeformableDetr": _DETR,
    "DeiT": _BEIT,
    "Detr": _DETR,
    "EfficientNet": _Processor(346, resample=0, kind="efficientnet"),
    "Image": _Processor(None, ((), ())),
    "Levit": _Processor(224, _IMAGENET, 3, square=False, crop=224, kind="levit"),
    "Mask2Former": _MASKFORMER,
    "MaskFormer": _MASKFORMER,
    "MobileNetV1": _MOBILENET,
    "MobileNetV2": _MOBILENET,
    "MobileViT": _Processor(224, ((), ()), square=False, crop=256, kind="mobilevit"),
    "PoolFormer": _Processor(224, _IMAGENET, 3, square=False, crop=224, crop_pct=0.9, kind="poolformer"),
    "Pvt": _Processor(224, _IMAGENET),
    "RTDetr": _RT_DETR,
    "Segformer": _Processor(512, _IMAGENET),
    "Siglip": _Processor(224, resample=3),
    "ViT": _Processor(224),
    "Yolos": msgspec.structs.replace(_DETR, rule="yolos"),
}
_SUFFIXES: Final = ("ImageProcessorFast", "ImageProcessor", "FeatureExtractor")


def parse_steps(config: Mapping[str, object], channels: int) -> ImageSteps:
    """Read `preprocessor_config.json`; raises ModelError for what it does not honour."""
    try:
        read = msgspec.convert(config, _Config)
    except msgspec.ValidationError as error:
        raise ModelError(f"{_FILE}: {error}") from error
    if channels not in {1, 3}:
        raise ModelError(f"images have 1 or 3 channels, not {channels}")
    processor = _processor(read)
    scaling, crop = _scaling(read, processor)
    if read.do_center_crop if read.do_center_crop is not None else processor.crop > 0:
        crop = _square(read.crop_size if read.crop_size is not None else processor.crop or None, "crop_size")
    pad, fill = _padding(read, processor, scaling)
    factors, offsets = _levels(read, processor, channels)
    flip = read.do_flip_channel_order if read.do_flip_channel_order is not None else processor.kind == "mobilevit"
    return ImageSteps(
        channels=channels,
        scaling=scaling,
        crop=crop,
        pad=pad,
        fill=fill,
        resample=_resample(processor.resample if read.resample is None else read.resample),
        reverse_channels=flip and channels == 3,
        factors=factors,
        offsets=offsets,
    )


def scaled_size(scaling: Scaling, height: int, width: int) -> tuple[int, int]:
    """Return the (height, width) that an image of that many pixels is scaled to; at least 1 x 1."""
    if scaling.rule in {"within", "letterbox"}:
        scale = min(scaling.height / height, scaling.width / width)
        whole = round if scaling.rule == "letterbox" else int
        return max(1, whole(height * scale)), max(1, whole(width * scale))
    if not scaling.shortest:
        return _up_to_multiple(scaling, scaling.height, scaling.width)
    if scaling.rule in {"detr", "yolos"}:
        return _by_detr(scaling, height, width)
    short, long = scaling.shortest, int(scaling.shortest * max(height, width) / min(height, width))
    if 0 < scaling.longest < long:
        short, long = int(scaling.longest * short / long), scaling.longest
    tall = (long, short) if width <= height else (short, long)
    return _up_to_multiple(scaling, max(1, tall[0]), max(1, tall[1]))


def _up_to_multiple(scaling: Scaling, height: int, width: int) -> tuple[int, int]:
    if not scaling.divisor:
        return height, width
    return math.ceil(height / scaling.divisor) * scaling.divisor, math.ceil(width / scaling.divisor) * scaling.divisor


def _by_detr(scaling: Scaling, height: int, width: int) -> tuple[int, int]:
    """Return the size by the rule of DETR's processor, which rounds the shorter side before the longer one."""
    short, long = min(height, width), max(height, width)
    side: float = scaling.shortest
    if scaling.longest and long / short * side > scaling.longest:
        side = scaling.longest * short / long
    new_short, new_long = round(side), int(side * long / short)
    if short == new_short and (scaling.rule == "detr" or height <= width):
        new_long = long
    if scaling.rule == "yolos":
        new_short, new_long = new_short - new_short % scaling.divisor, new_long - new_long % scaling.divisor
    new_short, new_long = max(1, new_short), max(1, new_long)
    return (new_long, new_short) if width < height else (new_short, new_long)


def _processor(read: _Config) -> _Processor:
    name = read.image_processor_type or read.feature_extractor_type or ""
    plain = name
    for suffix in _SUFFIXES:
        plain = plain.removesuffix(suffix)
    if plain not in _PROCESSORS:
        raise ModelError(f"{_FILE}: the processor {name[:80]!r} is not known here")
    if read.keep_aspect_ratio:
        raise ModelError(f"{_FILE}: keep_aspect_ratio is not honoured here")
    if not plain and read.crop_pct is not None:
        return msgspec.structs.replace(_PROCESSORS[""], kind="convnext", square=False)
    return _PROCESSORS[plain]


def _scaling(read: _Config, processor: _Processor) -> tuple[Scaling | None, tuple[int, int] | None]:
    """Return the scaling, and the cut that belongs to it."""
    size = processor.size if read.size is None else read.size
    if read.do_resize is False or size is None:
        return None, None
    if isinstance(size, int) and processor.rule != "plain" and not processor.square:
        size = _Side(shortest_edge=size, longest_edge=read.max_size or 1333)
    plain = _plain_scaling(size, read, processor)
    pct = processor.crop_pct if read.crop_pct is None else read.crop_pct
    if processor.kind == "convnext" and plain.shortest:
        return _convnext(plain.shortest, pct or 0.875)
    if processor.kind == "levit" and plain.shortest:
        return Scaling(shortest=int(256 / 224 * plain.shortest)), None
    if processor.kind == "poolformer" and pct:
        return _poolformer(plain, pct), None
    return plain, None


def _plain_scaling(size: _Size, read: _Config, processor: _Processor) -> Scaling:
    if isinstance(size, int):
        size = _Side(height=size, width=size) if processor.square else _Side(shortest_edge=size)
    elif isinstance(size, tuple):
        size = _Side(height=size[0], width=size[1])
    divisor = {"yolos": 16, "maskformer": 32}.get(processor.rule, 0)
    if processor.rule == "maskformer" and read.size_divisor is not None:
        divisor = read.size_divisor
    if size.height is not None and size.width is not None:
        kept = divisor if processor.rule == "maskformer" else 0
        rule: Rule = "letterbox" if read.letterbox else "plain"
        return Scaling(height=_side(size.height), width=_side(size.width), divisor=kept, rule=rule)
    if size.max_height is not None and size.max_width is not None:
        return Scaling(height=_side(size.max_height), width=_side(size.max_width), rule="within")
    if size.shortest_edge is None:
        raise ModelError(f"{_FILE}: size needs height and width, or shortest_edge")
    most = read.max_size if size.longest_edge is None and processor.rule != "plain" else size.longest_edge
    longest = 0 if most is None else _side(most)
    return Scaling(shortest=_side(size.shortest_edge), longest=longest, rule=processor.rule, divisor=divisor)


def _convnext(side: int, crop_pct: float) -> tuple[Scaling, tuple[int, int] | None]:
    """Scale to more than the cut below 384 pixels, and warp from there on."""
    if side >= 384:
        return Scaling(height=side, width=side), None
    return Scaling(shortest=_side(int(side / crop_pct))), (side, side)


def _poolformer(plain: Scaling, crop_pct: float) -> Scaling:
    height, width = (_side(int(side / crop_pct)) if side else 0 for side in (plain.height, plain.width))
    if plain.shortest or height == width:
        return Scaling(shortest=_side(int(plain.shortest / crop_pct)) if plain.shortest else height)
    return Scaling(height=height, width=width)


def _padding(read: _Config, processor: _Processor, scaling: Scaling | None) -> tuple[tuple[int, int] | None, int]:
    """Return (height and width to fill up to, with what)."""
    if scaling is not None and scaling.rule == "letterbox":
        return (scaling.height, scaling.width), 114
    if read.do_pad and processor.rule == "plain" and processor.size is not None:
        raise ModelError(f"{_FILE}: do_pad is not honoured for this processor")
    if read.pad_size is None or read.do_pad is False:
        return None, 0
    return _square(read.pad_size, "pad_size"), 0


def _square(size: _Size | None, name: str) -> tuple[int, int] | None:
    if size is None:
        return None
    if isinstance(size, int):
        size = (size, size)
    if isinstance(size, _Side):
        both = size.height or size.shortest_edge, size.width or size.shortest_edge
        if both[0] is None or both[1] is None:
            raise ModelError(f"{_FILE}: {name} needs height and width")
        size = both[0], both[1]
    return _side(size[0]), _side(size[1])


def _side(value: int) -> int:
    if not 0 < value <= MAX_SIDE:
        raise ModelError(f"{_FILE}: a size must lie in 1 to {MAX_SIDE} pixels")
    return value


def _resample(value: int) -> int:
    if value not in _RESAMPLINGS:
        raise ModelError(f"{_FILE}: resample {value} is not known")
    return value


def _levels(read: _Config, processor: _Processor, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return what pixels are multiplied by, and what is added then, for each channel."""
    scale = (1 / 255 if read.rescale_factor is None else read.rescale_factor) if read.do_rescale is not False else 1.0
    shift = -1.0 if read.rescale_offset and read.do_rescale is not False else 0.0
    normalize = processor.normalize if read.do_normalize is None else read.do_normalize
    means = _per_channel(read.image_mean if read.image_mean is not None else processor.mean_std[0], channels)
    stds = _per_channel(read.image_std if read.image_std is not None else processor.mean_std[1], channels)
    if not normalize:
        means, stds = (), ()
    means, stds = means or (0.0,) * channels, stds or (1.0,) * channels
    if processor.kind == "efficientnet" and read.include_top is not False:
        # Divided once more by the deviation, as this processor does for nets with a head.
        again = _per_channel(read.image_std if read.image_std is not None else processor.mean_std[1], channels)
        stds = tuple(std * more for std, more in zip(stds, again, strict=True))
    if 0.0 in stds:
        raise ModelError(f"{_FILE}: a deviation is 0")
    factors = tuple(scale / std for std in stds)
    return factors, tuple((shift - mean) / std for mean, std in zip(means, stds, strict=True))


def _per_channel(value: _Numbers, channels: int) -> tuple[float, ...]:
    values = (value,) if isinstance(value, float) else value
    if len(values) == 1:
        return values * channels
    if channels == 1 and len(set(values)) == 1:
        return values[:1]
    if values and len(values) != channels:
        raise ModelError(f"{_FILE}: {len(values)} means or deviations for {channels} channels")
    if any(not math.isfinite(value) for value in values):
        raise ModelError(f"{_FILE}: a mean or deviation is not a number")
    return values
