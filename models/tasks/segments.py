"""From a net's queries and masks to segments of an image, as Hugging Face's processors for DETR and MaskFormer do it.

Pure: no I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Segment(NamedTuple):
    """One segment: the number of its class, how sure the net is (None: it does not say), and its pixels."""

    number: int
    score: float | None
    mask: NDArray[np.bool_]


class Limits(NamedTuple):
    """From where on a query counts, a pixel belongs to its mask, and a mask is not too much covered by others."""

    threshold: float
    mask: float
    overlap: float


def resize_bilinear(planes: NDArray[Any], height: int, width: int) -> NDArray[np.float32]:
    """Return [planes, height, width] interpolated between pixels' middles, edges repeated; no smoothing before."""
    low, high, share = _between(planes.shape[1], height)
    planes = planes.astype(np.float32, copy=False)
    rows = planes[:, low] * (1 - share)[:, None] + planes[:, high] * share[:, None]
    low, high, share = _between(planes.shape[2], width)
    return np.asarray(rows[:, :, low] * (1 - share) + rows[:, :, high] * share)


def _between(old: int, new: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """Return, for each new place, the old ones around it and how near it is to the second."""
    scale = np.float32(old / new)
    at = np.maximum((np.arange(new, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5), 0)
    low = np.minimum(at.astype(np.intp), old - 1)
    return low, np.minimum(low + 1, old - 1), (at - low).astype(np.float32)


def best_classes(scores: NDArray[Any], height: int, width: int) -> NDArray[np.intp]:
    """Return the class with the highest of [classes, h, w] scores for each pixel of the image."""
    best = np.zeros((height, width), np.intp)
    highest = np.full((height, width), -np.inf, np.float32)
    # One class at a time, so that many classes of a large image need no more memory than few.
    for number in range(scores.shape[0]):
        plane = resize_bilinear(scores[number : number + 1], height, width)[0]
        better = plane > highest
        best[better] = number
        highest[better] = plane[better]
    return best


def semantic(best: NDArray[np.intp]) -> Iterator[Segment]:
    """Give a segment for each class that some pixel is of."""
    for number in np.unique(best):
        yield Segment(int(number), None, best == number)


def query_scores(logits: NDArray[Any], masks: NDArray[Any]) -> NDArray[np.float32]:
    """Return [classes, h, w] from [queries, classes + 1] and [queries, h, w]: a mask counts for its query's classes."""
    classes = softmax(logits)[:, :-1]
    return np.asarray(np.tensordot(classes, sigmoid(masks), axes=([0], [0])), np.float32)


def panoptic(logits: NDArray[Any], masks: NDArray[Any], size: tuple[int, int], limits: Limits) -> Iterator[Segment]:
    """Give segments that do not overlap: each pixel goes to the query that is surest of it."""
    shares = softmax(logits)
    numbers, scores = shares.argmax(axis=1), shares.max(axis=1)
    kept = np.flatnonzero((numbers != logits.shape[1] - 1) & (scores > limits.threshold))
    owners = np.zeros(size, np.int32)
    highest = np.full(size, -np.inf, np.float32)
    wholes = []
    for at, query in enumerate(kept):
        plane = resize_bilinear(sigmoid(masks[query : query + 1]), *size)[0] * np.float32(scores[query])
        wholes.append(int((plane >= np.float32(limits.mask)).sum()))
        better = plane > highest
        owners[better], highest[better] = at, plane[better]
    for at, query in enumerate(kept):
        mask = owners == at
        area = int(mask.sum())
        # In single precision, so that a share on the very limit falls to the side where the reference has it.
        if area and wholes[at] and float(np.float32(area) / np.float32(wholes[at])) > limits.overlap:
            yield Segment(int(numbers[query]), round(float(scores[query]), 6), mask)


def instances(logits: NDArray[Any], masks: NDArray[Any], size: tuple[int, int], threshold: float) -> Iterator[Segment]:
    """Give MaskFormer's instances, best first: (query, class) pairs; where two overlap, the better one has the pixel.

    The reference draws them in an order that nothing determines.
    """
    queries, classes = logits.shape[0], logits.shape[1] - 1
    shares = softmax(logits)[:, :-1].ravel()
    found: list[tuple[int, float]] = []
    drawn = np.full(size, -1, np.int32)
    for pair in np.argsort(-shares, kind="stable")[:queries]:
        plane = masks[pair // classes]
        inside = plane > 0
        sure = (sigmoid(plane) * inside).sum() / (inside.sum() + 1e-6)
        score = float(shares[pair] * sure)
        whole = inside[np.ix_(_nearest(inside.shape[0], size[0]), _nearest(inside.shape[1], size[1]))]
        if score >= threshold and whole.any():
            drawn[whole & (drawn < 0)] = len(found)
            found.append((int(pair % classes), round(score, 6)))
    for at, (number, score) in enumerate(found):
        yield Segment(number, score, drawn == at)


def _nearest(old: int, new: int) -> NDArray[np.intp]:
    places = np.floor(np.arange(new, dtype=np.float32) * np.float32(old / new)).astype(np.intp)
    return np.asarray(np.minimum(places, old - 1))


def softmax(logits: NDArray[Any]) -> NDArray[np.float32]:
    """Return shares along the last axis."""
    powers = np.exp(logits.astype(np.float32, copy=False) - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def sigmoid(values: NDArray[Any]) -> NDArray[np.float32]:
    """Return shares of each value alone."""
    small = np.exp(-np.abs(values.astype(np.float32, copy=False)))
    return np.where(values >= 0, 1 / (1 + small), small / (1 + small)).astype(np.float32)
