"""The HTTP door: chat completions, the Hugging Face form, health and metrics. The only file that knows Starlette."""

from __future__ import annotations

import asyncio
import hmac
import json
import socket
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Final

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.responses import Response as HttpResponse
from starlette.routing import Route

from agent.config import Config, StartError
from agent.health import Health
from agent.intake import Ticket
from agent.mqtt import MAX_DEADLINE_MS
from agent.service import Service
from models.answer import render_error, with_facts
from models.body import HEADER_BYTES, OCTETS, Body, Envelope, outer_octets, parse_body, type_errors
from models.errors import HTTP_STATUS, RequestError
from models.manifest import is_name
from models.request import Dialect, Request, Response, Status

CLIENT: Final = "http"
FORM: Final = "application/x-www-form-urlencoded"


class HttpDoor:
    """Serves on one address until it is cancelled."""

    def __init__(self, config: Config, service: Service, health: Health, clock: Callable[[], float]) -> None:
        self._config = config
        self._service = service
        self._health = health
        self._clock = clock
        self._token = Path(config.http.token_file).read_text("utf-8").strip() if config.http.token_file else ""
        routes = [
            Route("/healthz", self._healthz),
            Route("/readyz", self._readyz),
            Route("/metrics", self._metrics),
            Route("/v1/models", self._models),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/models/{model}", self._infer, methods=["POST"]),
            Route("/models/{model}", self._describe),
        ]
        settings = uvicorn.Config(
            Starlette(routes=routes),
            host=config.http.host,
            port=config.http.port,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=2,
            h11_max_incomplete_event_size=16 << 10,
        )
        self._server = uvicorn.Server(settings)
        self._socket = _listen(config)

    async def run(self) -> None:
        """Serve; a root task."""
        # uvicorn would take the signals for itself: they are the daemon's.
        await self._server._serve(sockets=[self._socket])  # noqa: SLF001

    def stop(self) -> None:
        """Take no new connection, and let `run` end once the open ones are served."""
        self._server.should_exit = True

    async def _healthz(self, _request: HttpRequest) -> HttpResponse:
        return PlainTextResponse("ok\n")

    async def _readyz(self, _request: HttpRequest) -> HttpResponse:
        status = self._health.summary()
        return JSONResponse(status, 200 if status["ready"] else 503)

    async def _metrics(self, request: HttpRequest) -> HttpResponse:
        if not self._known(request):
            return _refusal(RequestError("forbidden", "a bearer token is needed"), Dialect.OPENAI)
        return PlainTextResponse(self._service.telemetry.render())

    async def _models(self, request: HttpRequest) -> HttpResponse:
        if not self._known(request):
            return _refusal(RequestError("forbidden", "a bearer token is needed"), Dialect.OPENAI)
        names = [{"id": name, "object": "model", "owned_by": "spillway"} for name in sorted(self._service.queues)]
        return JSONResponse({"object": "list", "data": names})

    async def _describe(self, request: HttpRequest) -> HttpResponse:
        """Tell whoever looks with a browser what a model's address is for."""
        if not self._known(request):
            return _refusal(RequestError("forbidden", "a bearer token is needed"), Dialect.HUGGINGFACE)
        name = request.path_params["model"]
        queue = self._service.queues.get(name)
        if queue is None:
            return _refusal(RequestError("model_not_found", "no such model"), Dialect.HUGGINGFACE)
        worker = queue.worker
        serving = worker.version.label if worker is not None else None
        told = {"model": name, "serving": serving, "queued": queue.queued, "ask": f"POST /models/{name}"}
        return JSONResponse(told)

    async def _chat(self, request: HttpRequest) -> HttpResponse:
        try:
            raw = await self._read(request)
            body = parse_body("application/json", raw)
            if body.dialect is not Dialect.OPENAI:
                raise RequestError("bad_request", "messages: is missing")
            return await self._answer(request, _model_of(raw), body)
        except RequestError as error:
            return _refusal(error, Dialect.OPENAI)

    async def _infer(self, request: HttpRequest) -> HttpResponse:
        try:
            said = request.headers.get("content-type")
            # What curl says when it is told nothing: the body itself tells more.
            raw = await self._read(request)
            body = parse_body(None if said == FORM else said, raw, request.headers.get(HEADER_BYTES))
        except RequestError as error:
            return _refusal(error, Dialect.HUGGINGFACE)
        try:
            return await self._answer(request, request.path_params["model"], body)
        except RequestError as error:
            return _refusal(error, body.dialect)

    async def _read(self, request: HttpRequest) -> bytes:
        """Return the body; raises RequestError over the limit, or where the caller may not ask."""
        if not self._known(request):
            raise RequestError("forbidden", "a bearer token is needed")
        limit = self._config.limits.max_body_bytes
        body = bytearray()
        try:
            async for piece in request.stream():
                body += piece
                if len(body) > limit:
                    raise RequestError("too_large", f"the body has more than {limit} bytes")
        except ClientDisconnect as error:
            raise RequestError("cancelled", "the connection was closed") from error
        return bytes(body)

    def _known(self, request: HttpRequest) -> bool:
        said = request.headers.get("authorization", "").removeprefix("Bearer ")
        return not self._token or hmac.compare_digest(said.encode(), self._token.encode())

    async def _answer(self, http: HttpRequest, model: str, body: Body) -> HttpResponse:
        if not is_name(model):
            raise RequestError("model_not_found", "that is no name of a model")
        replies: asyncio.Queue[Response] = asyncio.Queue()

        async def send(response: Response) -> None:
            replies.put_nowait(response)

        request = self._request(http, model, body)
        now = self._clock()
        deadline_at = now + (request.deadline_ms or 1) / 1e3
        ticket = Ticket(request, received_at=now, deadline_at=deadline_at, send=send, settle=_nothing)
        self._service.accept(ticket)
        watch = asyncio.ensure_future(_gone(http))
        first = asyncio.ensure_future(replies.get())
        try:
            await asyncio.wait((first, watch), return_when=asyncio.FIRST_COMPLETED)
            if not first.done():
                self._service.cancel(ticket)
            response = await first
        finally:
            watch.cancel()
        if response.code or not request.stream:
            return _whole(request, response)
        events = self._events(ticket, response, replies)
        headers = {"Cache-Control": "no-cache", **_headers(response)}
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)

    def _request(self, http: HttpRequest, model: str, body: Body) -> Request:
        headers = http.headers
        said = body.envelope or Envelope()
        default_ms = said.deadline_ms or self._service.policy(model).deadline_ms
        priority = 5 if said.priority is None else said.priority
        return Request(
            model=model,
            content_type=body.content_type,
            body=body.body,
            dialect=body.dialect,
            client=CLIENT,
            deadline_ms=_whole_number(
                headers.get("spillway-deadline-ms"), min(default_ms, MAX_DEADLINE_MS), 1, MAX_DEADLINE_MS
            ),
            priority=_whole_number(headers.get("spillway-priority"), priority, 0, 9),
            local_only="local-only" in {_privacy(headers.get("spillway-privacy")), said.privacy},
            stream=bool(body.stream),
        )

    async def _events(
        self, ticket: Ticket, response: Response, replies: asyncio.Queue[Response]
    ) -> AsyncGenerator[bytes, None]:
        """Yield server-sent events; closing the connection cancels the request."""
        try:
            while True:
                yield b"data: " + response.body.replace(b"\n", b" ") + b"\n\n"  # in JSON a line break is a space
                if response.final:
                    yield b"data: [DONE]\n\n"
                    return
                response = await replies.get()
        finally:
            if ticket.task is not None and not ticket.task.done():
                self._service.cancel(ticket)


