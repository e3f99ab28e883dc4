"""One MQTT 5 connection that is driven by the event loop and comes back by itself.

The bytes are `packets`' business, the values those of `messages`. Messages are acknowledged by hand and in the order of
arrival (MQTT 5 section 4.6); a QoS 1 publish is done when its PUBACK has come, and outlives a reconnection.
"""

# Long because a connection's whole life is one thing: what each packet means depends on all the others.

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import logging
import random
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from cloud_sync import packets
from cloud_sync.messages import Details, LinkSettings, Message, Will
from cloud_sync.packets import MalformedError, UnreadableError

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10.0
MAX_WINDOW = 1000
MAX_HELD = 10_000
READ_BYTES = 128 << 10
FILTERS_AT_ONCE = 8
"""What AWS IoT Core takes in one SUBSCRIBE."""


class _Sent(msgspec.Struct):
    """A QoS 1 message until its PUBACK: packed, to be sent again after a reconnection."""

    topic: bytes
    properties: bytes
    payload: bytes
    retain: bool
    done: asyncio.Future[None]


def _nothing() -> None:
    """Default for the callbacks that tell of the link's state."""


class Link:
    """A connection to one broker; all methods are for the event loop's thread."""

    def __init__(
        self,
        settings: LinkSettings,
        *,
        on_message: Callable[[Message], None],
        will: Will | None = None,
        on_up: Callable[[], None] = _nothing,
        on_down: Callable[[], None] = _nothing,
    ) -> None:
        self.settings = settings
        self.connected = False
        self.alive_at = 0.0
        self.dropped = 0
        self._deliver = on_message
        self._on_up = on_up
        self._on_down = on_down
        self._will = will
        self._client_id = settings.client_id
        self._password = _password(settings)
        self._tls = _tls_context(settings) if settings.ca or settings.certificate else None
        self._filters: dict[str, tuple[int, bool]] = {}
        self._optional: dict[str, Callable[[str], None]] = {}
        self._subscribing: dict[int, list[str]] = {}
        self._forgotten: set[str] = set()
        self._published: dict[int, _Sent] = {}
        self._again: collections.deque[int] = collections.deque()
        """What of these the present connection has not seen yet."""
        self._held: collections.deque[_Sent] = collections.deque()
        self._unacknowledged: collections.deque[Message] = collections.deque()
        self._mids = itertools.cycle(range(1, packets.MAX_PACKET_ID + 1))
        self._asking: set[int] = set()
        self._window = 0
        self._max_packet_bytes = packets.MAX_VARINT + 5
        self._closing = asyncio.Event()
        self._connection = 0
        self._lost = asyncio.Event()
        self._up = asyncio.Event()
        self._refusal: int | None = None
        self._wire: _Wire | None = None

    def subscribe(
        self,
        topic: str,
        qos: int = 1,
        *,
        retain_as_published: bool = True,
        on_refused: Callable[[str], None] | None = None,
    ) -> None:
        """Take messages of this filter, now and after every reconnection.

        Without `retain_as_published` a message's `retain` tells that it is from before the subscription. A broker that
        refuses a filter is left, unless `on_refused` takes the reason: then the link lives without that filter.
        """
        if on_refused is not None:
            self._optional[topic] = on_refused
        self._filters[topic] = qos, retain_as_published
        self._forgotten.discard(topic)
        if self.connected:
            self._subscribe({topic: (qos, retain_as_published)})

    def unsubscribe(self, topic: str) -> None:
        """Take no more messages of this filter; a session that the broker keeps is told on each connection."""
        self._filters.pop(topic, None)
        self._forgotten.add(topic)
        if self.connected:
            self._unsubscribe(topic)

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 0,
        retain: bool = False,
        details: Details | None = None,
        expendable: bool = False,
    ) -> asyncio.Future[None]:
        """Send a message; the future is done at its PUBACK (QoS 1) or once it is written (QoS 0).

        It ends in ConnectionError for a QoS 0 message while the link is down, for what no broker takes, and where too
        many messages wait: for an `expendable` one at half the bound.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            name, properties = packets.pack_topic(topic), packets.pack_details(details)
        except ValueError:
            done.set_exception(ConnectionError("no broker takes such a topic or such properties"))
            return done
        if not qos:
            self._send_once(name, properties, payload, retain, done)
            return done
        message = _Sent(name, properties, payload, retain, done)
        if self._has_room and not self._held:
            self._send(message)
        elif len(self._held) < (MAX_HELD // 2 if expendable else MAX_HELD):
            self._held.append(message)
        else:
            done.set_exception(ConnectionError(f"{len(self._held)} messages wait for the broker already"))
        return done

    def acknowledge(self, message: Message) -> None:
        """Settle a QoS 1 message; the PUBACKs leave in the order of arrival."""
        message.settled = True
        if not self.connected or self._wire is None:
            return
        waiting = self._unacknowledged
        while waiting and waiting[0].settled:
            self._wire.write(packets.pack_puback(waiting.popleft().mid))

    async def run(self) -> None:
        """Keep the connection: connect, serve, and on any end but `close` connect again with full jitter."""
        failures = 0
        while not self._closing.is_set():
            try:
                await self._connect()
                failures = 0
                await self._serve()
            except (OSError, TimeoutError, ValueError) as error:
                failures += 1
                if not self._closing.is_set():
                    log.warning("link to %s:%s: %s", self.settings.host, self.settings.port, error)
            finally:
                self._let_go()
            if self._refusal == packets.TAKEN_OVER:
                failures = max(failures, 5)  # someone uses our client id: do not fight in a loop
            ceiling = _ceiling_s(failures, self.settings.max_backoff_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0 + random.uniform(0, ceiling)):  # noqa: S311 - jitter, not a secret
                    await self._closing.wait()

    async def probe(self) -> None:
        """Connect once and leave again; raises OSError that says what went wrong."""
        try:
            await self._connect()
        finally:
            await self.close()

    async def wait_up(self) -> None:
        """Wait until the link is connected and its subscriptions are asked for."""
        await self._up.wait()

    async def close(self, timeout_s: float = 2.0) -> None:
        """Say goodbye, and let `run` end: call it before `run` is cancelled, or the broker publishes the will.

        What was published but not acknowledged stays with the broker's session.
        """
        self._closing.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                if self.connected and self._wire is not None:
                    await self._wire.say_goodbye()
        self._lost.set()
        self._let_go()

    # The rest is the connection itself.

    async def _connect(self) -> None:
        """Open the socket and wait for the CONNACK."""
        self._lost.clear()
        self._refusal = None
        settings = self.settings
        keep_alive_s = max(1, settings.keepalive_s * 3 // 4)  # the link is given up after twice this
        hello = packets.pack_connect(
            settings, client_id=self._client_id, keep_alive_s=keep_alive_s, password=self._password, will=self._will
        )
        async with asyncio.timeout(2 * CONNECT_TIMEOUT_S):
            sock = await _dial(settings.host, settings.port)
            wire = await _Wire.open(sock, self, keep_alive_s)
        if self._closing.is_set():
            wire.cut()
            raise ConnectionError("closed")
        self._wire = wire
        self._connection += 1
        self._unacknowledged.clear()
        wire.write(hello)
        up, lost = asyncio.ensure_future(self._up.wait()), asyncio.ensure_future(self._lost.wait())
        try:
            await asyncio.wait((up, lost), timeout=CONNECT_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            up.cancel()
            lost.cancel()
        self._require_up()

    def _require_up(self) -> None:
        if not self.connected:
            refusal = self._refusal
            raise ConnectionError("no CONNACK" if refusal is None else f"refused: {packets.reason_text(refusal)}")

    async def _serve(self) -> None:
        """Keep-alive until the connection is lost."""
        while not self._lost.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._lost.wait()
            if self._wire is not None and not self._wire.keep_alive():
                break
            self.alive_at = asyncio.get_running_loop().time()
        why = "" if self._refusal is None else f": {packets.reason_text(self._refusal)}"
        log.info("link to %s:%s is down%s", self.settings.host, self.settings.port, why)

    def _let_go(self) -> None:
        """Close the socket; what is in flight waits for the next connection."""
        if self._wire is not None:
            self._wire.cut()
            self._wire = None
        was_up, self.connected = self.connected, False
        self._up.clear()
        if was_up:
            self._on_down()

    def lost(self, wire: _Wire) -> None:
        """Take note that a connection has ended."""
        if self._wire in {wire, None}:
            self._lost.set()

    def take(self, head: int, body: bytes) -> None:
        """Take one packet; raises MalformedError for one that is none, or that no broker sends."""
        kind = head >> 4
        if kind == packets.PUBLISH and self.connected:
            self._on_publish(head, body)
        elif kind == packets.PUBACK:
            self._on_puback(*packets.parse_answer(body))
        elif kind == packets.CONNACK and not self.connected:
            self._on_connack(packets.parse_connack(body))
        elif kind in {packets.SUBACK, packets.UNSUBACK}:
            self._on_suback(kind, *packets.parse_suback(body))
        elif kind == packets.DISCONNECT:
            self._refusal = body[0] if body else 0
            self._lost.set()
        elif kind != packets.PINGRESP:
            raise MalformedError(f"a packet of kind {kind}")

    def _on_connack(self, told: packets.Connack) -> None:
        if told.reason:
            self._refusal = told.reason
            self._lost.set()
            return
        self._window = min(told.receive_maximum, MAX_WINDOW)
        self._max_packet_bytes = told.max_packet_bytes
        self._client_id = self._client_id or told.client_id
        if self._wire is not None and told.keep_alive_s is not None:
            self._wire.keep_alive_s = told.keep_alive_s
        self.connected = True
        self.alive_at = asyncio.get_running_loop().time()
        self._asking.clear()
        self._subscribing.clear()
        self._subscribe(self._filters)
        for topic in self._forgotten:
            self._unsubscribe(topic)
        log.info("link to %s:%s is up", self.settings.host, self.settings.port)
        self._again = collections.deque(self._published)
        self._up.set()
        self._on_up()
        self._send_held()

    def _on_publish(self, head: int, body: bytes) -> None:
        try:
            message = packets.parse_publish(head, body)
        except UnreadableError as error:
            self.dropped += 1
            if error.mid:
                message = _nameless(error.mid, self._connection)
                self._unacknowledged.append(message)
                self.acknowledge(message)
            return
        message.connection = self._connection
        if message.qos:
            self._unacknowledged.append(message)
        try:
            self._deliver(message)
        except Exception:  # a message that trips over a mistake of ours must not take the link and all others with it
            log.exception("a message on %s could not be taken", message.topic)
            self.dropped += 1
            if message.qos:
                self.acknowledge(message)

    def _on_puback(self, mid: int, reason: int) -> None:
        message = self._published.pop(mid, None)
        if self._held or self._again:
            self._send_held()
        if message is None or message.done.done():
            return
        if reason >= packets.FIRST_FAILURE:
            refusal = ConnectionError(f"the broker refused a message: {packets.reason_text(reason)}")
            message.done.set_exception(refusal)
        else:
            message.done.set_result(None)

    def _on_suback(self, kind: int, mid: int, reasons: bytes) -> None:
        self._asking.discard(mid)
        if kind == packets.UNSUBACK:
            return
        topics = [*self._subscribing.pop(mid, ()), *("" for _ in reasons)]
        refused = []
        for topic, reason in zip(topics, reasons, strict=False):
            if reason >= packets.FIRST_FAILURE and topic in self._optional:
                self._optional[topic](packets.reason_text(reason))
            elif reason >= packets.FIRST_FAILURE:
                refused.append(reason)
        if refused or not reasons:
            told = ", ".join(map(packets.reason_text, refused)) or "no reason given"
            log.error("the broker refused a subscription: %s", told)
            self._lost.set()

    @property
    def _has_room(self) -> bool:
        """Whether one more message may be in flight on this connection."""
        return self.connected and not self._again and len(self._published) < self._window

    def _send_held(self) -> None:
        """Send what waits, first what the connection before had in flight, as far as the broker's window goes."""
        while self._again and len(self._published) - len(self._again) < self._window:
            mid = self._again.popleft()
            message = self._published.get(mid)
            if message is not None:
                self._write(mid, message, duplicate=True)
        while self._held and self._has_room:
            self._send(self._held.popleft())

    def _send(self, message: _Sent) -> None:
        """Put a message into flight."""
        mid = self._new_mid()
        self._published[mid] = message
        self._write(mid, message)

    def _write(self, mid: int, message: _Sent, *, duplicate: bool = False) -> None:
        try:
            packet = packets.pack_publish(
                message.topic, message.properties, message.payload, mid=mid, retain=message.retain, duplicate=duplicate
            )
            self._check_size(packet)
        except ValueError as error:
            del self._published[mid]
            if not message.done.done():
                message.done.set_exception(ConnectionError(f"cannot publish: {error}"))
            return
        if self._wire is not None:
            self._wire.write(packet)

    def _send_once(
        self,
        topic: bytes,
        properties: bytes,
        payload: bytes,
        retain: bool,  # noqa: FBT001 - as MQTT has it
        done: asyncio.Future[None],
    ) -> None:
        """Write a QoS 0 message now, or fail."""
        if not self.connected or self._wire is None:
            done.set_exception(ConnectionError("cannot publish: the link is down"))
            return
        try:
            packet = packets.pack_publish(topic, properties, payload, retain=retain)
            self._check_size(packet)
        except ValueError as error:
            done.set_exception(ConnectionError(f"cannot publish: {error}"))
            return
        self._wire.write(packet)
        done.set_result(None)

    def _check_size(self, packet: bytes) -> None:
        """Keep back what the broker would close the connection over, each time it comes; raises ValueError."""
        if len(packet) > self._max_packet_bytes:
            raise ValueError(f"{len(packet)} bytes are over the {self._max_packet_bytes} that the broker takes")

    def _new_mid(self) -> int:
        return next(mid for mid in self._mids if mid not in self._published and mid not in self._asking)

    def _ask(self) -> int:
        mid = self._new_mid()
        self._asking.add(mid)
        return mid

    def _subscribe(self, filters: dict[str, tuple[int, bool]]) -> None:
        wanted = [(topic, qos, as_published) for topic, (qos, as_published) in filters.items()]
        for start in range(0, len(wanted), FILTERS_AT_ONCE):
            if self._wire is not None:
                mid, some = self._ask(), wanted[start : start + FILTERS_AT_ONCE]
                self._subscribing[mid] = [topic for topic, _, _ in some]
                self._wire.write(packets.pack_subscribe(mid, some))

    def _unsubscribe(self, topic: str) -> None:
        if self._wire is not None:
            self._wire.write(packets.pack_unsubscribe(self._ask(), topic))


