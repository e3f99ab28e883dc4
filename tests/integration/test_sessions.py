"""The example models on their real runtimes, in this process, and artifacts that no runtime should take."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from models.body import parse_body
from models.errors import ModelError, RequestError
from models.evaluate import matches
from models.manifest import Manifest
from models.record import answer_alone, record_golden
from models.request import Request
from models.session import Session, open_session
from tests.fakes.onnx_graph import added_weights, graph_of, model_of, node, not_a_number, value_info
from tests.fakes.samples import INPUTS, manifest_of, sample

NAMES = ["digits", "digits-int8", "digits-small", "language", "sea-temperature", "co2-forecast"]


def opened(name: str) -> Session:
    folder, manifest = sample(name)
    return open_session(folder, manifest, manifest.variants[0], threads=1, slots=1)


def made(folder: Path, graph: bytes, task: str = "tensors") -> tuple[Path, Manifest]:
    (folder / "model.onnx").write_bytes(graph)
    return folder, manifest_of(folder, {"task": task, "format": "onnx"})


def open_made(folder: Path, manifest: Manifest) -> Session:
    return open_session(folder, manifest, manifest.variants[0], threads=1, slots=1)


def request_of(body: bytes | dict[str, object], content_type: str | None = None) -> Request:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    parsed = parse_body(content_type, raw)
    return Request(model="m", content_type=parsed.content_type, body=parsed.body, dialect=parsed.dialect)


def ask(session: Session, body: bytes | dict[str, object], content_type: str | None = None) -> Any:
    piece = answer_alone(session, request_of(body, content_type))
    assert not piece.code, piece.message
    return json.loads(piece.body)


def digit(number: int) -> bytes:
    return (INPUTS / f"digit-{number}.png").read_bytes()


def floats(values: list[float]) -> dict[str, object]:
    return {"inputs": [{"name": "x", "shape": [1, len(values)], "datatype": "FP32", "data": values}]}


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_sample_is_answered_again_within_its_tolerance(name: str) -> None:
    folder, manifest = sample(name)
    recorded = msgspec.structs.replace(manifest, golden=record_golden(folder, manifest))
    assert recorded.golden
    again = record_golden(folder, recorded)
    for first, second in zip(recorded.golden, again, strict=True):
        expected, actual = msgspec.json.decode(first.expected), msgspec.json.decode(second.expected)
        assert matches(expected, actual, first.tolerance) is None


@pytest.mark.parametrize("name", ["digits", "digits-int8", "digits-small"])
def test_digits_are_read_one_by_one_and_as_a_list(name: str) -> None:
    session = opened(name)
    images = [base64.b64encode(digit(number)).decode() for number in range(10)]
    whole = ask(session, {"inputs": images, "parameters": {"top_k": 1}})["outputs"]
    single = [ask(session, digit(number))["outputs"][0]["label"] for number in range(10)]
    assert [scores[0]["label"] for scores in whole] == single
    assert sum(label == str(number) for number, label in enumerate(single)) >= 9


def test_scores_are_probabilities_best_first() -> None:
    scores = ask(opened("digits"), {"inputs": base64.b64encode(digit(3)).decode(), "parameters": {"top_k": None}})[
        "outputs"
    ]
    values = [entry["score"] for entry in scores]
    assert len(values) == 10
    assert sum(values) == pytest.approx(1)
    assert values == sorted(values, reverse=True)


def test_an_image_model_takes_pixels_as_tensors_too() -> None:
    pixels = {"name": "pixel_values", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": [0.0] * 64}
    answer = ask(opened("digits"), {"inputs": [pixels]})
    assert answer["model_name"] == "digits"
    assert answer["outputs"][0]["shape"] == [1, 10]


@pytest.mark.parametrize(
    ("body", "content_type", "field"),
    [
        (b"just text", None, "content type: expected image/jpeg"),
        ({"inputs": "no base64!"}, None, "inputs: "),
        ({"inputs": ["aGk=", 5]}, None, "inputs[1]: expected an image in base64, got a number"),
        ({"inputs": {"image": "x"}}, None, "inputs: expected an image in base64, got an object"),
        ({"inputs": "aGk=", "parameters": {"top_k": 0}}, None, "parameters.top_k: "),
        ({"inputs": "aGk=", "parameters": {"top_k": True}}, None, "parameters.top_k: "),
        ({"inputs": "aGk=", "parameters": {"function_to_apply": ["softmax"]}}, None, "parameters.function_to_apply: "),
        ({"inputs": "aGk=", "parameters": {"top_p": 1}}, None, "parameters.top_p: "),
        ({"inputs": "aGk=", "parameters": []}, None, "body: "),
    ],
)
def test_a_wrong_question_to_an_image_model_is_refused_by_its_field(
    body: bytes | dict[str, object], content_type: str | None, field: str
) -> None:
    with pytest.raises(RequestError) as caught:
        opened("digits-small").submit(1, request_of(body, content_type))
    assert caught.value.code == "bad_request"
    assert caught.value.message.startswith(field)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("The train to the coast leaves in ten minutes.", "en"),
        ("Der Zug an die Küste fährt in zehn Minuten ab.", "de"),
        ("Le train pour la côte part dans dix minutes.", "fr"),
        ("去海边的火车十分钟后出发。", "zh"),
        ("Поезд на побережье отправляется через десять минут.", "ru"),
    ],
)
def test_languages_are_told_apart(text: str, label: str) -> None:
    session = opened("language")
    assert ask(session, text.encode())["outputs"][0]["label"] == label
    assert ask(session, {"inputs": text})["outputs"][0]["label"] == label


def test_texts_of_different_lengths_in_one_batch_are_answered_as_if_alone() -> None:
    session = opened("language")
    texts = [
        "Guten Morgen",
        "The quick brown fox jumps over the lazy dog and runs away into the woods.",
        "今天天气很好",
    ]
    together = ask(session, {"inputs": texts})["outputs"]
    assert [scores[0]["label"] for scores in together] == ["de", "en", "zh"]


def test_a_text_over_the_models_length_is_refused_whole_and_counted() -> None:
    session = opened("language")
    text = "The weather is nice today. " * 100
    tokens, generated = session.count(request_of(text.encode()))
    assert tokens > session.context_tokens == 128
    assert generated == 0
    with pytest.raises(RequestError) as caught:
        session.submit(1, request_of({"inputs": ["short", text]}))
    assert caught.value.code == "too_large"
    assert caught.value.message == f"inputs[1]: {tokens} tokens or more are over the model's 128"


@pytest.mark.parametrize(
    "text", ["\x00\x1b[2J", "\u202eevil\u202c", "\ufeff", "💣" * 20, "{{7*7}}", "' OR 1=1 --", "\u0301" * 30]
)
def test_e18_hostile_texts_are_answered_like_any_other(text: str) -> None:
    assert ask(opened("language"), {"inputs": text})["outputs"]


def test_e18_a_text_of_ten_megabytes_is_refused() -> None:
    with pytest.raises(RequestError) as caught:
        opened("language").submit(1, request_of(b"a b " * 2_500_000))
    assert caught.value.code == "too_large"


def test_an_empty_text_is_answered_since_the_model_puts_its_own_tokens_around_it() -> None:
    assert ask(opened("language"), {"inputs": ""})["outputs"]


def test_sensor_rows_and_series_are_answered() -> None:
    months = [24.64, 25.85, 27.08, 28.12, 28.82, 29.24, 28.45, 27.36, 25.19, 23.61, 22.27, 21.31]
    assert 18 < ask(opened("sea-temperature"), {"inputs": months})["outputs"] < 26
    weeks = [360.0 + 3 * float(np.sin(week / 8)) for week in range(104)]
    forecast = ask(opened("co2-forecast"), {"inputs": weeks})["outputs"]
    assert len(forecast) == 13
    assert all(350 < value < 370 for value in forecast)


def test_an_answer_that_is_not_a_number_is_the_models_fault(tmp_path: Path) -> None:
    session = open_made(*made(tmp_path, not_a_number()))
    assert ask(session, floats([1.0]))["outputs"][0]["data"] == [0.0]
    piece = answer_alone(session, request_of(floats([-1.0])))
    assert (piece.code, piece.message) == ("model_failed", "the model gave a value that is not a number")


def test_weights_in_another_file_of_the_artifact_are_used(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(np.array([1, 2, 3, 4], dtype="<f4").tobytes())
    session = open_made(*made(tmp_path, added_weights("weights.bin")))
    assert ask(session, floats([10, 10, 10, 10]))["outputs"][0]["data"] == [11, 12, 13, 14]


@pytest.mark.parametrize(
    "location", ["/etc/hostname", "../outside.bin", "sub/../../outside.bin", "missing.bin", "/dev/zero", ""]
)
def test_e3_weights_outside_the_artifact_are_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "outside.bin").write_bytes(b"\0" * 16)
    inside = tmp_path / "inside"
    inside.mkdir()
    with pytest.raises(ModelError, match="not among the artifact's files"):
        open_made(*made(inside, added_weights(location)))


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_e3_weights_behind_a_link_are_refused(tmp_path: Path, kind: str) -> None:
    outside = tmp_path / "outside.bin"
    outside.write_bytes(b"\0" * 16)
    inside = tmp_path / "inside"
    inside.mkdir()
    link = inside / "weights.bin"
    link.symlink_to(outside) if kind == "soft" else os.link(outside, link)
    with pytest.raises(ModelError, match="weights"):
        open_made(*made(inside, added_weights("weights.bin")))


def test_weights_shorter_than_the_graph_says_are_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"\0" * 8)
    with pytest.raises(ModelError):
        open_made(*made(tmp_path, added_weights("weights.bin")))


@pytest.mark.parametrize(
    "graph",
    [
        b"",
        b"\x00",
        os.urandom(1000),
        model_of(b""),
        model_of(
            graph_of(
                [node("Add", ["x", "x"], ["y"], domain="evil.ops")], [value_info("x", [1])], [value_info("y", [1])]
            )
        ),
        model_of(graph_of([node("PyOp", ["x"], ["y"])], [value_info("x", [1])], [value_info("y", [1])])),
    ],
)
def test_e7_e9_what_is_no_graph_or_needs_foreign_code_is_refused(tmp_path: Path, graph: bytes) -> None:
    with pytest.raises(ModelError):
        open_made(*made(tmp_path, graph))


@pytest.mark.parametrize("data", [b"", b"TFL3", os.urandom(1000), b"\x00" * 100])
def test_e8_what_is_no_tflite_graph_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.tflite").write_bytes(data)
    manifest = manifest_of(tmp_path, {"task": "tensors", "format": "tflite"})
    with pytest.raises(ModelError, match="LiteRT"):
        open_made(tmp_path, manifest)


def test_e10_a_tokenizer_that_is_none_is_the_models_fault(tmp_path: Path) -> None:
    folder, _ = sample("language")
    for name in ("model.onnx", "config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "tokenizer.json").write_bytes(b'{"decoder":[}}}')
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        open_made(tmp_path, manifest_of(tmp_path, {"task": "text-classification", "format": "onnx"}))


@pytest.mark.parametrize(
    ("task", "layout", "words"),
    [("levitation", "onnx", "levitation"), ("tensors", "gguf", "gguf"), ("tabular-regression", "genai", "genai")],
)
def test_a_task_or_format_that_is_unknown_here_is_named(tmp_path: Path, task: str, layout: str, words: str) -> None:
    (tmp_path / "model.onnx").write_bytes(not_a_number())
    with pytest.raises(ModelError, match=words):
        open_made(tmp_path, manifest_of(tmp_path, {"task": task, "format": layout}))


def test_what_a_text_can_cost_is_known_from_its_length() -> None:
    session = opened("language")
    text = "Der Zug an die Küste fährt in zehn Minuten ab."
    tokens, _ = session.count(request_of(text.encode()))
    size = len(text.encode())
    assert session.extra_tokens == 1
    assert size // session.longest_token_bytes <= tokens <= size + session.extra_tokens
