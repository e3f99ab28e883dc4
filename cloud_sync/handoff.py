"""Handing requests to a pool of gateways and taking in their answers (PROTOCOL 5), on the box.

A request is sealed at the moment of sending and sent again, sealed anew, while nothing is heard. Every answer that a
gateway makes is a run of numbered pieces; the pieces of exactly one run reach the asker, each once and in order.
"""

from __future__ import annotations

import asyncio
import collections
import heapq
import itertools
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from datetime import UTC, datetime
from typing import Final, Protocol

from cloud_sync.deployment import Pool, PoolKey
from cloud_sync.errors import HandoffError
from cloud_sync.exchange import FIRST_RESEND_S, Exchange, Reply
from cloud_sync.sealing import SECRET_BYTES, Content, open_reply, pack_body, seal_request
from cloud_sync.throttle import Throttle
from cloud_sync.wire import (
    MAX_HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    MAX_TTL_MS,
    HandoffHeader,
    ReplyMessage,
    Topics,
    parse_reply,
)
from models.request import Request

log = logging.getLogger(__name__)

LAST_RESEND_S: Final = 60.0
LINK_BACK_S: Final = 1.0
"""How soon what an outage may have swallowed is looked at again; up to twice this, so that boxes come apart."""
MAX_CLOSED: Final = 64
"""Closed exchanges that may stand in a queue beside as many as are open."""
MAX_UNACKNOWLEDGED: Final = 64
COMPRESS_IN_THREAD: Final = 64 << 10
SEALED_EXTRA_BYTES: Final = 48 + SECRET_BYTES + 2 + 2 + 1 + 256
"""What sealing adds beside header, certificate and body: HPKE, secret, lengths, flags and the longest signature."""


class Signer(Protocol):
    """What a hand-off asks of a box's identity (`cloud_sync.identity.Identity`)."""

    device: str
    certificate: bytes

    def sign(self, data: bytes) -> bytes:
        """Return a signature in the box's name."""