class _Wire(asyncio.BufferedProtocol):
    """The bytes of one connection: what is written in one turn of the loop leaves together."""

    def __init__(self, link: Link, keep_alive_s: int) -> None:
        self.keep_alive_s = keep_alive_s
        self._link = link
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._splitter = packets.Splitter(link.settings.max_packet_bytes)
        self._buffer = memoryview(bytearray(READ_BYTES))
        self._out: list[bytes] = []
        self._quick: Callable[[], None] = _nothing
        self._read_at = self._wrote_at = self._loop.time()
        self._pinged_at: float | None = None
        self._leaving = False
        self._ended = asyncio.Event()

    @classmethod
    async def open(cls, sock: socket.socket, link: Link, keep_alive_s: int) -> _Wire:
        """Take over a connected socket, with TLS where the link's settings ask for it."""
        loop = asyncio.get_running_loop()
        settings, tls = link.settings, link._tls  # noqa: SLF001 - one class in two, for the protocol's methods
        try:
            _, wire = await loop.create_connection(
                lambda: cls(link, keep_alive_s),
                sock=sock,
                ssl=tls,
                server_hostname=settings.host if tls else None,
                ssl_handshake_timeout=CONNECT_TIMEOUT_S if tls else None,
            )
        except BaseException:
            sock.close()  # a handshake that stalls would keep it
            raise
        return wire

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        sock = transport.get_extra_info("socket")
        if sock is not None and transport.get_extra_info("ssl_object") is None:
            # A broker with Nagle's algorithm on, mosquitto's default, holds a message back until the one before is
            # acknowledged, which Linux does 40 ms later unless told otherwise, again after each read.
            self._quick = lambda: sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where bytes are read to: the same place each time, for memory of this size is dear to come by."""
        del sizehint
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Take bytes; what a broker sends that is no MQTT ends the connection."""
        self._read_at = self._loop.time()
        self._pinged_at = None
        if self._leaving:
            return
        self._quick()
        try:
            for head, body in self._splitter.feed(bytes(self._buffer[:nbytes])):
                self._link.take(head, body)
        except MalformedError as error:
            settings = self._link.settings
            log.warning("malformed packet from %s:%s: %s", settings.host, settings.port, error)
            self.cut()
            self._link.lost(self)
        if self._out:
            self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        """Take note that the connection has ended."""
        del exc
        self._ended.set()
        self._link.lost(self)

    def write(self, packet: bytes) -> None:
        """Send a packet at the end of this turn of the loop."""
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(packet)

    def _flush(self) -> None:
        if not self._out or self._transport is None:
            return
        data = self._out[0] if len(self._out) == 1 else b"".join(self._out)
        self._out.clear()
        if not self._transport.is_closing():
            self._wrote_at = self._loop.time()
            self._transport.write(data)

    def keep_alive(self) -> bool:
        """Ask for a sign of life where there was none for long; False once it did not come."""
        now, limit_s = self._loop.time(), self.keep_alive_s
        if not limit_s:
            return True
        if self._pinged_at is not None and now - self._pinged_at >= limit_s:
            return False
        if self._pinged_at is None and max(now - self._wrote_at, now - self._read_at) >= limit_s:
            self._pinged_at = now
            self.write(packets.PINGREQ_BYTES)
        return True

    async def say_goodbye(self) -> None:
        """Send DISCONNECT and read to the end: closing a socket with bytes unread would take back what was sent."""
        self._leaving = True
        self.write(packets.DISCONNECT_BYTES)
        self._flush()
        if self._transport is None:
            return
        if self._transport.can_write_eof():
            self._transport.write_eof()
        else:
            self._transport.close()
        await self._ended.wait()

    def cut(self) -> None:
        """End the connection at once."""
        self._leaving = True
        self._out.clear()
        if self._transport is not None:
            self._transport.abort()


