"""One request that was handed off: what its gateways say, and which of it its asker gets."""

from __future__ import annotations

import asyncio
import collections
from typing import Final

import msgspec

from cloud_sync.errors import HandoffError
from cloud_sync.sealing import Content, Packed
from cloud_sync.wire import ReplyHeader, from_sequence
from models.answer import render_error
from models.errors import HTTP_STATUS
from models.request import Request

FIRST_RESEND_S: Final = 5.0
MAX_SECRETS: Final = 8
"""Attempts of one request whose answers are still taken; the oldest is forgotten first."""
MAX_RUNS: Final = 4
"""Gateways that may work on one request before its answer begins; the oldest is forgotten first."""
MAX_HELD: Final = 64
"""Pieces of a run that may wait for an earlier one that is late."""


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """One piece of an answer. An error's `body` is in the asker's dialect; `code` and `message` say it plainly."""

    status: str
    final: bool
    body: bytes
    content_type: str = "application/json"
    model: str = ""
    code: str = ""
    message: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    compute_ms: float = 0.0


class _Run:
    """The numbered pieces that one gateway makes of one answer."""

    def __init__(self) -> None:
        self.next = 0
        self.heard_at = float("-inf")
        self.held: dict[int, tuple[ReplyHeader, Content]] = {}


class Exchange:
    """One request on its way: its attempts' secrets, and the one run of pieces that its asker gets.

    Times are the loop's seconds. `request` is without its body; `body` is what is sealed.
    """

    def __init__(self, ident: str, request: Request, pool: str, deadline_at: float, body: Packed) -> None:
        self.id = ident
        self.request = msgspec.structs.replace(request, body=b"")
        self.pool = pool
        self.deadline_at = deadline_at
        self.body = body
        self.secrets: collections.deque[bytes] = collections.deque(maxlen=MAX_SECRETS)
        self.sent = 0
        self.delay_s = FIRST_RESEND_S
        self.heard_at = float("-inf")
        self.acknowledged = True
        self.closed = False
        self._refusal = ""
        self._error: HandoffError | None = None
        self._runs: dict[int, _Run] = {}
        self._shown: _Run | None = None
        self._ready: collections.deque[Reply] = collections.deque()
        self._news = asyncio.Event()

    async def next(self) -> Reply:
        """Wait for the next piece; raises HandoffError, `deadline_exceeded` where none comes in time."""
        while not self._ready:
            if self._error is not None:
                raise self._error
            self._news.clear()
            try:
                async with asyncio.timeout_at(self.deadline_at):
                    await self._news.wait()
            except TimeoutError:
                message = f"no answer from pool {self.pool!r} in time, asked {self.sent} times{self._refusal}"
                raise HandoffError("deadline_exceeded", message) from None
        return self._ready.popleft()

    def fail(self, error: HandoffError) -> None:
        """End the request on this side."""
        self._error = error
        self._news.set()

    def close(self) -> None:
        """Let go of what is no longer needed."""
        self.closed = True
        self.body = Packed(0, b"")
        self._runs.clear()

    def take(self, header: ReplyHeader, content: Content, now: float) -> str:
        """Take in an authentic piece; return what became of it: taken, held, duplicate, other_run or refused."""
        self.heard_at = now
        number, run = self._run_of(header, now)
        if run is None:
            return "other_run"
        if number < run.next or number in run.held:
            return "duplicate"
        if number > run.next:
            if len(run.held) < MAX_HELD:
                run.held[number] = (header, content)
            return "held"
        if self._shown is None and content.code and self._may_still_come(run, content, now):
            self._refusal = f"; a gateway answered {content.code}"
            self._runs.pop(from_sequence(header.sequence)[0])
            return "refused"
        self._deliver(run, header, content)
        while run.next in run.held:
            self._deliver(run, *run.held.pop(run.next))
        return "taken"

    def _run_of(self, header: ReplyHeader, now: float) -> tuple[int, _Run | None]:
        """Return the number of a piece and its run; None for the run where the asker has begun to get another's."""
        name, number = from_sequence(header.sequence)
        run = self._runs.get(name)
        if run is None and self._shown is None:
            run = self._runs[name] = _Run()
            if len(self._runs) > MAX_RUNS:
                self._runs.pop(next(iter(self._runs)))
        if self._shown is not None and run is not self._shown:
            return number, None
        if run is not None:
            run.heard_at = now
        return number, run

    def _may_still_come(self, run: _Run, content: Content, now: float) -> bool:
        """Whether an error is not the last word: another gateway works on it, or room may be found in time."""
        others = any(now - other.heard_at < FIRST_RESEND_S for other in self._runs.values() if other is not run)
        return others or (content.code == "overloaded" and now + self.delay_s < self.deadline_at)

    def _deliver(self, run: _Run, header: ReplyHeader, content: Content) -> None:
        run.next += 1
        if not header.final and not content.body:
            return  # a receipt: the gateway works on it
        self._shown = run
        self._ready.append(_to_reply(self.request, header, content))
        self._news.set()


def _to_reply(request: Request, header: ReplyHeader, content: Content) -> Reply:
    if header.status == "error":
        code = content.code if content.code in HTTP_STATUS else "internal"
        message = content.body.decode(errors="replace")
        body = render_error(request.dialect, code, message)
        return Reply(status="error", final=True, body=body, code=code, message=message, model=content.model)
    return Reply(
        status=header.status,
        final=header.final,
        body=content.body,
        content_type=content.content_type,
        model=content.model,
        tokens_in=content.tokens_in,
        tokens_out=content.tokens_out,
        compute_ms=content.compute_ms,
    )
