from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, MutableMapping
from pathlib import Path
from typing import Any, cast

import httpx
import msgspec
import pytest

from agent.health import Health
from agent.http import HttpDoor
from cloud_sync.exchange import Reply
from models.channel import Ask, Piece
from models.request import Request
from tests.fakes.cloud_door import MemoryCloud
from tests.fakes.worker import MemoryWorker, echo
from tests.support.box import Box, open_box, turns
from tests.support.virtual_time import virtual_time

POOL = '[models.digits]\npool = "gpu"\n'
CHAT = {"model": "digits", "messages": [{"role": "user", "content": "hi"}]}


class Served:
    """A box, its HTTP door, and a client of it."""

    def __init__(self, box: Box, door: HttpDoor, health: Health) -> None:
        self.box = box
        self.door = door
        self.health = health
        self.app = cast("Any", door._server.config.app)
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app=self.app), base_url="http://box")

    async def ask(
        self, body: bytes = b"hello", model: str = "digits", headers: dict[str, Any] | None = None, **more: str
    ) -> httpx.Response:
        """Ask in the plain form; `more` are headers too, with `_` for `-`."""
        named = (headers or {}) | {name.replace("_", "-"): value for name, value in more.items()}
        return await self.client.post(f"/models/{model}", content=body, headers=named)


@contextlib.asynccontextmanager
async def served(folder: Path, addition: str = "", *, cloud: MemoryCloud | None = None) -> AsyncIterator[Served]:
    async with open_box(folder, addition, cloud=cloud) as box:
        health = Health()
        door = HttpDoor(box.config, box.service, health, box.clock)
        here = Served(box, door, health)
        try:
            yield here
        finally:
            await here.client.aclose()
            door._socket.close()


@virtual_time
async def test_a_text_is_answered_with_the_facts_in_body_and_headers(tmp_path: Path) -> None:
    async with served(tmp_path) as here:
        here.box.serve(MemoryWorker(script=echo))
        answer = await here.ask(b"hello", content_type="text/plain")
        assert answer.status_code == 200
        assert answer.json()["outputs"] == "hello"
        facts = answer.json()["spillway"]
        assert (facts["route"], facts["reason"], facts["model"]) == ("local", "fits", "digits@1")
        headers = [answer.headers[f"spillway-{name}"] for name in ("route", "reason", "model")]
        assert headers == ["local", "fits", "digits@1"]


@virtual_time
async def test_what_curl_says_when_it_is_told_nothing_is_looked_at_itself(tmp_path: Path) -> None:
    async with served(tmp_path) as here:
        here.box.serve(MemoryWorker(script=echo))
        answer = await here.ask(b'{"inputs": "x"}', content_type="application/x-www-form-urlencoded")
        assert answer.json()["outputs"] == '{"inputs": "x"}'


@virtual_time
async def test_a_chat_completion_keeps_its_shape(tmp_path: Path) -> None:
    def complete(ask: Ask) -> list[Piece]:
        return [Piece(ticket=ask.ticket, body=b'{"object":"chat.completion"}')]

    async with served(tmp_path) as here:
        here.box.serve(MemoryWorker(script=complete))
        answer = await here.client.post("/v1/chat/completions", json=CHAT)
        assert answer.content == b'{"object":"chat.completion"}'
        assert answer.headers["spillway-route"] == "local"


@virtual_time
async def test_a_stream_is_server_sent_events_that_end_with_done(tmp_path: Path) -> None:
    def three(ask: Ask) -> list[Piece]:
        return [Piece(ticket=ask.ticket, body=b'{"n":%d}' % number, final=number == 2) for number in range(3)]

    async with served(tmp_path) as here:
        here.box.serve(MemoryWorker(script=three))
        answer = await here.client.post("/v1/chat/completions", json=CHAT | {"stream": True})
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["spillway-model"] == "digits@1"
        assert answer.text == 'data: {"n":0}\n\ndata: {"n":1}\n\ndata: {"n":2}\n\ndata: [DONE]\n\n'


@virtual_time
async def test_a_line_break_in_a_piece_from_elsewhere_does_not_break_the_stream(tmp_path: Path) -> None:
    def pretty(_request: Request) -> list[Reply]:
        return [
            Reply(status="partial", final=False, body=b'{\n  "n": 1\n}'),
            Reply(status="ok", final=True, body=b"{}"),
        ]

    async with served(tmp_path, POOL, cloud=MemoryCloud(pretty)) as here:
        answer = await here.client.post("/v1/chat/completions", json=CHAT | {"stream": True})
        lines = [line for line in answer.text.split("\n") if line]
        assert all(line.startswith("data: ") for line in lines)
        assert msgspec.json.decode(lines[0].removeprefix("data: ")) == {"n": 1}
        assert lines[1:] == ["data: {}", "data: [DONE]"]


