"""Nets that find objects, with and without a class for no object."""

from __future__ import annotations

import base64
import io
import json
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
from tests.reference.image_subjects import asked, refused

_LABELS = 5
_YOLOS = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": [48, 64],
    "patch_size": 16,
    "num_detection_tokens": 6,
}
_DETR = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "num_queries": 6,
}
_BACKBONE = {
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 8, 8],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage2", "stage3", "stage4"],
}
_BACKBONE = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "out_features": ["stage2"]}


def subjects() -> list[Subject]:
    """Return every subject of this module."""
    return [
        _detector("yolos", "Yolos", "Yolos", _YOLOS, {"size": {"height": 48, "width": 64}}, {}),
        _detector("detr", "Detr", "Detr", _DETR, {"size": {"shortest_edge": 40, "longest_edge": 66}}, _BACKBONE),
        _detector("sigmoid", "Yolos", "ConditionalDetr", _YOLOS, {"size": {"height": 48, "width": 64}}, {}),
    ]


def _detector(
    name: str,
    prefix: str,
    processor: str,
    shape: dict[str, Any],
    settings: dict[str, Any],
    backbone: dict[str, Any],
) -> Subject:
    def make(folder: Path, chance: random.Random, inputs: int) -> list[Case]:
        config = getattr(transformers, f"{prefix}Config")(**shape, num_labels=_LABELS, **_backbone(backbone))
        model = _spread(
            small(chance, getattr(transformers, f"{prefix}ForObjectDetection"), config),
            0.1 if processor == "ConditionalDetr" else 4,
        )
        ready = getattr(transformers, f"{processor}ImageProcessor")(**settings)
        export(model, [ready], folder, "object-detection")
        if processor == "ConditionalDetr":
            _name_every_class(model, folder)
        pipe = pipeline("object-detection", model=model, image_processor=ready, device="cpu")
        return [*_answered(pipe, asked(chance, inputs, tiny=False)), *_options(pipe, chance), *refused()]

    return Subject(f"object-detection-{name}", "object-detection", make)


def _backbone(shape: dict[str, Any]) -> dict[str, Any]:
    return {"backbone_config": transformers.ResNetConfig(**shape)} if shape else {}


def _name_every_class(model: Any, folder: Path) -> None:
    """Give a name to the class for no object too: behind this processor each output is a class."""
    model.config.id2label = {number: f"LABEL_{number}" for number in range(_LABELS + 1)}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "id2label": model.config.id2label}))


def _spread(model: Any, factor: float) -> Any:
    """Make the scores spread, so that some boxes lie above the threshold and some below it."""
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "class_labels_classifier" in name and weights.ndim > 1:
                weights.mul_(factor)
    return model


def _answered(pipe: Any, questions: Iterator[tuple[Case, Image.Image]]) -> Iterator[Case]:
    for case, image in questions:
        answer = pipe(image)
        yield Case(content=case.content, made=case.made, content_type=case.content_type, expected=answer)


def _options(pipe: Any, chance: random.Random) -> Iterator[Case]:
    files = [pictures.made(f"smooth-{side}x24-{chance.randrange(1 << 30)}") for side in (24, 50)]
    images = [Image.open(io.BytesIO(data)) for data in files]
    texts = [base64.b64encode(data).decode() for data in files]
    for threshold in (0.0, 0.3, 1.0):
        body = {"inputs": texts, "parameters": {"threshold": threshold}}
        yield Case(body=body, expected=pipe(images, threshold=threshold))
    yield Case(body={"inputs": texts[0], "parameters": {"threshold": 2}}, error="bad_request")
    yield Case(body={"inputs": texts[0], "parameters": {"iou_threshold": 0.5}}, error="bad_request")
