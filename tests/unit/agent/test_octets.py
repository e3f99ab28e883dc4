"""Tensors as bytes, through both doors: the length of their JSON stands in a header or a property."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np

from agent.health import Health
from agent.http import HttpDoor
from models.body import HEADER_BYTES, OCTETS, framed_octets, split_octets
from models.channel import Ask, Piece
from tests.fakes.worker import MemoryWorker
from tests.support.box import open_box
from tests.support.mqtt_box import open_mqtt_box
from tests.support.virtual_time import virtual_time

DATA = np.array([1.5, -2.0], "<f4").tobytes()
TENSOR = {"name": "x", "shape": [2], "datatype": "FP32", "parameters": {"binary_data_size": len(DATA)}}
HEAD = json.dumps({"inputs": [TENSOR]}).encode()
ANSWER = b'{"outputs":[]}'


def mirror(ask: Ask) -> list[Piece]:
    """Answer with the bytes that came, behind other JSON."""
    head, tensors = split_octets(ask.request.body)
    assert bytes(head) == HEAD
    return [Piece(ticket=ask.ticket, body=framed_octets(ANSWER, bytes(tensors)), content_type=OCTETS)]


@virtual_time
async def test_tensors_go_through_the_http_door_as_bytes(tmp_path: Path) -> None:
    async with open_box(tmp_path) as box:
        box.serve(MemoryWorker(script=mirror))
        door = HttpDoor(box.config, box.service, Health(), box.clock)
        transport = httpx.ASGITransport(app=cast("Any", door._server.config.app))
        async with httpx.AsyncClient(transport=transport, base_url="http://box") as client:
            headers = {"Content-Type": OCTETS, "Inference-Header-Content-Length": str(len(HEAD))}
            answer = await client.post("/models/digits", content=HEAD + DATA, headers=headers)
            refused = await client.post("/models/digits", content=HEAD + DATA, headers={"Content-Type": OCTETS})
        door._socket.close()
    assert (answer.status_code, answer.content) == (200, ANSWER + DATA)
    assert answer.headers["Content-Type"] == OCTETS
    assert answer.headers["Inference-Header-Content-Length"] == str(len(ANSWER))
    assert refused.status_code == 400
    assert "inference-header-content-length" in refused.json()["error"]["message"]


@virtual_time
async def test_tensors_go_through_the_mqtt_door_as_bytes(tmp_path: Path) -> None:
    async with open_mqtt_box(tmp_path) as mqtt:
        mqtt.box.serve(MemoryWorker(script=mirror))
        await mqtt.ask(HEAD + DATA, content_type=OCTETS, user=((HEADER_BYTES, str(len(HEAD))),))
        (reply,) = await mqtt.answered()
        assert (reply.body, reply.content_type) == (ANSWER + DATA, OCTETS)
        assert reply.facts[HEADER_BYTES] == str(len(ANSWER))
        assert reply.facts["status"] == "ok"