@virtual_time
async def test_a_stream_that_fails_before_it_begins_has_the_error_s_status(tmp_path: Path) -> None:
    async with served(tmp_path) as here:
        answer = await here.client.post("/v1/chat/completions", json=CHAT | {"stream": True})
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("code", "status"),
    [("bad_request", 400), ("too_large", 413), ("model_failed", 500), ("deadline_exceeded", 504), ("overloaded", 503)],
)
def test_each_error_has_its_status(tmp_path: Path, code: str, status: int) -> None:
    @virtual_time
    async def play() -> None:
        async with served(tmp_path) as here:
            here.box.serve(MemoryWorker(script=lambda ask: [Piece(ticket=ask.ticket, code=code, message="because")]))
            answer = await here.ask()
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)

    play()


@virtual_time
async def test_errors_speak_the_dialect_of_the_body(tmp_path: Path) -> None:
    tensors = b'{"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}]}'
    async with served(tmp_path) as here:
        answer = await here.ask(tensors, model="unheard-of")
        assert answer.json() == {"error": "model_not_found: no such model"}


@virtual_time
async def test_wishes_stand_in_headers(tmp_path: Path) -> None:
    async with served(tmp_path) as here:
        worker = here.box.serve(MemoryWorker(script=echo))
        await here.ask(spillway_deadline_ms="700", spillway_priority="8", spillway_privacy="local-only")
        request = worker.asks[0].request
        assert (request.deadline_ms, request.priority, request.local_only, request.client) == (700, 8, True, "http")


@virtual_time
async def test_d8_an_envelope_that_keeps_a_request_here_counts_on_this_door_too(tmp_path: Path) -> None:
    cloud = MemoryCloud()
    async with served(tmp_path, POOL, cloud=cloud) as here:
        body = b'{"inputs": "x", "spillway": {"privacy": "local-only", "priority": 9, "deadline_ms": 800}}'
        assert (await here.ask(body)).status_code == 404
        assert cloud.sent == []
        worker = here.box.serve(MemoryWorker(script=echo))
        await here.ask(body)
        request = worker.asks[0].request
        assert (request.local_only, request.priority, request.deadline_ms) == (True, 9, 800)


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("spillway-deadline-ms", "0"),
        ("spillway-deadline-ms", "soon"),
        ("spillway-priority", "10"),
        ("spillway-privacy", "LOCAL-ONLY"),
    ],
)
def test_a_header_that_cannot_be_meant_is_refused(tmp_path: Path, header: str, value: str) -> None:
    @virtual_time
    async def play() -> None:
        async with served(tmp_path) as here:
            here.box.serve(MemoryWorker(script=echo))
            answer = await here.ask(headers={header: value})
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad_request")
            assert value in answer.json()["error"]["message"]

    play()


@virtual_time
async def test_the_deadline_is_kept(tmp_path: Path) -> None:
    async with served(tmp_path) as here:
        here.box.serve(MemoryWorker())
        started = here.box.clock()
        answer = await here.ask(spillway_deadline_ms="700")
        assert answer.status_code == 504
        assert here.box.clock() - started == pytest.approx(0.7, abs=0.1)


@virtual_time
async def test_f8_a_body_over_the_limit_is_refused(tmp_path: Path) -> None:
    async with served(tmp_path, "[limits]\nmax_body_bytes = 100") as here:
        assert (await here.ask(b"x" * 101)).status_code == 413


