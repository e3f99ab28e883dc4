"""One MQTT 5 connection that is driven by the event loop and comes back by itself.

The only file that knows paho; the values it takes and gives are in `messages`. Messages are acknowledged by hand and
in the order of arrival (MQTT 5 section 4.6); a QoS 1 publish is done when its PUBACK has come, and outlives a
reconnection.
"""

# Long because paho is known to this file alone: what it asks of its user cannot be put into two.

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import itertools
import logging
import os
import random
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt import MQTTException
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from cloud_sync.messages import MAX_TEXT_BYTES, Details, LinkSettings, Message, Will, is_text

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 10.0
MAX_WINDOW = 1000
MAX_HELD = 10_000
MAX_PACKET_BYTES = (1 << 28) + 4
"""The most that MQTT can say of a packet's length, and what says it."""
FILTERS_AT_ONCE = 8
"""What AWS IoT Core takes in one SUBSCRIBE."""
TAKEN_OVER = 0x8E
FIRST_FAILURE = 0x80
KEPT_BY_PAHO = (MQTTErrorCode.MQTT_ERR_SUCCESS, MQTTErrorCode.MQTT_ERR_NO_CONN, MQTTErrorCode.MQTT_ERR_CONN_LOST)
"""What `publish` says of a QoS 1 message that leaves now or with the next connection."""


