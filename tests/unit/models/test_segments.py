"""From masks and classes to segments of an image, and how near a golden one they must be."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from models.evaluate import matches
from models.images import encode_mask
from models.tasks.segments import Limits, best_classes, instances, panoptic, resize_bilinear, semantic

SURE, NONE = 9.0, -9.0
LEFT = np.array([[SURE, SURE, NONE, NONE]] * 2, np.float32)
MOST = np.array([[SURE, SURE, SURE, NONE]] * 2, np.float32)
LIMITS = Limits(0.5, 0.5, 0.5)


def classes(*numbers: int, weights: tuple[float, ...] = (5.0, 5.0, 5.0)) -> NDArray[np.float32]:
    """Return logits of two classes and none, each query sure of one."""
    return np.stack(
        [np.eye(3, dtype=np.float32)[number] * weight for number, weight in zip(numbers, weights, strict=False)]
    )


def test_planes_are_scaled_between_the_middles_of_pixels() -> None:
    plane = np.array([[[0.0, 4.0]]], np.float32)
    assert resize_bilinear(plane, 1, 4)[0, 0].tolist() == [0.0, 1.0, 3.0, 4.0]
    assert resize_bilinear(plane, 3, 2)[0].tolist() == [[0.0, 4.0]] * 3
    assert resize_bilinear(np.ones((2, 7, 5), np.float32), 3, 2).shape == (2, 3, 2)


def test_each_pixel_is_of_its_best_class() -> None:
    scores = np.array([[[1.0, 0.0]], [[0.0, 2.0]], [[-1.0, -1.0]]])
    found = list(semantic(best_classes(scores, 2, 4)))
    assert [(segment.number, segment.score) for segment in found] == [(0, None), (1, None)]
    assert found[1].mask.tolist() == [[False, False, True, True]] * 2


def test_segments_do_not_overlap_and_those_mostly_covered_are_left_out() -> None:
    masks = np.stack([LEFT, MOST])
    found = list(panoptic(classes(0, 1, weights=(5.0, 4.0)), masks, (2, 4), LIMITS))
    assert [(segment.number, int(segment.mask.sum())) for segment in found] == [(0, 6)]
    found = list(panoptic(classes(0, 1, weights=(5.0, 4.0)), masks, (2, 4), Limits(0.5, 0.5, 0.3)))
    assert [(segment.number, int(segment.mask.sum())) for segment in found] == [(0, 6), (1, 2)]
    assert not (found[0].mask & found[1].mask).any()


def test_queries_for_nothing_or_unsure_ones_make_no_segment() -> None:
    assert list(panoptic(classes(2, 0, weights=(5.0, 0.1)), np.stack([LEFT, MOST]), (2, 4), LIMITS)) == []


def test_of_two_instances_on_a_pixel_the_surer_one_has_it() -> None:
    found = list(instances(classes(0, 1, weights=(4.0, 6.0)), np.stack([LEFT, MOST]), (4, 8), 0.5))
    assert [(segment.number, int(segment.mask.sum())) for segment in found] == [(1, 24), (0, 0)]
    assert 0.9 < (found[0].score or 0) < 1


@pytest.mark.parametrize(("flipped", "same"), [(0, True), (100, True), (101, False)])
def test_a_golden_mask_may_differ_in_one_pixel_of_a_hundred(flipped: int, same: bool) -> None:
    golden = np.zeros((100, 99), bool)
    other = golden.copy()
    other.ravel()[:flipped] = True
    found = matches([{"mask": encode_mask(golden)}], [{"mask": encode_mask(other)}], 0.0)
    assert (found is None) is same
    assert same or found == "[0].mask: 1.0% of the pixels differ"


def test_a_golden_box_may_be_off_by_a_pixel_and_masks_of_other_sizes_are_others() -> None:
    assert matches({"box": {"xmin": 4}}, {"box": {"xmin": 5}}, 0.001) is None
    assert matches({"box": {"xmin": 4}}, {"box": {"xmin": 6}}, 0.001) is not None
    small, large = (encode_mask(np.zeros((2, side), bool)) for side in (2, 3))
    assert matches({"mask": small}, {"mask": large}, 1.0) is not None
    assert matches({"mask": "text"}, {"mask": "texts"}, 1.0) is not None
