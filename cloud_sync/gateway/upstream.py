"""An OpenAI-compatible endpoint: questions in, pieces of answers out. The only file that knows httpx."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from typing import Final

import httpx
import msgspec

from cloud_sync.gateway.chat import (
    Completion,
    parse_completion,
    to_answer,
    to_chats,
    to_error,
    to_failure,
    to_last,
    to_piece,
)
from cloud_sync.sealing import Content
from models.errors import RequestError
from models.request import Request

MAX_ANSWER_BYTES: Final = 8 << 20
MAX_ERROR_BYTES: Final = 16 << 10
MAX_LINE_BYTES: Final = 1 << 20
MAX_ATTEMPTS: Final = 5
FIRST_RETRY_S: Final = 0.5
CONNECT_TIMEOUT_S: Final = 5.0
TRY_AGAIN: Final = frozenset({429, 503})


class Piece(msgspec.Struct, frozen=True):
    """A piece of an answer, in the asker's dialect."""

    content: Content
    final: bool


class Upstream:
    """One endpoint. `models` maps a box's names of models to the endpoint's; empty: they are the same."""

    def __init__(
        self,
        url: str,
        *,
        models: Mapping[str, str] | None = None,
        api_key: str = "",
        concurrency: int = 32,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._models = models or {}
        self._client = httpx.AsyncClient(
            base_url=url.rstrip("/") + "/",
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
            transport=transport,
            trust_env=False,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def answer(self, request: Request, deadline_at: float) -> AsyncGenerator[Piece, None]:
        """Yield the answer, its last piece final; `deadline_at` in the loop's seconds. Raises RequestError."""
        begun = time.monotonic()
        model = self._models.get(request.model, "" if self._models else request.model)
        if not model:
            raise RequestError("model_not_found", f"the pool does not offer {request.model}")
        chats = to_chats(request, model)
        pieces = (
            self._streamed(request, chats[0], deadline_at)
            if request.stream
            else self._whole(request, chats, deadline_at)
        )
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                compute_ms = (time.monotonic() - begun) * 1e3 if piece.final else 0.0
                content = msgspec.structs.replace(piece.content, compute_ms=compute_ms)
                yield Piece(content, piece.final)

    async def _whole(self, request: Request, chats: list[bytes], deadline_at: float) -> AsyncGenerator[Piece, None]:
        bodies, answers = [], []
        for chat in chats:
            bodies.append(await self._asked(chat, deadline_at))
            answers.append(parse_completion(bodies[-1]))
            if not answers[-1].choices:
                raise RequestError("cloud_unavailable", "the endpoint's answer is no chat completion")
        body = to_answer(request, bodies, [answer.text for answer in answers])
        yield Piece(_content(body, answers), final=True)

    async def _asked(self, chat: bytes, deadline_at: float) -> bytes:
        for attempt in itertools.count(1):
            try:
                async with self._post(chat, deadline_at) as response:
                    return await _read(response, MAX_ANSWER_BYTES)
            except _PassingError as failure:
                await _pause(attempt, failure, deadline_at)
        raise AssertionError("unreachable")

    async def _streamed(self, request: Request, chat: bytes, deadline_at: float) -> AsyncGenerator[Piece, None]:
        """Pass a stream on; ask again where it says `overloaded` before anything of it was passed on."""
        for attempt in itertools.count(1):
            begun = False
            try:
                async with contextlib.aclosing(self._stream(request, chat, deadline_at)) as pieces:
                    async for piece in pieces:
                        begun = True
                        yield piece
            except _PassingError as failure:
                if begun:
                    raise
                await _pause(attempt, failure, deadline_at)
            else:
                return

    async def _stream(self, request: Request, chat: bytes, deadline_at: float) -> AsyncGenerator[Piece, None]:
        """Pass chunks on as they come.

        The chunks that end the text wait, so that the last piece is the last chunk; one without text that opens the
        stream waits for the next, since an endpoint may send it before it finds that it has no room.
        """
        opening: list[Piece] | None = None
        held: list[tuple[bytes, str]] = []
        told = Completion()
        async with self._post(chat, deadline_at) as response:
            async for data in _events(response):
                if data == b"[DONE]":
                    break
                chunk = parse_completion(data)
                if chunk.error:
                    raise _broken_off(chunk.error)
                for piece in opening or ():
                    yield piece
                told.model, told.usage = chunk.model or told.model, chunk.usage or told.usage
                body = to_piece(request, data, chunk.text)
                if chunk.ends:
                    held.append((data, chunk.text))
                elif chunk.text or body is data:
                    piece = Piece(_content(body, [told]), final=False)
                    if chunk.text or opening is not None:
                        yield piece
                    else:
                        opening = [piece]
                        continue
                opening = []
        if not held:
            raise RequestError("cloud_unavailable", "the endpoint broke the answer off")
        last = to_last(request, held)
        for number, body in enumerate(last, 1):
            yield Piece(_content(body, [told]), final=number == len(last))

    @contextlib.asynccontextmanager
    async def _post(self, chat: bytes, deadline_at: float) -> AsyncGenerator[httpx.Response, None]:
        """Ask once; raises RequestError, _PassingError where the endpoint is busy or cannot be reached."""
        left_s = deadline_at - asyncio.get_running_loop().time()
        timeout = httpx.Timeout(max(left_s, 0.001), connect=max(0.001, min(CONNECT_TIMEOUT_S, left_s)))
        request = self._client.build_request(
            "POST", "chat/completions", content=chat, headers={"Content-Type": "application/json"}, timeout=timeout
        )
        try:
            response = await self._client.send(request, stream=True)
        except httpx.HTTPError as error:
            failure = _unreachable(error)
            raise _PassingError(failure.code, failure.message) from error
        try:
            with _named():
                if response.status_code == httpx.codes.OK:
                    yield response
                    return
                failure = to_error(response.status_code, await _read(response, MAX_ERROR_BYTES))
            if response.status_code in TRY_AGAIN:
                raise _PassingError(failure.code, failure.message, _retry_after(response))
            raise failure
        finally:
            await response.aclose()


class _PassingError(RequestError):
    """An error where asking the endpoint again may help, not before `wait_s` seconds."""

    def __init__(self, code: str, message: str, wait_s: float = 0.0) -> None:
        super().__init__(code, message)
        self.wait_s = wait_s


async def _pause(attempt: int, failure: _PassingError, deadline_at: float) -> None:
    """Wait before asking again; raises the failure where the time is over or was tried often enough."""
    left_s = deadline_at - asyncio.get_running_loop().time()
    backoff_s = FIRST_RETRY_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, not a secret
    wait_s = max(backoff_s, failure.wait_s)
    if attempt >= MAX_ATTEMPTS or wait_s >= left_s or failure.code == "deadline_exceeded":
        raise failure
    await asyncio.sleep(wait_s)


def _broken_off(error: msgspec.Raw) -> RequestError:
    """Return what an endpoint's error in mid-stream means."""
    failure = to_failure(error)
    return _PassingError(failure.code, failure.message) if failure.code == "overloaded" else failure


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Give what goes wrong while a response is read its name."""
    try:
        yield
    except httpx.HTTPError as error:
        raise _unreachable(error) from error


def _unreachable(error: httpx.HTTPError) -> RequestError:
    if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
        return RequestError("deadline_exceeded", "the endpoint did not answer in time")
    return RequestError("cloud_unavailable", f"the endpoint cannot be reached: {type(error).__name__}")


def _retry_after(response: httpx.Response) -> float:
    """Return the seconds that the endpoint asks for; dates and nonsense count as none."""
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdigit() else 0.0


async def _read(response: httpx.Response, max_bytes: int) -> bytes:
    """Return a body; one over the limit is cut (an error's) or raises RequestError `too_large` (an answer's)."""
    body = bytearray()
    async for part in response.aiter_bytes():
        body += part
        if len(body) > max_bytes:
            if response.status_code == httpx.codes.OK:
                raise RequestError("too_large", f"the answer is over {max_bytes} bytes")
            break
    return bytes(body[:max_bytes])


async def _events(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    """Yield the data of server-sent events (one line each, as OpenAI sends them); raises RequestError."""
    buffer = b""
    total = 0
    async for part in response.aiter_bytes():
        total += len(part)
        *lines, buffer = (buffer + part).split(b"\n")
        if len(buffer) > MAX_LINE_BYTES or total > MAX_ANSWER_BYTES:
            raise RequestError("too_large", "the streamed answer is over the limit")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def _content(body: bytes, answers: list[Completion]) -> Content:
    usages = [answer.usage for answer in answers if answer.usage is not None]
    return Content(
        body=body,
        model=answers[0].model,
        tokens_in=sum(usage.prompt_tokens for usage in usages),
        tokens_out=sum(usage.completion_tokens for usage in usages),
    )
