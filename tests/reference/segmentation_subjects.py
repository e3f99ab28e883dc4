"""Nets that cut images into segments: a class for each pixel, or queries with masks."""

from __future__ import annotations

import base64
import io
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import pipeline
from transformers.utils import ModelOutput

from tests.reference import pictures
from tests.reference.case import Case, Subject
from tests.reference.exporting import export, small
from tests.reference.image_subjects import refused
from tests.reference.slim import slim

_LABELS = 5
_SEGFORMER = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [8, 16],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 16,
}
_QUERIES = 6
Net = Callable[[random.Random], tuple[Any, Any]]


def subjects() -> list[Subject]:
    """Return every subject of this module."""
    return [
        _segmenter("segformer", _segformer, ({}, {"subtask": "semantic"})),
        _segmenter("detr", lambda chance: _queries(chance, "Detr"), (*_WAYS, {"subtask": "instance"})),
        _segmenter("maskformer", lambda chance: _queries(chance, "MaskFormer"), _WAYS),
        _segmenter("mask2former", lambda chance: _queries(chance, "Mask2Former"), _WAYS),
    ]


_WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"threshold": 0.4},
    {"threshold": 0.3, "mask_threshold": 0.3, "overlap_mask_area_threshold": 0.2},
    {"threshold": 0.0, "mask_threshold": 0.2, "overlap_mask_area_threshold": 0.0},
    {"subtask": "semantic"},
)


def _segformer(chance: random.Random) -> tuple[Any, Any]:
    config = transformers.SegformerConfig(**_SEGFORMER, num_labels=_LABELS)
    ready = transformers.SegformerImageProcessor(size={"height": 48, "width": 64})
    return small(chance, transformers.SegformerForSemanticSegmentation, config), ready


class Queries(transformers.PreTrainedModel):
    """Stands for DETR and MaskFormer, which cannot be made small: a few filters, queries with classes and masks."""

    config_class = transformers.DetrConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.masks = torch.nn.Conv2d(3, _QUERIES, 9, stride=4, padding=4)
        self.classes = torch.nn.Linear(_QUERIES * 3, _QUERIES * (config.num_labels + 1))

    def forward(self, pixel_values: Any, pixel_mask: Any = None) -> Any:
        masks = self.masks(pixel_values)
        seen = torch.cat([masks.mean((2, 3)), masks.amax((2, 3)), masks.amin((2, 3))], 1)
        logits = self.classes(seen * 0.3).reshape(-1, _QUERIES, self.config.num_labels + 1)
        names = self.config.outputs
        return ModelOutput({names[0]: logits, names[1]: masks})


def _queries(chance: random.Random, kind: str) -> tuple[Any, Any]:
    detr = kind == "Detr"
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, num_labels=_LABELS
    )
    config.outputs = ["logits", "pred_masks"] if detr else ["class_queries_logits", "masks_queries_logits"]
    divisor = {} if detr else {"size_divisor": 16}
    ready = getattr(transformers, f"{kind}ImageProcessor")(size={"shortest_edge": 48, "longest_edge": 70}, **divisor)
    return small(chance, Queries, config), ready


def _export(model: Any, ready: Any, folder: Path) -> None:
    """Export by torch alone what Optimum does not know."""
    ready.save_pretrained(folder)
    model.config.save_pretrained(folder)
    names = model.config.outputs
    axes = {"pixel_values": {0: "n", 2: "h", 3: "w"}, names[0]: {0: "n"}, names[1]: {0: "n", 2: "h", 3: "w"}}
    options = {"input_names": ["pixel_values"], "output_names": names, "dynamic_axes": axes, "opset_version": 18}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (torch.rand(1, 3, 48, 64),), folder / "model.onnx", dynamo=False, **options)
    slim(folder / "model.onnx")


def _segmenter(name: str, net: Net, ways: tuple[dict[str, Any], ...]) -> Subject:
    def make(folder: Path, chance: random.Random, inputs: int) -> list[Case]:
        model, ready = net(chance)
        if isinstance(model, Queries):
            _export(model, ready, folder)
        else:
            export(model, [ready], folder, "image-segmentation")
        pipe = pipeline("image-segmentation", model=model, image_processor=ready, device="cpu")
        names = [f"{kind}-37x50-{chance.randrange(1 << 30)}" for kind in ("grey", "alpha", "palette")]
        names += [
            f"smooth-{chance.randint(4, 90)}x{chance.randint(4, 90)}-{chance.randrange(1 << 30)}" for _ in range(inputs)
        ]
        plain = [
            Case(made=name, content_type="image/png", expected=_kept(pipe(_opened(pictures.made(name)))))
            for name in names
        ]
        return [*plain, *_in_ways(pipe, ways, chance), *refused()]

    return Subject(f"image-segmentation-{name}", "image-segmentation", make)


def _in_ways(pipe: Any, ways: tuple[dict[str, Any], ...], chance: random.Random) -> Iterator[Case]:
    files = [pictures.made(f"smooth-{side}x24-{chance.randrange(1 << 30)}") for side in (24, 50)]
    texts = [base64.b64encode(data).decode() for data in files]
    for parameters in ways:
        found = [_kept(pipe(_opened(data), **parameters)) for data in files]
        yield Case(body={"inputs": texts, "parameters": parameters}, expected=found)
    yield Case(body={"inputs": texts[0], "parameters": {"subtask": "all"}}, error="bad_request")


def _opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def _kept(segments: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**segment, "mask": _png(segment["mask"])} for segment in segments]


def _png(mask: Image.Image) -> str:
    out = io.BytesIO()
    mask.save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()