async def _dial(host: str, port: int) -> socket.socket:
    """Open a connection in a thread, since names block; nobody waits for that thread at a stop."""
    loop = asyncio.get_running_loop()
    opened: asyncio.Future[socket.socket] = loop.create_future()

    def settle(sock: socket.socket | None, failure: OSError | None) -> None:
        thread.join()  # it has nothing left to do
        if failure is not None and not opened.done():
            opened.set_exception(failure)
        elif sock is not None and opened.done():
            sock.close()
        elif sock is not None:
            opened.set_result(sock)

    def work() -> None:
        sock: socket.socket | None = None
        failure: OSError | None = None
        try:
            sock = socket.create_connection((host, port), CONNECT_TIMEOUT_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setblocking(False)  # noqa: FBT003 - as the socket has it
        except (OSError, UnicodeError) as error:  # the latter for a name that cannot be one
            failure = error if isinstance(error, OSError) else OSError(f"{host!r} is no name of a host")
        try:
            loop.call_soon_threadsafe(settle, sock, failure)
        except RuntimeError:  # the loop is closed
            if sock is not None:
                sock.close()

    thread = threading.Thread(target=work, name="link", daemon=True)
    thread.start()
    return await opened


def _nameless(mid: int, connection: int) -> Message:
    """Return what stands for a message that cannot be taken, among those to acknowledge."""
    none = Details()
    return Message(
        topic="", payload=b"", qos=1, retain=False, duplicate=False, mid=mid, connection=connection, details=none
    )


def _ceiling_s(failures: int, max_backoff_s: float) -> float:
    """Return the longest that a link waits, beside its one second, after so many failures in a row."""
    return min(max_backoff_s, 2.0 ** min(failures, 16))


def _password(settings: LinkSettings) -> str | None:
    if not settings.username or not settings.password_file:
        return None
    return Path(settings.password_file).read_text("utf-8").strip()


def _tls_context(settings: LinkSettings) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=settings.ca or None)  # None: the CAs of the system
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if settings.certificate:
        context.load_cert_chain(settings.certificate, settings.key)
    return context