_Held = tuple[str, bytes, int, bool, "Details | None", "asyncio.Future[None]"]


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
        self._filters: dict[str, tuple[int, bool]] = {}
        self._optional: dict[str, Callable[[str], None]] = {}
        self._subscribing: dict[int, list[str]] = {}
        self._max_packet_bytes = MAX_PACKET_BYTES
        self._published: dict[int, asyncio.Future[None]] = {}
        self._unacknowledged: collections.deque[Message] = collections.deque()
        self._held: collections.deque[_Held] = collections.deque()
        self._window = 0  # the server's word is not known before the first CONNACK
        self._closing = asyncio.Event()
        self._forgotten: set[str] = set()
        self._connection = 0
        self._lost = asyncio.Event()
        self._up = asyncio.Event()
        self._refusal: ReasonCode | None = None
        self._writing: int | None = None
        self._reading: int | None = None
        self._in_read = False
        self._quick: Callable[[], None] = _nothing
        self._client = self._new_client(will)

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
            self._subscribe_all({topic: (qos, retain_as_published)})
            self._flush()

    def unsubscribe(self, topic: str) -> None:
        """Take no more messages of this filter; a session that the broker keeps is told on each connection."""
        self._filters.pop(topic, None)
        self._forgotten.add(topic)
        if self.connected:
            self._client.unsubscribe(topic)
            self._flush()

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
        if not _is_sendable(topic, details):
            done.set_exception(ConnectionError("no broker takes such a topic or such properties"))
        elif not qos:
            self._publish(topic, payload, 0, retain, details, done)
        elif not self._held and len(self._published) < self._window:
            self._publish(topic, payload, qos, retain, details, done)
        elif len(self._held) < (MAX_HELD // 2 if expendable else MAX_HELD):
            self._held.append((topic, payload, qos, retain, details, done))
        else:
            done.set_exception(ConnectionError(f"{len(self._held)} messages wait for the broker already"))
        self._flush()
        return done

    def _publish(
        self,
        topic: str,
        payload: bytes,
        qos: int,
        retain: bool,  # noqa: FBT001 - as MQTT has it
        details: Details | None,
        done: asyncio.Future[None],
    ) -> None:
        """Give a message to paho; `done` is set by its PUBACK, or here."""
        size = _packet_bytes(topic, payload, details)
        if size > self._max_packet_bytes:
            # The broker would close the connection over it, each time it comes.
            limit = self._max_packet_bytes
            done.set_exception(ConnectionError(f"{size} bytes are over the {limit} that the broker takes"))
            return
        try:
            info = self._client.publish(topic, payload, qos, retain, _packed(details) if details is not None else None)
        except (ValueError, MQTTException) as error:
            done.set_exception(ConnectionError(f"cannot publish: {type(error).__name__}"))
            return
        if qos and info.rc in KEPT_BY_PAHO:
            self._published[info.mid] = done
        elif info.rc == MQTTErrorCode.MQTT_ERR_SUCCESS:
            done.set_result(None)
        else:
            done.set_exception(ConnectionError(f"cannot publish: {paho.error_string(info.rc)}"))

    def acknowledge(self, message: Message) -> None:
        """Settle a QoS 1 message; the PUBACKs leave in the order of arrival."""
        message.settled = True
        if not self.connected:
            return
        while self._unacknowledged and self._unacknowledged[0].settled:
            self._client.ack(self._unacknowledged.popleft().mid, 1)
        self._flush()

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
            if self._refusal is not None and self._refusal.value == TAKEN_OVER:
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
                while self.connected and self._client.want_write():  # noqa: ASYNC110 - paho tells nobody when
                    await asyncio.sleep(0.01)
                if self.connected and self._reading is not None:
                    await self._say_goodbye(self._reading)
        self._lost.set()
        self._let_go()

    async def _say_goodbye(self, fileno: int) -> None:
        """Send DISCONNECT and read to the end: closing a socket with bytes unread would take back what was sent."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(fileno)
        self._reading = None
        with socket.socket(fileno=os.dup(fileno)) as kept, contextlib.suppress(OSError):
            kept.setblocking(False)  # noqa: FBT003 - as the socket has it
            self._client.disconnect()
            while self._client.want_write() and self._client.socket() is not None:
                await asyncio.sleep(0.01)
                self._client.loop_write()
            kept.shutdown(socket.SHUT_WR)
            while await loop.sock_recv(kept, 1 << 16):
                pass

    # The rest is the connection itself.

    def _new_client(self, will: Will | None) -> paho.Client:
        settings = self.settings
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=settings.client_id,
            protocol=MQTTProtocolVersion.MQTTv5,
            manual_ack=True,
            reconnect_on_failure=False,
        )
        if settings.username:
            password = Path(settings.password_file).read_text("utf-8").strip() if settings.password_file else None
            client.username_pw_set(settings.username, password)
        if settings.ca or settings.certificate:
            client.tls_set_context(_tls_context(settings))
        if will is not None:
            client.will_set(will.topic, will.payload, will.qos, will.retain)
        client.max_inflight_messages_set(0)  # the window is kept here: paho's cannot follow the server's word
        client.max_queued_messages_set(0)
        client.connect_timeout = CONNECT_TIMEOUT_S
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        client.on_subscribe = self._on_subscribe
        return client

    async def _connect(self) -> None:
        """Open the socket and wait for the CONNACK."""
        self._lost.clear()
        self._refusal = None
        await self._open()
        if self._closing.is_set():
            raise ConnectionError("closed")
        self._connection += 1
        self._unacknowledged.clear()
        self._watch()
        up, lost = asyncio.ensure_future(self._up.wait()), asyncio.ensure_future(self._lost.wait())
        try:
            await asyncio.wait((up, lost), timeout=CONNECT_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            up.cancel()
            lost.cancel()
        self._require_up()

    async def _open(self) -> None:
        """Open the socket in a thread, since names, TCP and TLS block; nobody waits for that thread at a stop."""
        loop = asyncio.get_running_loop()
        opened: asyncio.Future[None] = loop.create_future()

        def settle(failure: Exception | None) -> None:
            thread.join()  # it has nothing left to do
            if opened.done():
                self._close_socket()
            elif failure is not None:
                opened.set_exception(failure)
            else:
                opened.set_result(None)

        def work() -> None:
            failure: Exception | None = None
            try:
                self._open_socket()
            except Exception as error:  # noqa: BLE001 - it is raised where the connection is waited for
                failure = error.with_traceback(None)  # which would keep a socket whose handshake failed
            try:
                loop.call_soon_threadsafe(settle, failure)
            except RuntimeError:  # the loop is closed
                self._close_socket()

        thread = threading.Thread(target=work, name="link", daemon=True)
        thread.start()
        await opened

    def _open_socket(self) -> None:
        settings = self.settings
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = settings.session_expiry_s
        properties.ReceiveMaximum = settings.receive_maximum
        properties.MaximumPacketSize = settings.max_packet_bytes
        self._client.connect(
            settings.host,
            settings.port,
            max(1, settings.keepalive_s * 3 // 4),  # paho gives up after twice this: 1.5 of what was asked
            clean_start=settings.clean_start,
            properties=properties,
        )

    def _close_socket(self) -> None:
        sock = self._client.socket()
        if sock is not None:
            sock.close()

    def _require_up(self) -> None:
        if not self.connected:
            raise ConnectionError(f"refused: {self._refusal}" if self._refusal else "no CONNACK")

    async def _serve(self) -> None:
        """Keep-alive until the connection is lost."""
        while not self._lost.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._lost.wait()
            self._client.loop_misc()
            self._flush()
            self.alive_at = asyncio.get_running_loop().time()
        log.info("link to %s:%s is down", self.settings.host, self.settings.port)

    def _watch(self) -> None:
        sock = self._client.socket()
        if sock is None:
            raise ConnectionError("closed at once")
        if isinstance(sock, socket.socket):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # A broker with Nagle's algorithm on, mosquitto's default, holds a message back until the one before is
            # acknowledged, which Linux does 40 ms later unless told otherwise, again after each read.
            self._quick = functools.partial(sock.setsockopt, socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            sock.setblocking(False)  # noqa: FBT003 - as the socket has it
        self._reading = sock.fileno()
        asyncio.get_running_loop().add_reader(self._reading, self._read)
        self._flush()

    def _read(self) -> None:
        self._in_read = True
        try:
            self._quick()
            self._client.loop_read()
            sock = self._client.socket()
            while isinstance(sock, ssl.SSLSocket) and sock.pending():
                self._client.loop_read()
                sock = self._client.socket()
        except (MQTTException, ValueError, IndexError, UnicodeDecodeError, OSError) as error:
            # paho raises whatever its parser stumbles over: a broker that sends such bytes is left.
            log.warning("malformed packet from %s:%s: %s", self.settings.host, self.settings.port, error)
            self._lost.set()
            return
        finally:
            self._in_read = False
        self._flush()

    def _flush(self) -> None:
        """Write what paho holds now, and watch for room in the socket only while something is left."""
        if self._reading is None or self._in_read:  # paho calls back under a lock that writing takes too
            return
        if self._client.want_write():
            self._client.loop_write()
        loop = asyncio.get_running_loop()
        if self._client.want_write() and self._writing is None and self._client.socket() is not None:
            self._writing = self._reading
            loop.add_writer(self._writing, self._flush)
        elif not self._client.want_write() and self._writing is not None:
            loop.remove_writer(self._writing)
            self._writing = None

    def _let_go(self) -> None:
        """Stop watching the socket and close it; what is in flight waits for the next connection."""
        loop = asyncio.get_running_loop()
        if self._reading is not None:
            loop.remove_reader(self._reading)
        if self._writing is not None:
            loop.remove_writer(self._writing)
        self._reading = self._writing = None
        self._quick = _nothing
        self._close_socket()
        was_up, self.connected = self.connected, False
        self._up.clear()
        if was_up:
            self._on_down()

    def _subscribe_all(self, filters: dict[str, tuple[int, bool]]) -> None:
        wanted = [
            (topic, SubscribeOptions(qos=qos, retainAsPublished=as_published))
            for topic, (qos, as_published) in filters.items()
        ]
        for start in range(0, len(wanted), FILTERS_AT_ONCE):
            some = wanted[start : start + FILTERS_AT_ONCE]
            _, mid = self._client.subscribe(some)
            if mid is not None:
                self._subscribing[mid] = [topic for topic, _ in some]

    def _on_connect(self, _c: Any, _u: Any, _flags: Any, reason: ReasonCode, properties: Properties | None) -> None:
        if reason.is_failure:
            self._refusal = reason
            self._lost.set()
            return
        window = min(getattr(properties, "ReceiveMaximum", MAX_WINDOW), MAX_WINDOW)
        self._window = min(
            self._window or window, window
        )  # the lowest ever: paho sends all that it holds again at once
        self._max_packet_bytes = getattr(properties, "MaximumPacketSize", MAX_PACKET_BYTES)
        self._subscribing.clear()
        self.connected = True
        self.alive_at = asyncio.get_running_loop().time()
        if self._filters:
            self._subscribe_all(self._filters)
        for topic in self._forgotten:
            self._client.unsubscribe(topic)
        log.info("link to %s:%s is up", self.settings.host, self.settings.port)
        self._up.set()
        self._on_up()
        self._send_held()

    def _on_disconnect(self, _c: Any, _u: Any, _flags: Any, reason: ReasonCode, _p: Any) -> None:
        self._refusal = reason
        self._lost.set()

    def _on_subscribe(self, _c: Any, _u: Any, mid: int, reasons: list[ReasonCode], _p: Any) -> None:
        topics = [*self._subscribing.pop(mid, ()), *("" for _ in reasons)]
        refused = []
        for topic, reason in zip(topics, reasons, strict=False):
            if reason.value >= FIRST_FAILURE and topic in self._optional:
                self._optional[topic](str(reason))
            elif reason.value >= FIRST_FAILURE:
                refused.append(reason)
        if refused or not reasons:
            log.error("the broker refused a subscription: %s", ", ".join(map(str, refused)) or "no reason given")
            self._lost.set()

    def _on_publish(self, _c: Any, _u: Any, mid: int, reason: ReasonCode, _p: Any) -> None:
        done = self._published.pop(mid, None)
        self._send_held()
        if done is None or done.done():
            return
        if reason.is_failure:
            done.set_exception(ConnectionError(f"the broker refused a message: {reason}"))
        else:
            done.set_result(None)

    def _send_held(self) -> None:
        while self._held and len(self._published) < self._window:
            self._publish(*self._held.popleft())

    def _on_message(self, client: paho.Client, _userdata: Any, raw: paho.MQTTMessage) -> None:
        try:
            message = self._message(raw)
        except UnicodeDecodeError:
            self.dropped += 1
            if raw.qos:
                client.ack(raw.mid, raw.qos)
            return
        if message.qos:
            self._unacknowledged.append(message)
        try:
            self._deliver(message)
        except Exception:  # a message that trips over a mistake of ours must not take the link and all others with it
            log.exception("a message on %s could not be taken", message.topic)
            self.dropped += 1
            if message.qos:
                self.acknowledge(message)

    def _message(self, raw: paho.MQTTMessage) -> Message:
        return Message(
            topic=raw.topic,
            payload=bytes(raw.payload),
            qos=raw.qos,
            retain=raw.retain,
            duplicate=raw.dup,
            mid=raw.mid,
            connection=self._connection,
            details=_unpacked(raw.properties),
        )


def _ceiling_s(failures: int, max_backoff_s: float) -> float:
    """Return the longest that a link waits, beside its one second, after so many failures in a row."""
    return min(max_backoff_s, 2.0 ** min(failures, 16))


def _tls_context(settings: LinkSettings) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=settings.ca or None)  # None: the CAs of the system
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if settings.certificate:
        context.load_cert_chain(settings.certificate, settings.key)
    return context


def _is_sendable(topic: str, details: Details | None) -> bool:
    """Whether a broker takes a message; over one that it does not it closes the connection, each time it comes."""
    if details is None:
        return _is_topic(topic)
    topics = (topic,) if details.response_topic is None else (topic, details.response_topic)
    texts = [details.content_type or "", *itertools.chain.from_iterable(details.user)]
    return (
        all(map(_is_topic, topics)) and all(map(is_text, texts)) and len(details.correlation or b"") <= MAX_TEXT_BYTES
    )


def _is_topic(text: str) -> bool:
    return text != "" and "+" not in text and "#" not in text and is_text(text)


def _packet_bytes(topic: str, payload: bytes, details: Details | None) -> int:
    """Return how long a PUBLISH becomes, a few bytes too many at most (MQTT 5 section 3.3)."""
    size = 5 + 2 + len(topic.encode()) + 2 + 1 + len(payload)
    if details is not None:
        texts = [details.response_topic or "", details.content_type or "", *itertools.chain.from_iterable(details.user)]
        size += 16 + len(details.correlation or b"") + sum(3 + len(text.encode()) for text in texts)
    return size


def _packed(details: Details) -> Properties:
    properties = Properties(PacketTypes.PUBLISH)
    if details.response_topic is not None:
        properties.ResponseTopic = details.response_topic
    if details.correlation is not None:
        properties.CorrelationData = details.correlation
    if details.content_type is not None:
        properties.ContentType = details.content_type
    if details.expiry_s is not None:
        properties.MessageExpiryInterval = details.expiry_s
    if details.user:
        properties.UserProperty = list(details.user)
    return properties


_NO_DETAILS = Details()
_PROPERTY_MACHINERY = {"packetType", "types", "names", "properties"}


def _unpacked(properties: Properties | None) -> Details:
    if properties is None or not vars(properties).keys() - _PROPERTY_MACHINERY:
        return _NO_DETAILS
    return Details(
        response_topic=getattr(properties, "ResponseTopic", None),
        correlation=getattr(properties, "CorrelationData", None),
        content_type=getattr(properties, "ContentType", None),
        expiry_s=getattr(properties, "MessageExpiryInterval", None),
        user=tuple(getattr(properties, "UserProperty", ())),
    )