def _listen(config: Config) -> socket.socket:
    """Open the door's socket before the box is ready; raises StartError where somebody else has it."""
    host, port = config.http.host, config.http.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise StartError(f"`http.port` = {port} on {host}: {error.strerror}") from error


def _nothing() -> None:
    """HTTP has nothing to acknowledge."""


async def _gone(http: HttpRequest) -> None:
    """Wait until the asker closes the connection."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _model_of(raw: bytes) -> str:
    """Return the `model` member of an OpenAI body; raises RequestError."""
    try:
        model = msgspec.json.decode(raw, type=dict[str, msgspec.Raw]).get("model")
        return str(msgspec.json.decode(model, type=str)) if model is not None else ""
    except type_errors as error:
        raise RequestError("bad_request", f"model: {error}") from error


def _whole_number(text: str | None, default: int, least: int, most: int) -> int:
    if text is None:
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 12 or not least <= int(text) <= most:
        raise RequestError(
            "bad_request", f"a Spillway header is {text[:40]!r}; a number from {least} to {most} is right"
        )
    return int(text)


def _privacy(text: str | None) -> str:
    """Return the asked privacy; a word that is neither must not let a prompt leave the box."""
    if text not in {None, "any", "local-only"}:
        raise RequestError("bad_request", f"Spillway-Privacy is {text[:40]!r}; right is any or local-only")
    return text or "any"


def _whole(request: Request, response: Response) -> HttpResponse:
    body = response.body
    if request.dialect is Dialect.HUGGINGFACE and response.status is not Status.ERROR:
        facts = {name: getattr(response, name) for name in ("route", "reason", "model")}
        times = {name: round(getattr(response, name), 3) for name in ("queued_ms", "compute_ms", "total_ms")}
        body = with_facts(body, {**facts, **times})
    status = HTTP_STATUS[response.code] if response.code else 200
    headers = _headers(response)
    if response.content_type == OCTETS:
        body, json_bytes = outer_octets(body)
        headers[HEADER_BYTES.title()] = str(json_bytes)
    return HttpResponse(body, status, headers, media_type=response.content_type)


def _headers(response: Response) -> dict[str, str]:
    return {
        f"Spillway-{name.title()}": value
        for name in ("route", "reason", "model")
        if (value := getattr(response, name)) and value.isascii() and value.isprintable()
    }


def _refusal(error: RequestError, dialect: Dialect) -> HttpResponse:
    body = json.loads(render_error(dialect, error.code, error.message))
    return JSONResponse(body, HTTP_STATUS[error.code])
