"""Nets that look at images, behind the image processor that each was trained with."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import pipeline

from tests.reference import pictures
from tests.reference.case import Case, Subject
from tests.reference.exporting import export, small

Asked = tuple[Case, Image.Image]
"""A question without its answer, and the image that the pipeline gets for it."""

_LABELS = 7
_VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
_STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}
_POOL = {"hidden_sizes": [4, 8, 8, 8], "depths": [1, 1, 1, 1]}
_TINY = {**_VIT, "hidden_size": 8, "image_size": 32, "patch_size": 8}
_TOP = {"size": 40, "do_center_crop": True, "crop_size": 32, "rescale_offset": True}
_PROCESSORS = {"ResNet": "ConvNext"}


def subjects() -> list[Subject]:
    """Return every subject of this module."""
    return [
        _classifier("vit", "ViT", {**_VIT, "image_size": 32, "patch_size": 8}, {"size": 32}, large=True),
        _classifier("resnet", "ResNet", {"embedding_size": 8, **_STAGES}, {"size": 28, "resample": 3}, js=True),
        _classifier("convnext", "ConvNext", {"num_stages": 2, **_STAGES}, {"size": _short(32)}),
        _classifier("mobilenet", "ViT", _TINY, {"size": _short(40), "crop_size": 32}, "MobileNetV2"),
        _classifier("levit", "ViT", _TINY, {"size": _short(32), "crop_size": 32}, "Levit"),
        _classifier("deit", "ViT", _TINY, {"size": 36, "crop_size": 32}, "DeiT"),
        _classifier(
            "poolformer", "PoolFormer", _POOL, {"size": _short(48), "crop_size": 48}, num_labels=1, spread=0.12
        ),
        _classifier("efficientnet", "ViT", _TINY, _TOP, "EfficientNet", problem_type="multi_label_classification"),
        _classifier("mobilevit", "ViT", _TINY, {"size": _short(40), "crop_size": 32}, "MobileViT"),
    ]


def _short(side: int) -> dict[str, int]:
    return {"shortest_edge": side}


def _classifier(
    name: str,
    prefix: str,
    shape: dict[str, Any],
    settings: dict[str, Any],
    processor: str = "",
    *,
    js: bool = False,
    large: bool = False,
    spread: float = 0.35,
    **config: Any,
) -> Subject:
    def make(folder: Path, chance: random.Random, inputs: int) -> list[Case]:
        kind = getattr(transformers, f"{prefix}ForImageClassification")
        values = getattr(transformers, f"{prefix}Config")(**{"num_labels": _LABELS, **shape, **config})
        model = _settled(small(chance, kind, values, spread), chance)
        ready = getattr(transformers, f"{processor or _PROCESSORS.get(prefix, prefix)}ImageProcessor")(**settings)
        export(model, [ready], folder, "image-classification", js=js)
        pipe = pipeline("image-classification", model=model, image_processor=ready, device="cpu")
        return [*_answered(pipe, asked(chance, inputs, large=large)), *_options(pipe, chance), *refused()]

    return Subject(f"image-classification-{name}", "image-classification", make)


def _settled(model: Any, chance: random.Random) -> Any:
    """Let the net's batch normalisation see a few images, so that its answers differ from each other."""
    side = getattr(model.config, "image_size", 32)
    torch.manual_seed(chance.randrange(1 << 31))
    model.train()
    with torch.no_grad():
        for _ in range(30):
            model(pixel_values=torch.rand(8, 3, side, side) * torch.rand(8, 3, 1, 1) * 3 - 1)
    return model.eval()


def asked(chance: random.Random, count: int, *, large: bool = False, tiny: bool = True) -> Iterator[Asked]:
    """Give every odd kind of image, and generated ones of many sizes."""
    names = [f"{kind}-37x50-{chance.randrange(1 << 30)}" for kind in pictures.KINDS]
    names += [
        f"smooth-{chance.randint(4, 90)}x{chance.randint(4, 90)}-{chance.randrange(1 << 30)}" for _ in range(count)
    ]
    names += [f"smooth-300x8-{chance.randrange(1 << 30)}"]
    if large:
        names.append(f"smooth-4000x3000-{chance.randrange(1 << 30)}")
    for name in names:
        yield Case(made=name, content_type="image/png"), Image.open(io.BytesIO(pictures.made(name)))
    for data in pictures.jpegs(chance.randrange(1 << 30)) if large else ():
        yield Case(content=data, content_type="image/jpeg"), Image.open(io.BytesIO(data))
    if not tiny:
        return
    # The reference takes an image of 1 x 1 for one of one channel and fails; all images of one colour are alike.
    seed = chance.randrange(1 << 30)
    yield (
        Case(made=f"plain-1x1-{seed}", content_type="image/png"),
        Image.open(io.BytesIO(pictures.made(f"plain-8x8-{seed}"))),
    )


def refused() -> list[Case]:
    """Return what no model takes."""
    whole = pictures.made("smooth-20x20-1")
    return [
        Case(content=whole[:-30], content_type="image/png", error="bad_request"),
        Case(content=whole[:20], content_type="image/png", error="bad_request"),
        Case(body={"inputs": "no image"}, error="bad_request"),
        Case(body={"inputs": [base64.b64encode(whole).decode(), 7]}, error="bad_request"),
    ]


def _answered(pipe: Any, questions: Iterator[Asked]) -> Iterator[Case]:
    for case, image in questions:
        yield Case(content=case.content, made=case.made, content_type=case.content_type, expected=pipe(image))


def _options(pipe: Any, chance: random.Random) -> Iterator[Case]:
    """Give questions with parameters, and lists of images of several sizes."""
    names = [f"smooth-{side}x11-{chance.randrange(1 << 30)}" for side in (11, 14, 11)]
    files = [pictures.made(name) for name in names]
    images = [Image.open(io.BytesIO(data)) for data in files]
    texts = [base64.b64encode(data).decode() for data in files]
    for parameters in ({"top_k": 1}, {"top_k": 99}, {"function_to_apply": "none"}, {"function_to_apply": "sigmoid"}):
        body = {"inputs": texts[0], "parameters": parameters}
        yield Case(body=body, expected=pipe(images[0], **parameters))
    yield Case(body={"inputs": texts}, expected=pipe(images))
