"""What a `preprocessor_config.json` asks for, and what cannot be honoured."""

from __future__ import annotations

import pytest

from models.errors import ModelError
from models.image_steps import Scaling, parse_steps, scaled_size


def scaled(config: dict[str, object], height: int, width: int) -> tuple[int, int]:
    scaling = parse_steps(config, 3).scaling
    assert scaling is not None
    return scaled_size(scaling, height, width)


def named(name: str, **settings: object) -> dict[str, object]:
    return {"image_processor_type": f"{name}ImageProcessor", **settings}


@pytest.mark.parametrize(
    ("config", "size", "expected"),
    [
        (named("ViT"), (480, 640), (224, 224)),
        (named("ViT", size=32), (480, 640), (32, 32)),
        (named("ViT", size=[20, 30]), (480, 640), (20, 30)),
        (named("CLIP"), (480, 640), (224, 298)),
        (named("CLIP", size=100), (300, 100), (300, 100)),
        (named("ConvNext", size=224), (480, 640), (256, 341)),
        (named("ConvNext"), (480, 640), (384, 384)),
        ({"feature_extractor_type": "ConvNextFeatureExtractor", "size": 224, "crop_pct": 1.0}, (100, 50), (448, 224)),
        (named("Levit"), (224, 448), (256, 512)),
        (named("PoolFormer"), (224, 448), (248, 496)),
        (named("Detr"), (480, 640), (800, 1066)),
        (named("Detr"), (400, 2000), (267, 1333)),
        (named("Detr", size=600, max_size=700), (100, 200), (350, 700)),
        (named("Yolos"), (480, 640), (800, 1056)),
        (named("MaskFormer"), (480, 640), (800, 1088)),
        (named("RTDetr"), (1, 5000), (640, 640)),
        (named("Detr", size={"max_height": 50, "max_width": 60}), (100, 100), (50, 50)),
        ({"size": {"height": 64, "width": 64}, "letterbox": True}, (10, 20), (32, 64)),
        ({"size": 64, "letterbox": True}, (1, 4000), (1, 64)),
    ],
)
def test_an_image_is_scaled_by_the_rule_of_its_processor(
    config: dict[str, object], size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert scaled(config, *size) == expected


def test_a_processor_brings_its_own_defaults() -> None:
    steps = parse_steps(named("MobileViT"), 3)
    assert (steps.crop, steps.reverse_channels, steps.offsets) == ((256, 256), True, (0.0, 0.0, 0.0))
    steps = parse_steps(named("EfficientNet", size=8), 3)
    assert steps.factors[0] == pytest.approx(1 / 255 / 0.25)
    assert parse_steps(named("Siglip"), 3).resample == 3
    assert parse_steps(named("Bit", do_center_crop=False), 3).crop is None


def test_switches_turn_steps_off() -> None:
    steps = parse_steps(named("ViT", do_resize=False, do_rescale=False, do_normalize=False), 3)
    assert (steps.scaling, steps.factors, steps.offsets) == (None, (1.0,) * 3, (0.0,) * 3)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (named("Donut"), "'DonutImageProcessor' is not known"),
        (named("DPT", keep_aspect_ratio=True), "keep_aspect_ratio"),
        (named("DPT", do_pad=True), "do_pad"),
        (named("Detr", size={"longest_edge": 5}), "shortest_edge"),
        (named("ViT", image_std=[1, 0, 1]), "a deviation is 0"),
        (named("ViT", crop_size={"height": 3}, do_center_crop=True), "crop_size needs height and width"),
        (named("ViT", size=9999), "1 to 4096"),
    ],
)
def test_what_cannot_be_honoured_is_named(config: dict[str, object], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        parse_steps(config, 3)


def test_grey_nets_take_one_mean_for_all() -> None:
    assert len(parse_steps(named("ViT"), 1).factors) == 1
    assert scaled_size(Scaling(height=3, width=4), 1, 1) == (3, 4)
