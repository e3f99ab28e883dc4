"""A small OpenAI-compatible endpoint over real HTTP, which does what the prompt says."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


class Endpoint:
    """Answers `slow 2 ...` after two seconds, `busy ...` with 429 the first time, anything else at once.

    An answer is the prompt in capitals, word by word where it is streamed.
    """

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.url = ""
        self._busy: set[str] = set()

    def prompts(self) -> list[str]:
        """Return what was asked, in the order of arrival."""
        return [chat["messages"][-1]["content"] for chat in self.asked]

    async def chat(self, request: Request) -> Response:
        chat = json.loads(await request.body())
        self.asked.append(chat)
        self.headers.append(dict(request.headers))
        prompt = chat["messages"][-1]["content"]
        if prompt.startswith("busy") and prompt not in self._busy:
            self._busy.add(prompt)
            return JSONResponse({"error": {"message": "slow down"}}, 429, {"Retry-After": "1"})
        if prompt.startswith("slow"):
            await asyncio.sleep(float(prompt.split()[1]))
        words = prompt.upper().split(" ")
        if chat.get("stream"):
            return StreamingResponse(_events(chat["model"], words), media_type="text/event-stream")
        return JSONResponse({
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": chat["model"],
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": " ".join(words)},
                    "finish_reason": "stop",
                }
            ],
            "usage": {"prompt_tokens": len(words), "completion_tokens": len(words), "total_tokens": 2 * len(words)},
        })  # fmt: skip


async def _events(model: str, words: list[str]) -> AsyncIterator[bytes]:
    def event(choices: list[dict[str, Any]], **more: object) -> bytes:
        chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": model, "choices": choices}
        return b"data: " + json.dumps(chunk | more).encode() + b"\n\n"

    yield event([{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}])
    for number, word in enumerate(words):
        await asyncio.sleep(0.01)
        yield event([{"index": 0, "delta": {"content": word if not number else f" {word}"}, "finish_reason": None}])
    yield event([{"index": 0, "delta": {}, "finish_reason": "stop"}])
    usage = {"prompt_tokens": len(words), "completion_tokens": len(words), "total_tokens": 2 * len(words)}
    yield event([], usage=usage)
    yield b"data: [DONE]\n\n"


@contextlib.contextmanager
def serving(endpoint: Endpoint) -> Iterator[Endpoint]:
    """Serve on a free loopback port, in a thread of its own."""
    app = Starlette(routes=[Route("/v1/chat/completions", endpoint.chat, methods=["POST"])])
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    endpoint.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield endpoint
    finally:
        server.should_exit = True
        server.force_exit = True
        thread.join(5)
        listener.close()
