"""Boxes: from the forms that detectors give them in to corners, and which of several on one object stays.

Pure: no I/O, no clock.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

MAX_CANDIDATES: Final = 30_000
"""The best boxes that suppression looks at; more of them hold nothing new and cost time by their square."""


def corners(boxes: NDArray[Any]) -> NDArray[np.float32]:
    """Return [N, 4] of (centre x, centre y, width, height) as (xmin, ymin, xmax, ymax)."""
    centre_x, centre_y, width, height = boxes.astype(np.float32, copy=False).T
    half_width, half_height = width * np.float32(0.5), height * np.float32(0.5)
    edges = (centre_x - half_width, centre_y - half_height, centre_x + half_width, centre_y + half_height)
    return np.stack(edges, axis=1)


def suppress(
    boxes: NDArray[np.float32], scores: NDArray[Any], classes: NDArray[Any], iou_threshold: float, most: int
) -> NDArray[np.intp]:
    """Return the rows of the boxes that stay, best first, at most `most`.

    A box goes where a better one of its class shares more than `iou_threshold` of their union (greedy non-maximum
    suppression, Neubeck and Van Gool 2006).
    """
    order = np.argsort(-scores, kind="stable")[:MAX_CANDIDATES]
    areas = _areas(boxes)
    kept: list[int] = []
    alive = np.ones(len(order), bool)
    for at, row in enumerate(order):
        if not alive[at]:
            continue
        kept.append(int(row))
        if len(kept) == most:
            break
        rest = np.flatnonzero(alive[at + 1 :]) + at + 1
        others = order[rest]
        same = classes[others] == classes[row]
        rest, others = rest[same], others[same]
        alive[rest[_overlap(boxes, areas, row, others) > iou_threshold]] = False
    return np.asarray(kept, np.intp)


def _areas(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    sides = np.maximum(boxes[:, 2:] - boxes[:, :2], 0)
    return np.asarray(sides[:, 0] * sides[:, 1])


def _overlap(boxes: NDArray[np.float32], areas: NDArray[np.float32], row: int, others: NDArray[Any]) -> NDArray[Any]:
    """Return what each of the others shares with one box, as a part of their union."""
    low = np.maximum(boxes[row, :2], boxes[others, :2])
    high = np.minimum(boxes[row, 2:], boxes[others, 2:])
    sides = np.maximum(high - low, 0)
    shared = sides[:, 0] * sides[:, 1]
    union = areas[row] + areas[others] - shared
    return np.asarray(shared / np.maximum(union, np.finfo(np.float32).tiny))
