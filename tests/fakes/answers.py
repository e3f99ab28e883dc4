"""An in-memory endpoint for the gateway's desk: says what a test scripts, on whatever clock the loop has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from cloud_sync.gateway.upstream import Piece
from cloud_sync.sealing import Content
from models.errors import RequestError
from models.request import Request


class ScriptedAnswers:
    """Answers each request with `words` (the last is final), `pause_s` before each; or with `error`."""

    def __init__(self, *words: str, pause_s: float = 1.0, error: Exception | None = None) -> None:
        self.words = words or ("answer",)
        self.pause_s = pause_s
        self.error = error
        self.asked: list[Request] = []
        self.closed = 0

    async def answer(self, request: Request, deadline_at: float) -> AsyncGenerator[Piece, None]:
        del deadline_at
        self.asked.append(request)
        try:
            for number, word in enumerate(self.words, 1):
                await asyncio.sleep(self.pause_s)
                final = number == len(self.words)
                if final and self.error is not None:
                    raise self.error
                yield Piece(Content(body=word.encode(), content_type="text/plain", model="big"), final=final)
        finally:
            self.closed += 1


BUSY = RequestError("overloaded", "the endpoint answered 429")
