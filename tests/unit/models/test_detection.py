"""Boxes from every form that detectors give them in, back in the image's own pixels."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from models.artifact import Artifact
from models.backends.face import Tensors, TensorSpec
from models.body import parse_body
from models.errors import ModelError, RequestError
from models.request import Dialect, Request
from models.session import BatchSession
from models.tasks.boxes import suppress
from models.tasks.object_detection import ObjectDetection
from tests.fakes.backend import MemoryBackend
from tests.fakes.pictures import png

LABELS = {"id2label": {"0": "cat", "1": "dog", "2": "owl"}}
PIXELS = TensorSpec("images", "float32", (1, 3, 64, 64))
NHWC = TensorSpec("pixels", "uint8", (1, 32, 32, 3))


def session_of(
    folder: Path, spec: TensorSpec, outputs: Tensors, processing: dict[str, object] | None = None
) -> tuple[BatchSession, list[Mapping[str, NDArray[Any]]]]:
    seen: list[Mapping[str, NDArray[Any]]] = []

    def function(feeds: Mapping[str, NDArray[Any]]) -> Tensors:
        seen.append(feeds)
        return outputs

    specs = [TensorSpec(name, str(values.dtype), values.shape) for name, values in outputs.items()]
    backend = MemoryBackend([spec], specs, function)
    (folder / "config.json").write_text(json.dumps(LABELS))
    (folder / "preprocessor_config.json").write_text(json.dumps(processing or {}))
    with Artifact(folder, ["config.json", "preprocessor_config.json"]) as artifact:
        task = ObjectDetection(artifact, backend)
    return BatchSession({Dialect.HUGGINGFACE: task}, backend, batch=1), seen


def ask(session: BatchSession, width: int, height: int, **parameters: object) -> Any:
    text = base64.b64encode(png(Image.new("RGB", (width, height), (255, 0, 0)))).decode()
    body = parse_body("application/json", json.dumps({"inputs": text, "parameters": parameters}).encode())
    session.submit(1, Request(model="m", content_type=body.content_type, body=body.body, dialect=body.dialect))
    (piece,) = session.step()
    assert not piece.code, piece.message
    return json.loads(piece.body)["outputs"]


def boxes_of(found: Any) -> list[tuple[str, tuple[int, ...]]]:
    return [(entry["label"], tuple(entry["box"].values())) for entry in found]


# Two boxes on one dog, one owl inside it, and one box that is not sure: (x, y, w, h), then cat, dog, owl.
ROWS = np.array(
    [
        [32, 32, 32, 16, 0.1, 0.9, 0.0],
        [33, 32, 32, 16, 0.1, 0.8, 0.0],
        [32, 32, 32, 16, 0.0, 0.0, 0.7],
        [10, 32, 4, 4, 0.3, 0.0, 0.0],
    ],
    np.float32,
)
FOUND = [("dog", (32, 16, 96, 48)), ("owl", (32, 16, 96, 48))]


def with_objectness(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.concatenate([rows[:, :4], np.full((len(rows), 1), 0.95, np.float32), rows[:, 4:]], axis=1)


@pytest.mark.parametrize(
    "output", [ROWS.T[None], ROWS[None], with_objectness(ROWS)[None], (ROWS * ([1 / 64] * 4 + [1] * 3)).T[None]]
)
def test_yolo_boxes_of_every_form_come_out_of_their_letterbox_once_each(
    tmp_path: Path, output: NDArray[np.float32]
) -> None:
    session, seen = session_of(tmp_path, PIXELS, {"output0": output.astype(np.float32)})
    # 128 x 64 pixels lie in 64 x 64 at half their size, 16 rows below the top.
    assert boxes_of(ask(session, 128, 64)) == FOUND
    pixels = seen[0]["images"]
    assert pixels[0, 0, 0, 0] == pytest.approx(114 / 255)
    assert pixels[0, :, 32, 32].tolist() == [1.0, 0.0, 0.0]


def test_thresholds_and_bounds_are_the_askers(tmp_path: Path) -> None:
    session, _ = session_of(tmp_path, PIXELS, {"output0": ROWS.T[None]})
    assert len(ask(session, 64, 64, threshold=0.2)) == 3
    assert len(ask(session, 64, 64, iou_threshold=0.99)) == 3
    assert len(ask(session, 64, 64, max_detections=1)) == 1
    assert ask(session, 64, 64, threshold=1.0) == []


def test_a_graph_that_has_suppressed_already_is_only_undone(tmp_path: Path) -> None:
    rows = np.array([[16, 24, 48, 40, 0.9, 1], [16, 24, 48, 40, 0.8, 1], [0, 0, 1, 1, 0.1, 0]], np.float32)
    session, _ = session_of(tmp_path, PIXELS, {"output0": rows[None]})
    assert boxes_of(ask(session, 128, 64)) == [FOUND[0], FOUND[0]]


@pytest.mark.parametrize("order", [("boxes", "classes", "scores", "count"), ("scores", "boxes", "count", "classes")])
def test_tensorflows_detections_are_told_apart_by_their_values(tmp_path: Path, order: tuple[str, ...]) -> None:
    values = {
        "boxes": np.array([[[0.25, 0.5, 0.75, 1.5], [0, 0, 1, 1], [0, 0, 1, 1]]], np.float32),
        "classes": np.array([[1, 2, 0]], np.float32),
        "scores": np.array([[0.9, 0.6, 0.99]], np.float32),
        "count": np.array([2], np.float32),
    }
    session, seen = session_of(tmp_path, NHWC, {f"out:{at}": values[name] for at, name in enumerate(order)})
    assert boxes_of(ask(session, 100, 40)) == [("dog", (50, 10, 100, 30)), ("owl", (0, 0, 100, 40))]
    assert seen[0]["pixels"][0, 0, 0].tolist() == [255, 0, 0]


def test_rt_detrs_classes_stand_each_for_itself(tmp_path: Path) -> None:
    outputs = {
        "logits": np.array([[[3.0, -9, 2.0], [-9, -9, -9]]], np.float32),
        "pred_boxes": np.array([[[0.5, 0.5, 0.5, 0.5], [0.1, 0.1, 0.1, 0.1]]], np.float32),
    }
    processing: dict[str, object] = {"image_processor_type": "RTDetrImageProcessor", "size": 64}
    session, _ = session_of(tmp_path, PIXELS, outputs, processing)
    assert boxes_of(ask(session, 64, 64)) == [("cat", (16, 16, 48, 48)), ("owl", (16, 16, 48, 48))]


def test_outputs_that_no_rule_reads_are_refused_when_the_model_opens(tmp_path: Path) -> None:
    two = {"a": np.zeros((1, 4, 4), np.float32), "b": np.zeros((1, 4), np.float32)}
    with pytest.raises(ModelError, match="two outputs"):
        session_of(tmp_path, PIXELS, two)


@pytest.mark.parametrize(
    ("parameters", "field"),
    [({"threshold": 1.5}, "threshold"), ({"iou_threshold": "x"}, "iou_threshold"), ({"max_detections": 0}, "max_")],
)
def test_a_wrong_parameter_is_refused_by_name(tmp_path: Path, parameters: dict[str, object], field: str) -> None:
    session, _ = session_of(tmp_path, PIXELS, {"output0": ROWS.T[None]})
    with pytest.raises(RequestError, match=rf"^parameters\.{field}"):
        ask(session, 8, 8, **parameters)


def test_a_text_is_told_what_the_model_takes(tmp_path: Path) -> None:
    session, _ = session_of(tmp_path, PIXELS, {"output0": ROWS.T[None]})
    request = Request(model="m", content_type="text/plain", body=b"hi", dialect=Dialect.HUGGINGFACE)
    with pytest.raises(RequestError) as caught:
        session.submit(1, request)
    assert caught.value.message == (
        "content type: expected image/jpeg, image/png, or application/json with `inputs` an image in base64, "
        "got text/plain"
    )


def test_suppression_keeps_what_a_plain_loop_keeps() -> None:
    chance = np.random.default_rng(7)
    corner = chance.uniform(0, 80, (300, 2))
    boxes = np.concatenate([corner, corner + chance.uniform(1, 30, (300, 2))], axis=1).astype(np.float32)
    scores, classes = chance.permutation(300) / 300, chance.integers(0, 3, 300)
    kept: list[int] = []
    for row in np.argsort(-scores):
        if all(classes[row] != classes[other] or overlap(boxes[row], boxes[other]) <= 0.3 for other in kept):
            kept.append(int(row))
    assert suppress(boxes, scores, classes, 0.3, 1000).tolist() == kept
    assert suppress(boxes, scores, classes, 0.3, 5).tolist() == kept[:5]
    assert suppress(boxes[:0], scores[:0], classes[:0], 0.3, 5).tolist() == []


def overlap(one: NDArray[np.float32], two: NDArray[np.float32]) -> float:
    width = min(one[2], two[2]) - max(one[0], two[0])
    height = min(one[3], two[3]) - max(one[1], two[1])
    shared = max(0.0, float(width)) * max(0.0, float(height))
    areas = [float((box[2] - box[0]) * (box[3] - box[1])) for box in (one, two)]
    return shared / (sum(areas) - shared)