@pytest.mark.parametrize("model", ["Digits", "..", "a b", "%2e%2e%2fetc", "x" * 65])
def test_a_name_that_no_model_can_have_is_not_found(tmp_path: Path, model: str) -> None:
    @virtual_time
    async def play() -> None:
        async with served(tmp_path) as here:
            here.box.serve(MemoryWorker(script=echo))
            assert (await here.ask(model=model)).status_code == 404

    play()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"messages": ',
        b'{"inputs": "x"}',
        b'{"messages": [], "model": 5}',
        b'{"messages": [], "model": "\xff"}',
        b"[" * 100_000,
    ],
)
def test_a_chat_that_does_not_parse_is_a_bad_request(tmp_path: Path, body: bytes) -> None:
    @virtual_time
    async def play() -> None:
        async with served(tmp_path) as here:
            answer = await here.client.post("/v1/chat/completions", content=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad_request")

    play()


@virtual_time
async def test_a_token_is_asked_for_where_one_is_configured_and_health_is_open(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    async with served(tmp_path, f'[http]\ntoken_file = "{tmp_path}/token"') as here:
        here.box.serve(MemoryWorker(script=echo))
        for said in (b"", b"Bearer wrong", b"Bearer s3cret\xe9"):
            headers = {b"authorization": said}
            assert (await here.ask(headers=headers)).status_code == 403  # type: ignore[arg-type]
            assert (await here.client.get("/metrics", headers=headers)).status_code == 403
            assert (await here.client.get("/v1/models", headers=headers)).status_code == 403
        assert (await here.ask(authorization="Bearer s3cret")).status_code == 200
        assert (await here.client.get("/healthz")).status_code == 200


@virtual_time
async def test_ready_is_told_by_status_and_in_words(tmp_path: Path) -> None:
    async with served(tmp_path) as here:
        assert (await here.client.get("/readyz")).status_code == 503
        here.health.state = "online"
        answer = await here.client.get("/readyz")
        assert (answer.status_code, answer.json()["ready"]) == (200, True)
        here.health.state = "draining"
        assert (await here.client.get("/readyz")).status_code == 503


@virtual_time
async def test_models_and_metrics_are_listed(tmp_path: Path) -> None:
    async with served(tmp_path) as here:
        here.box.serve(MemoryWorker(script=echo))
        await here.ask()
        listed = (await here.client.get("/v1/models")).json()
        assert [model["id"] for model in listed["data"]] == ["digits"]
        metrics = await here.client.get("/metrics")
        assert 'spillway_answers_total{model="digits",route="local",reason="fits",code=""} 1' in metrics.text


@virtual_time
async def test_a_model_s_name_from_the_cloud_that_no_header_can_hold_stays_out_of_the_headers(tmp_path: Path) -> None:
    def named(_request: Request) -> list[Reply]:
        return [Reply(status="ok", final=True, body=b"{}", model="large\r\nSet-Cookie: x=1")]

    async with served(tmp_path, POOL, cloud=MemoryCloud(named)) as here:
        answer = await here.ask()
        assert answer.status_code == 200
        assert "spillway-model" not in answer.headers
        assert "set-cookie" not in answer.headers


@virtual_time
async def test_while_the_box_drains_new_requests_are_refused(tmp_path: Path) -> None:
    async with served(tmp_path) as here:
        here.box.serve(MemoryWorker(script=echo))
        await here.box.service.drain(0)
        answer = await here.ask()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")


Message = MutableMapping[str, Any]


@pytest.mark.parametrize("stream", [False, True])
def test_an_asker_that_closes_its_connection_has_its_request_cancelled(tmp_path: Path, stream: bool) -> None:
    @virtual_time
    async def play() -> None:
        async with served(tmp_path) as here:
            worker = here.box.serve(MemoryWorker())
            gone = asyncio.Event()
            body = msgspec.json.encode(CHAT | {"stream": stream})
            said: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

            async def receive() -> Message:
                if said:
                    return said.pop()
                await gone.wait()
                return {"type": "http.disconnect"}

            async def send(_message: Message) -> None:
                if gone.is_set():
                    raise OSError("the connection is closed")

            scope = {
                "type": "http",
                "asgi": {"version": "3.0"},
                "http_version": "1.1",
                "method": "POST",
                "path": "/v1/chat/completions",
                "raw_path": b"/v1/chat/completions",
                "query_string": b"",
                "root_path": "",
                "scheme": "http",
                "headers": [],
                "server": ("box", 80),
                "client": ("asker", 1),
            }
            asking = asyncio.ensure_future(here.app(scope, receive, send))
            await turns()
            if stream:
                worker.answer(worker.asks[0], b"{}", final=False)
                await turns()
            gone.set()
            await asyncio.gather(asking, return_exceptions=True)
            await turns()
            assert worker.cancels == [worker.asks[0].ticket]
            assert here.box.service.intake.tickets == set()

    play()


@virtual_time
async def test_a_models_address_tells_what_it_is_for(tmp_path: Path) -> None:
    async with served(tmp_path) as here:
        here.box.serve(MemoryWorker())
        told = await here.client.get("/models/digits")
        assert (told.status_code, told.json()) == (
            200,
            {"model": "digits", "serving": "digits@1", "queued": 0, "ask": "POST /models/digits"},
        )
        unknown = await here.client.get("/models/else")
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
