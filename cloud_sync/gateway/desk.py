"""Where questions are answered, each once: bounds, deadlines, who asks again, and the sealing of what goes out.

An answer is a run of pieces that is kept until its request's time is over. A box that asks again gets the run from its
start, sealed with its newest secret; while nothing has come for three seconds it gets an empty piece, which tells it
that its question is worked on.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import secrets
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Final, Protocol

import msgspec

from cloud_sync.errors import HandoffError
from cloud_sync.gateway.opener import Asker, Question, Refusal
from cloud_sync.gateway.upstream import Piece
from cloud_sync.sealing import Content, seal_reply
from cloud_sync.wire import MAX_PAYLOAD_BYTES, RUN_BITS, ReplyHeader, Topics, to_sequence
from models.errors import RequestError
from models.request import Request

log = logging.getLogger(__name__)

RECEIPT_S: Final = 3.0
MAX_RUN_BYTES: Final = 8 << 20


class Answers(Protocol):
    """What the desk asks of an endpoint (`cloud_sync.gateway.upstream.Upstream`)."""

    def answer(self, request: Request, deadline_at: float) -> AsyncGenerator[Piece, None]:
        """Yield the answer, its last piece final; raises RequestError."""


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """What the desk holds at most: answers and their bytes for boxes that ask again, and ids of the past."""

    answers: int = 1000
    answer_bytes: int = 64 << 20
    ids: int = 50_000


class _Run:
    """One answer in the making or made: its pieces, and whom they go to."""

    def __init__(self, question: Question, expires_at: float) -> None:
        self.asker = question.asker
        self.digest = question.digest
        self.expires_at = expires_at
        self.name = secrets.randbits(RUN_BITS)
        self.pieces: list[tuple[str, Content]] = []
        self.bytes = 0
        self.said_at = float("-inf")
        self.delivered: asyncio.Future[None] | None = None
        self.ended = asyncio.Event()

    def seal(self, number: int) -> bytes:
        """Return a piece as a message, under the secret that its box used last."""
        status, content = self.pieces[number]
        header = ReplyHeader(
            id=self.asker.id,
            sequence=to_sequence(self.name, number),
            final=status != "partial",
            status=status,
        )
        return seal_reply(header, content, self.asker.secret)


class Desk:
    """Answers questions; `publish` sends at QoS 1 and returns a future of the PUBACK, `clock` the loop's seconds."""

    def __init__(
        self,
        pools: Mapping[str, tuple[Answers, int]],
        *,
        publish: Callable[[str, bytes], asyncio.Future[None]],
        topics: Topics,
        clock: Callable[[], float],
        bounds: Bounds = Bounds(),  # noqa: B008 - a frozen value
        max_payload: int = MAX_PAYLOAD_BYTES,
    ) -> None:
        """`pools` gives the endpoint of each pool, and how many questions it takes at once."""
        self.counters: collections.Counter[str] = collections.Counter()
        self.draining = False
        self._pools = pools
        self._publish = publish
        self._topics = topics
        self._clock = clock
        self._bounds = bounds
        self._max_payload = max_payload
        self._busy: collections.Counter[str] = collections.Counter()
        self._runs: dict[tuple[str, str], _Run] = {}
        self._past: collections.OrderedDict[tuple[str, str], None] = collections.OrderedDict()
        self._bytes = 0
        self._swept_at = float("-inf")

    async def settle(self, opened: Question | Refusal) -> None:
        """Answer a question or send its refusal; returns once the broker has the last of it, or none is owed."""
        if isinstance(opened, Refusal):
            self.counters[opened.code] += 1
            await self._refuse(opened.asker, opened.code, opened.message)
            return
        self._forget_expired()
        key = (opened.asker.device, opened.asker.id)
        run = self._runs.get(key)
        over = run is not None and run.ended.is_set() and run.expires_at <= self._clock()
        if run is not None and not over:
            await self._join(run, opened)
        elif over or key in self._past:
            self.counters["replayed"] += 1
            log.warning("request %s of %s is over; it came again and was dropped", key[1], key[0])
        elif self.draining or self._busy[opened.pool] >= self._pools[opened.pool][1]:
            self.counters["overloaded"] += 1
            why = "the gateway is stopping" if self.draining else "the gateway answers as many as it takes at once"
            await self._refuse(opened.asker, "overloaded", why)
        else:
            await self._begin(key, opened)

    async def _begin(self, key: tuple[str, str], question: Question) -> None:
        run = self._runs[key] = _Run(question, self._clock() + question.ttl_ms / 1e3)
        self._busy[question.pool] += 1
        receipts = asyncio.ensure_future(self._say_working(run))
        try:
            await self._work(run, question)
        finally:
            receipts.cancel()
            self._busy[question.pool] -= 1
            run.ended.set()
        await self._delivered(run)
        self._make_room()

    async def _work(self, run: _Run, question: Question) -> None:
        """Bring the run to its end, whatever happens; beyond its deadline nothing is owed."""
        request = question.request
        try:
            async with asyncio.timeout_at(run.expires_at):
                await self._copy(run, self._pools[question.pool][0], request)
        except TimeoutError:
            self.counters["expired"] += 1
            return
        except RequestError as error:
            self._fail(run, error.code, error.message)
        except asyncio.CancelledError:
            self._fail(run, "overloaded", "the gateway is stopping")
            await self._delivered(run)
            raise
        except Exception:  # a mistake of ours with one question must not leave its asker waiting
            log.exception("request %s of %s for %s failed", run.asker.id, run.asker.device, request.model)
            self._fail(run, "internal", "the gateway made a mistake; its log says more")
        status, content = run.pieces[-1]
        self.counters[content.code or status] += 1

    async def _copy(self, run: _Run, upstream: Answers, request: Request) -> None:
        async with contextlib.aclosing(upstream.answer(request, run.expires_at)) as pieces:
            async for piece in pieces:
                if run.bytes + len(piece.content.body) > MAX_RUN_BYTES:
                    raise RequestError("too_large", f"the answer is over {MAX_RUN_BYTES} bytes")
                self._say(run, "ok" if piece.final else "partial", piece.content)
        if not run.pieces or run.pieces[-1][0] == "partial":
            raise RequestError("cloud_unavailable", "the endpoint's answer has no end")

    async def _say_working(self, run: _Run) -> None:
        run.said_at = self._clock()
        while True:
            await asyncio.sleep(max(0.0, run.said_at + RECEIPT_S - self._clock()))
            if self._clock() >= run.said_at + RECEIPT_S:
                self._say(run, "partial", Content(body=b"", content_type="", model=""))

    def _fail(self, run: _Run, code: str, message: str) -> None:
        self._say(run, "error", _error(code, message))

    def _say(self, run: _Run, status: str, content: Content) -> None:
        """Add a piece to a run and send it; raises RequestError `too_large` where it fits no message."""
        run.pieces.append((status, content))
        try:
            payload = run.seal(len(run.pieces) - 1)
        except HandoffError as error:
            run.pieces.pop()
            raise RequestError("too_large", error.message) from error
        if len(payload) > self._max_payload:
            run.pieces.pop()
            raise RequestError("too_large", f"an answer of {len(content.body)} bytes is over what one message holds")
        run.bytes += len(content.body)
        self._bytes += len(content.body)
        run.said_at = self._clock()
        run.delivered = self._send(run.asker, payload)

    async def _join(self, run: _Run, question: Question) -> None:
        """Give a box that asks again what there is, and let it hear the rest."""
        if run.digest != question.digest:
            self.counters["bad_request"] += 1
            await self._refuse(question.asker, "bad_request", "id: belongs to another request of this box")
            return
        self.counters["asked_again"] += 1
        run.asker = question.asker
        for number in range(len(run.pieces)):
            run.delivered = self._send(run.asker, run.seal(number))
        await run.ended.wait()
        await self._delivered(run)

    async def _refuse(self, asker: Asker, code: str, message: str) -> None:
        header = ReplyHeader(
            id=asker.id, sequence=to_sequence(secrets.randbits(RUN_BITS), 0), final=True, status="error"
        )
        await asyncio.wait([self._send(asker, seal_reply(header, _error(code, message), asker.secret))])

    def _send(self, asker: Asker, payload: bytes) -> asyncio.Future[None]:
        done = self._publish(self._topics.handoff_reply_of(asker.device), payload)
        done.add_done_callback(self._on_puback)
        return done

    def _on_puback(self, done: asyncio.Future[None]) -> None:
        if not done.cancelled() and (error := done.exception()) is not None:
            self.counters["refused_by_broker"] += 1
            log.warning("a reply did not leave: %s", error)

    async def _delivered(self, run: _Run) -> None:
        """Wait until the broker has the last piece, while the request's time lasts."""
        if run.delivered is not None:
            await asyncio.wait([run.delivered], timeout=max(0.0, run.expires_at - self._clock()))

    def _forget_expired(self) -> None:
        """Once a second, turn answers whose time is over into ids of the past."""
        now = self._clock()
        if now < self._swept_at + 1.0:
            return
        self._swept_at = now
        for key in [key for key, run in self._runs.items() if run.expires_at <= now and run.ended.is_set()]:
            self._drop(key)
            self._past[key] = None
        while len(self._past) > self._bounds.ids:
            self._past.popitem(last=False)

    def _make_room(self) -> None:
        """Let the oldest answers go that are beyond the bounds; errors that may pass are not kept at all."""
        for key, run in list(self._runs.items()):
            crowded = len(self._runs) > self._bounds.answers or self._bytes > self._bounds.answer_bytes
            passing = bool(run.pieces) and run.pieces[-1][1].code == "overloaded"
            if run.ended.is_set() and (crowded or passing):
                self._drop(key)

    def _drop(self, key: tuple[str, str]) -> None:
        self._bytes -= self._runs.pop(key).bytes


def _error(code: str, message: str) -> Content:
    return Content(body=message.encode(), content_type="text/plain", code=code)
