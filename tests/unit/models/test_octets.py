"""Tensors as bytes after their JSON: the Open Inference Protocol's binary extension."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from models.backends.face import TensorSpec
from models.body import OCTETS, outer_octets, parse_body
from models.channel import Piece
from models.errors import RequestError
from models.request import Dialect, Request
from models.session import BatchSession
from models.tasks.tensors import TensorsTask
from tests.fakes.backend import MemoryBackend

TYPES = {
    "BOOL": "bool",
    "UINT8": "uint8",
    "UINT16": "uint16",
    "UINT32": "uint32",
    "UINT64": "uint64",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
}


def mirror(dtype: str) -> BatchSession:
    """Return a session whose graph gives back what it is given."""
    spec = TensorSpec("x", dtype, (None, 2))
    backend = MemoryBackend([spec], [spec], dict)
    return BatchSession({Dialect.OPEN_INFERENCE: TensorsTask(backend, "m", "1")}, backend, batch=1)


def raw_tensor(values: NDArray[Any], datatype: str, **more: object) -> tuple[bytes, bytes]:
    data = values.tobytes()
    size = {"binary_data_size": len(data)}
    tensor = {"name": "x", "shape": list(values.shape), "datatype": datatype, "parameters": size}
    return json.dumps({"inputs": [tensor], **more}).encode(), data


def submit(session: BatchSession, head: bytes, data: bytes = b"", said: str | None = None) -> Piece:
    body = parse_body(OCTETS, head + data, str(len(head)) if said is None else said)
    session.submit(1, Request(model="m", content_type=body.content_type, body=body.body, dialect=body.dialect))
    return session.step()[0]


def refusal(session: BatchSession, head: bytes, data: bytes = b"", said: str | None = None) -> str:
    with pytest.raises(RequestError) as caught:
        submit(session, head, data, said)
    assert caught.value.code == "bad_request"
    return caught.value.message


@pytest.mark.parametrize("datatype", TYPES)
def test_every_datatype_goes_in_and_comes_out_as_bytes(datatype: str) -> None:
    values = np.array([[0, 1], [1, 0], [1, 1]]).astype(TYPES[datatype])
    head, data = raw_tensor(values, datatype, parameters={"binary_data_output": True}, id="9")
    piece = submit(mirror(TYPES[datatype]), head, data)
    assert piece.content_type == OCTETS
    body, json_bytes = outer_octets(piece.body)
    answer = json.loads(body[:json_bytes])
    size = {"binary_data_size": len(data)}
    assert answer["outputs"] == [{"name": "x", "datatype": datatype, "shape": [3, 2], "parameters": size}]
    assert (answer["id"], body[json_bytes:]) == ("9", data)


def test_texts_go_in_and_come_out_as_bytes() -> None:
    data = b"".join(struct.pack("<I", len(text)) + text for text in (b"a", "Grüße 🜁".encode()))
    tensor = {"name": "x", "shape": [1, 2], "datatype": "BYTES", "parameters": {"binary_data_size": len(data)}}
    wanted = [{"name": "x", "parameters": {"binary_data": True}}]
    piece = submit(mirror("object"), json.dumps({"inputs": [tensor], "outputs": wanted}).encode(), data)
    body, json_bytes = outer_octets(piece.body)
    assert body[json_bytes:] == data


def test_an_answer_is_json_unless_bytes_are_asked_for() -> None:
    piece = submit(mirror("float32"), *raw_tensor(np.array([[1, 2.5]], np.float32), "FP32"))
    assert piece.content_type == "application/json"
    assert json.loads(piece.body)["outputs"][0]["data"] == [1.0, 2.5]


def test_bytes_can_be_asked_for_in_plain_json_too() -> None:
    tensor = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}
    raw = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    body = parse_body("application/json", raw)
    session = mirror("float32")
    session.submit(1, Request(model="m", content_type=body.content_type, body=body.body, dialect=body.dialect))
    whole, json_bytes = outer_octets(session.step()[0].body)
    assert np.frombuffer(whole[json_bytes:], "<f4").tolist() == [1.0, 2.0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64"])
def test_e11_what_is_no_number_is_refused_as_a_question(value: float, datatype: str) -> None:
    head, data = raw_tensor(np.array([[1, value]], TYPES[datatype]), datatype)
    assert refusal(mirror(TYPES[datatype]), head, data) == "inputs[0]: a value is not a number or infinite"


def test_a25_what_is_no_number_is_the_models_failure_as_an_answer() -> None:
    spec = TensorSpec("x", "float32", (None, 2))
    backend = MemoryBackend([spec], [spec], lambda feeds: {"x": feeds["x"] * np.float32(np.nan)})
    session = BatchSession({Dialect.OPEN_INFERENCE: TensorsTask(backend, "m", "1")}, backend, batch=1)
    for more in ({}, {"parameters": {"binary_data_output": True}}):
        assert submit(session, *raw_tensor(np.array([[1, 2]], np.float32), "FP32", **more)).code == "model_failed"


@pytest.mark.parametrize(
    ("change", "data", "message"),
    [
        ({"parameters": {"binary_data_size": 12}}, bytes(8), "inputs[0].parameters.binary_data_size: 12 bytes are"),
        ({"parameters": {"binary_data_size": 4}}, bytes(4), "inputs[0].parameters.binary_data_size: expected 8, got 4"),
        ({"parameters": {"binary_data_size": -1}}, bytes(8), "inputs[0].parameters.binary_data_size: -1 bytes are"),
        ({"parameters": {"binary_data_size": 8}}, bytes(9), "body: 1 bytes after the last tensor belong to none"),
        ({"parameters": {}}, bytes(8), "inputs[0].data: expected either data or parameters.binary_data_size"),
        ({"data": [1, 2]}, bytes(8), "inputs[0].data: expected either data or parameters.binary_data_size"),
        ({"parameters": {"classification": 1}}, bytes(8), "body: Object contains unknown field `classification`"),
        ({"shape": [1, 3]}, bytes(8), "inputs[0].shape: expected [any, 2], got [1, 3]"),
        ({"datatype": "FP16"}, bytes(8), "inputs[0].datatype: expected FP32, got 'FP16'"),
    ],
)
def test_a_wrong_tensor_is_refused_by_its_field(change: dict[str, object], data: bytes, message: str) -> None:
    tensor = {"name": "x", "shape": [1, 2], "datatype": "FP32", "parameters": {"binary_data_size": 8}} | change
    assert refusal(mirror("float32"), json.dumps({"inputs": [tensor]}).encode(), data).startswith(message)


@pytest.mark.parametrize("data", [b"", b"\1\0\0", b"\2\0\0\0a", b"\1\0\0\0a\1\0\0\0\xff", b"\0\0\0\0\0\0\0\0\0\0\0\0"])
def test_texts_that_do_not_fit_their_bytes_are_refused(data: bytes) -> None:
    tensor = {"name": "x", "shape": [1, 2], "datatype": "BYTES", "parameters": {"binary_data_size": len(data)}}
    assert refusal(mirror("object"), json.dumps({"inputs": [tensor]}).encode(), data).startswith("inputs[0]: ")


@pytest.mark.parametrize("said", ["", "0", "-1", "12x", "99999", "9" * 40, "\u0661"])
def test_a_wrong_length_of_the_json_is_refused_by_its_name(said: str) -> None:
    head, data = raw_tensor(np.array([[1, 2]], np.float32), "FP32")
    assert refusal(mirror("float32"), head, data, said).startswith("inference-header-content-length: ")


def test_a_missing_length_and_json_of_another_kind_are_refused() -> None:
    with pytest.raises(RequestError, match="it is missing"):
        parse_body(OCTETS, b"{}")
    with pytest.raises(RequestError, match="expected tensors"):
        parse_body(OCTETS, b'{"inputs": "text"}', "18")
    head, data = raw_tensor(np.array([[1, 2]], np.float32), "FP32", spillway={"id": "1"})
    with pytest.raises(RequestError, match=r"^spillway: "):
        parse_body(OCTETS, head + data, str(len(head)))
