"""An in-memory twin of the hand-off, as the service sees it: answers by script, or never."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence

import msgspec

from cloud_sync.errors import HandoffError
from cloud_sync.exchange import Reply
from models.request import Request

Script = Callable[[Request], Sequence[Reply] | Exception | None]


class Sent(msgspec.Struct, frozen=True):
    """One request that was handed off."""

    ident: str
    request: Request
    pool: str
    deadline_at: float


def from_gateway(request: Request) -> list[Reply]:
    """Answer with the request's own body, as a large model in the cloud would."""
    body = msgspec.json.encode({"outputs": request.body.decode(errors="replace")})
    return [Reply(status="ok", final=True, body=body, model="large@9", compute_ms=50.0)]


class MemoryCloud:
    """`script` gives the replies, an exception to raise, or None for an answer that never comes."""

    def __init__(self, script: Script = from_gateway, *, connected: bool = True) -> None:
        self.connected = connected
        self.script = script
        self.sent: list[Sent] = []
        self.closed: list[str] = []

    async def send(self, ident: str, request: Request, pool: str, deadline_at: float) -> AsyncGenerator[Reply, None]:
        self.sent.append(Sent(ident, request, pool, deadline_at))
        try:
            replies = self.script(request)
            if isinstance(replies, Exception):
                raise replies
            if replies is None:
                await self._silence(pool, deadline_at)
            for reply in replies or ():
                await asyncio.sleep(0)
                yield reply
        finally:
            self.closed.append(ident)

    async def _silence(self, pool: str, deadline_at: float) -> None:
        try:
            async with asyncio.timeout_at(deadline_at):
                await asyncio.Event().wait()
        except TimeoutError:
            raise HandoffError("deadline_exceeded", f"no answer from pool {pool!r} in time") from None