class Handoffs:
    """Sends requests at the pace that brokers allow, highest priority first, and gives each its answer.

    `publish` sends at QoS 1 and returns a future of the PUBACK; `clock` gives the loop's seconds, `wall` seconds
    since 1970. Set `connected` and call `set_pools` as these change. `counters` count replies by what became of them.
    """

    def __init__(
        self,
        *,
        publish: Callable[[str, bytes], asyncio.Future[None]],
        identity: Signer,
        topics: Topics,
        clock: Callable[[], float],
        wall: Callable[[], float] = time.time,
        random: Callable[[int], bytes] = os.urandom,
        max_payload: int = MAX_PAYLOAD_BYTES,
    ) -> None:
        self.counters: collections.Counter[str] = collections.Counter()
        self._publish = publish
        self._identity = identity
        self._topics = topics
        self._clock = clock
        self._wall = wall
        self._random = random
        self._max_payload = max_payload
        self._pools: dict[str, Pool] = {}
        self._exchanges: dict[str, Exchange] = {}
        self._numbers = itertools.count()
        self._ready: list[tuple[bool, int, int, Exchange]] = []
        self._later: list[tuple[float, int, Exchange]] = []
        self._unacknowledged = 0
        self._pace = Throttle(clock())
        self._wake = asyncio.Event()
        self._connected = False

    @property
    def connected(self) -> bool:
        """Whether the cloud link is up."""
        return self._connected

    @connected.setter
    def connected(self, up: bool) -> None:
        if up and not self._connected:
            self._hasten()
        self._connected = up
        self._wake.set()

    def set_pools(self, pools: Iterable[Pool]) -> None:
        """Take the pools of a trusted deployment; what waits is sealed for these from now on."""
        self._pools = {pool.name: pool for pool in pools}
        self._wake.set()

    async def send(self, ident: str, request: Request, pool: str, deadline_at: float) -> AsyncGenerator[Reply, None]:
        """Hand a request off under `ident` (16 bytes in hex) and yield its replies, the last of them final.

        Raises HandoffError: `too_large`, `unknown_pool`, `no_key`, `deadline_exceeded`, `duplicate`. Closing the
        generator takes the request back: an answer that still comes is dropped.
        """
        exchange = await self._open(ident, request, pool, deadline_at)
        try:
            final = False
            while not final:
                reply = await exchange.next()
                final = reply.final
                yield reply
        finally:
            self._close(exchange)

    def on_reply(self, payload: bytes) -> None:
        """Take in a message from the reply topic; anything that is not an authentic piece is counted and dropped."""
        try:
            message = parse_reply(payload)
        except HandoffError:
            self.counters["malformed"] += 1
            return
        exchange = self._exchanges.get(message.header.id)
        if exchange is None:
            self.counters["late"] += 1
            return
        content = self._authentic(exchange, message)
        if content is None:
            self.counters["forged"] += 1
            return
        self.counters[exchange.take(message.header, content, self._clock())] += 1

    async def run(self) -> None:
        """Root task: send what is due, at the pace that brokers allow; ends only when cancelled."""
        while True:
            exchange, wait_s = self._next_due()
            if exchange is not None:
                self._send(exchange)
                continue
            self._wake.clear()
            try:
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _open(self, ident: str, request: Request, pool: str, deadline_at: float) -> Exchange:
        if ident in self._exchanges:
            raise HandoffError("duplicate", f"request {ident} is on its way already")
        if pool not in self._pools:
            raise HandoffError("unknown_pool", f"no deployment names the pool {pool!r}")
        large = len(request.body) > COMPRESS_IN_THREAD
        body = await asyncio.to_thread(pack_body, request.body) if large else pack_body(request.body)
        room = self._max_payload - MAX_HEADER_BYTES - SEALED_EXTRA_BYTES - len(self._identity.certificate)
        if len(body.stored) > room:
            message = f"a body of {len(request.body)} bytes is over what one message holds ({room} bytes compressed)"
            raise HandoffError("too_large", message)
        exchange = Exchange(ident, request, pool, deadline_at, body)
        self._exchanges[ident] = exchange
        self._make_ready(exchange)
        return exchange

    def _close(self, exchange: Exchange) -> None:
        exchange.close()
        del self._exchanges[exchange.id]
        most = 2 * len(self._exchanges) + MAX_CLOSED
        if len(self._ready) > most:
            self._ready = [entry for entry in self._ready if not entry[3].closed]
            heapq.heapify(self._ready)
        if len(self._later) > most:
            self._later = [entry for entry in self._later if not entry[2].closed]
            heapq.heapify(self._later)

    def _authentic(self, exchange: Exchange, message: ReplyMessage) -> Content | None:
        for secret in reversed(exchange.secrets):
            try:
                return open_reply(message, secret)
            except HandoffError as error:
                if error.code != "does_not_open":
                    log.warning("a reply to %s opens but cannot be read: %s", exchange.id, error)
                    return None
        return None

    def _make_ready(self, exchange: Exchange) -> None:
        rank = (exchange.sent > 0, -exchange.request.priority)  # what was never asked goes before what is asked again
        heapq.heappush(self._ready, (*rank, next(self._numbers), exchange))
        self._wake.set()

    def _next_due(self) -> tuple[Exchange | None, float | None]:
        """Return what to send now, or how many seconds to wait (None: until something changes)."""
        now = self._clock()
        while self._later and self._later[0][0] <= now:
            self._fall_due(heapq.heappop(self._later)[2], now)
        while self._ready and self._ready[0][3].closed:
            heapq.heappop(self._ready)
        until_later = self._later[0][0] - now if self._later else None
        if not self._ready or not self._connected or self._unacknowledged >= MAX_UNACKNOWLEDGED:
            return None, until_later
        wait_s = self._pace.wait_s(now)
        if wait_s > 0:
            return None, wait_s
        return heapq.heappop(self._ready)[3], None

    def _fall_due(self, exchange: Exchange, now: float) -> None:
        """Send again what nothing was heard of; a message that the link still holds is not doubled."""
        if exchange.closed:
            return
        quiet_at = exchange.heard_at + exchange.delay_s
        if quiet_at > now:
            self._look_again(exchange, quiet_at)
        elif not exchange.acknowledged:
            self._look_again(exchange, now + FIRST_RESEND_S)
        else:
            self._make_ready(exchange)

    def _look_again(self, exchange: Exchange, at: float) -> None:
        heapq.heappush(self._later, (at, next(self._numbers), exchange))

    def _hasten(self) -> None:
        """Look soon at what the broker took before an outage; what the link still holds is sent by the link."""
        now = self._clock()
        for place, (at, number, exchange) in enumerate(self._later):
            if exchange.acknowledged:
                spread = int.from_bytes(self._random(2), "big") / 0x10000
                self._later[place] = (min(at, now + LINK_BACK_S * (1 + spread)), number, exchange)
        heapq.heapify(self._later)

    def _send(self, exchange: Exchange) -> None:
        now = self._clock()
        ttl_ms = int((exchange.deadline_at - now) * 1e3)
        if ttl_ms <= 0:
            return  # its asker is told by `next`
        try:
            topic, payload = self._seal(exchange, min(ttl_ms, MAX_TTL_MS))
        except HandoffError as error:
            exchange.fail(error)
            return
        self._pace.spend(now, len(payload))
        if exchange.sent:
            exchange.delay_s = min(LAST_RESEND_S, exchange.delay_s * 2)
            self.counters["sent_again"] += 1
        exchange.sent += 1
        exchange.acknowledged = False
        self._unacknowledged += 1
        self._publish(topic, payload).add_done_callback(lambda done: self._on_puback(exchange, done))
        self._look_again(exchange, now + exchange.delay_s)

    def _on_puback(self, exchange: Exchange, done: asyncio.Future[None]) -> None:
        self._unacknowledged -= 1
        exchange.acknowledged = True
        if not done.cancelled() and (error := done.exception()) is not None:
            self.counters["refused_by_broker"] += 1
            log.warning("hand-off %s did not leave: %s", exchange.id, error)
        self._wake.set()

    def _seal(self, exchange: Exchange, ttl_ms: int) -> tuple[str, bytes]:
        """Return topic and message of a new attempt, under a secret of its own."""
        pool = self._pools.get(exchange.pool)
        if pool is None:
            raise HandoffError("unknown_pool", f"no deployment names the pool {exchange.pool!r} any more")
        request = exchange.request
        key = _valid_key(pool, self._wall())
        header = HandoffHeader(
            kid=key.kid,
            id=exchange.id,
            device=self._identity.device,
            pool=pool.name,
            model=request.model,
            ttl_ms=ttl_ms,
            content_type=request.content_type,
            stream=request.stream,
        )
        secret = self._random(SECRET_BYTES)
        payload = seal_request(
            header,
            exchange.body,
            public_key=bytes.fromhex(key.key),
            secret=secret,
            certificate=self._identity.certificate,
            sign=self._identity.sign,
        )
        exchange.secrets.append(secret)
        return f"{pool.topic}/{request.model}", payload


def _valid_key(pool: Pool, wall: float) -> PoolKey:
    """Return the first key that is not over; raises HandoffError `no_key`."""
    for key in pool.keys:
        if not key.not_after or _seconds(key.not_after) > wall:
            return key
    raise HandoffError("no_key", f"pool {pool.name!r} has no key that is still valid")


def _seconds(time_utc: str) -> float:
    """Return seconds since 1970; a time that cannot be read is long over."""
    try:
        return datetime.fromisoformat(time_utc).astimezone(UTC).timestamp()
    except (ValueError, OverflowError):
        return float("-inf")
