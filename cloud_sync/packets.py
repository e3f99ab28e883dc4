"""The packets of MQTT 5 that a link sends and takes, as bytes and back (OASIS MQTT 5.0). Pure: no I/O, no clock.

Only what a client needs that publishes and subscribes at QoS 0 and 1; whatever else a broker sends is malformed.
"""

# Long because a format is one thing: what is packed and what is parsed are read side by side.

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Iterable
from typing import Final

import msgspec

from cloud_sync.messages import MAX_TEXT_BYTES, Details, LinkSettings, Message, Will, is_text

CONNACK: Final = 2
PUBLISH: Final = 3
PUBACK: Final = 4
SUBACK: Final = 9
UNSUBACK: Final = 11
PINGRESP: Final = 13
DISCONNECT: Final = 14

FIRST_FAILURE: Final = 0x80
"""Reason codes from here on are refusals."""
TAKEN_OVER: Final = 0x8E
MAX_PACKET_ID: Final = 0xFFFF
MAX_VARINT: Final = (1 << 28) - 1
CACHED_TEXTS: Final = 1024
MAX_CACHED_LETTERS: Final = 256

PINGREQ_BYTES: Final = b"\xc0\x00"
DISCONNECT_BYTES: Final = b"\xe0\x00"

_REASONS: Final = {
    0x01: "it speaks no MQTT 5",  # what a broker of MQTT 3 answers
    0x80: "unspecified error",
    0x81: "malformed packet",
    0x82: "protocol error",
    0x84: "it speaks no MQTT 5",
    0x85: "client identifier not valid",
    0x86: "bad user name or password",
    0x87: "not authorized",
    0x88: "server unavailable",
    0x89: "server busy",
    0x8A: "banned",
    0x8B: "server shutting down",
    0x8D: "keep alive timeout",
    0x8E: "session taken over",
    0x8F: "topic filter invalid",
    0x90: "topic name invalid",
    0x93: "receive maximum exceeded",
    0x95: "packet too large",
    0x97: "quota exceeded",
    0x98: "administrative action",
    0x99: "payload format invalid",
    0x9A: "retain not supported",
    0x9B: "QoS not supported",
    0x9C: "use another server",
    0x9D: "server moved",
    0x9E: "shared subscriptions not supported",
    0x9F: "connection rate exceeded",
}
_LENGTH: Final = struct.Struct(">H")
_WIDE: Final = struct.Struct(">I")
# Properties by number (section 2.2.2.2): the fixed bytes of those whose value is a number.
_NUMBERS: Final = {
    0x01: 1,
    0x02: 4,
    0x11: 4,
    0x13: 2,
    0x17: 1,
    0x19: 1,
    0x21: 2,
    0x22: 2,
    0x23: 2,
    0x24: 1,
    0x25: 1,
    0x27: 4,
    0x28: 1,
    0x29: 1,
    0x2A: 1,
}
_FORMAT, _EXPIRY, _CONTENT_TYPE, _RESPONSE_TOPIC, _CORRELATION = 0x01, 0x02, 0x03, 0x08, 0x09
_SUBSCRIPTION, _SESSION_EXPIRY, _ASSIGNED_ID, _SERVER_KEEP_ALIVE, _USER = 0x0B, 0x11, 0x12, 0x13, 0x26
_RECEIVE_MAXIMUM, _MAXIMUM_PACKET = 0x21, 0x27
_TEXTS: Final = frozenset({_CONTENT_TYPE, _RESPONSE_TOPIC, _ASSIGNED_ID, 0x15, 0x1A, 0x1C, 0x1F})
_BYTES: Final = frozenset({_CORRELATION, 0x16})
_OF_PUBLISH: Final = frozenset({_FORMAT, _EXPIRY, _CONTENT_TYPE, _RESPONSE_TOPIC, _CORRELATION, _SUBSCRIPTION, _USER})
_NO_DETAILS: Final = Details()


class MalformedError(ValueError):
    """Bytes that are no packet of MQTT 5, or none that a client takes."""


class UnreadableError(Exception):
    """A whole PUBLISH whose topic is no UTF-8; `mid` is 0 at QoS 0."""

    def __init__(self, mid: int) -> None:
        super().__init__("its topic is no UTF-8")
        self.mid = mid


class Connack(msgspec.Struct, frozen=True, kw_only=True):
    """The broker's answer to CONNECT. `keep_alive_s` and `client_id` are what it wants in place of ours."""

    reason: int
    session: bool = False
    receive_maximum: int = MAX_PACKET_ID
    max_packet_bytes: int = MAX_VARINT + 5
    keep_alive_s: int | None = None
    client_id: str = ""


class Splitter:
    """Cuts a byte stream into packets of at most `max_bytes` each."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept = bytearray()
        self._needed = 0

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """Take bytes; return (first byte, body) of each packet that is whole now; raises MalformedError."""
        if self._kept or not data:
            self._kept += data
            if len(self._kept) < self._needed:
                return []
            data = bytes(self._kept)
            self._kept.clear()
            self._needed = 0
        packets = []
        at, end = 0, len(data)
        while at + 2 <= end:
            start, length = self._length(data, at)
            if start == 0 or start + length > end:
                self._needed = start + length - at if start else 0
                break
            packets.append((data[at], data[start : start + length]))
            at = start + length
        if at < end:
            self._kept += memoryview(data)[at:]
        return packets

    def _length(self, data: bytes, at: int) -> tuple[int, int]:
        """Return where the body of the packet at `at` begins (0: its length is not whole) and its length."""
        length = data[at + 1]
        if length < 0x80:
            return at + 2, length
        length &= 0x7F
        for place in (1, 2, 3):
            if at + 1 + place >= len(data):
                return 0, 0
            digit = data[at + 1 + place]
            length |= (digit & 0x7F) << 7 * place
            if digit < 0x80:
                if length > self._max_bytes:
                    raise MalformedError(f"a packet of {length} bytes is over the limit of {self._max_bytes}")
                return at + 2 + place, length
        raise MalformedError("a packet's length has no end")


def reason_text(reason: int) -> str:
    """Return what a reason code means, in a few words."""
    return _REASONS.get(reason, f"reason 0x{reason:02x}")


def pack_connect(
    settings: LinkSettings, *, client_id: str, keep_alive_s: int, password: str | None, will: Will | None
) -> bytes:
    """Return a CONNECT."""
    flags = 0x02 if settings.clean_start else 0
    payload = [_text(client_id)]
    if will is not None:
        flags |= 0x04 | will.qos << 3 | (0x20 if will.retain else 0)
        payload += [b"\x00", _text(will.topic), _LENGTH.pack(len(will.payload)), will.payload]
    if settings.username:
        flags |= 0x80
        payload.append(_text(settings.username))
    if password is not None:
        flags |= 0x40
        payload.append(_text(password))
    properties = b"".join(
        (
            bytes([_SESSION_EXPIRY]),
            _WIDE.pack(settings.session_expiry_s),
            bytes([_RECEIVE_MAXIMUM]),
            _LENGTH.pack(settings.receive_maximum),
            bytes([_MAXIMUM_PACKET]),
            _WIDE.pack(settings.max_packet_bytes),
        )
    )
    head = b"\x00\x04MQTT\x05" + bytes([flags]) + _LENGTH.pack(keep_alive_s)
    return _packet(0x10, head, _varint(len(properties)), properties, *payload)


def pack_subscribe(mid: int, filters: Iterable[tuple[str, int, bool]]) -> bytes:
    """Return a SUBSCRIBE of (filter, QoS, whether a message keeps its sender's retain flag)."""
    asked = [_text(topic) + bytes([qos | (0x08 if as_published else 0)]) for topic, qos, as_published in filters]
    return _packet(0x82, _LENGTH.pack(mid), b"\x00", *asked)


def pack_unsubscribe(mid: int, topic: str) -> bytes:
    """Return an UNSUBSCRIBE of one filter."""
    return _packet(0xA2, _LENGTH.pack(mid), b"\x00", _text(topic))


def pack_puback(mid: int) -> bytes:
    """Return the PUBACK that takes a message."""
    return b"\x40\x02" + _LENGTH.pack(mid)


def pack_topic(topic: str) -> bytes:
    """Return a topic to publish on, with its length; raises ValueError for one that no broker takes."""
    if not topic or "+" in topic or "#" in topic:
        raise ValueError("no topic that a message can be published on")
    return _text(topic)


def pack_details(details: Details | None) -> bytes:
    """Return a PUBLISH's properties with their length; raises ValueError for those that no broker takes."""
    if details is None:
        return b"\x00"
    parts = []
    if details.response_topic is not None:
        parts += [b"\x08", pack_topic(details.response_topic)]
    if details.correlation is not None:
        if len(details.correlation) > MAX_TEXT_BYTES:
            raise ValueError("too much Correlation Data")
        parts += [b"\x09", _LENGTH.pack(len(details.correlation)), details.correlation]
    if details.content_type is not None:
        parts += [b"\x03", _text(details.content_type)]
    if details.expiry_s is not None:
        parts += [b"\x02", _WIDE.pack(details.expiry_s)]
    if details.user:
        parts.append(_user(details.user))
    packed = b"".join(parts)
    return _varint(len(packed)) + packed


def pack_publish(
    topic: bytes, properties: bytes, payload: bytes, *, mid: int = 0, retain: bool = False, duplicate: bool = False
) -> bytes:
    """Return a PUBLISH, at QoS 1 where `mid` is given; topic and properties come packed. Raises ValueError."""
    head = 0x30 | (0x02 if mid else 0) | (0x01 if retain else 0) | (0x08 if duplicate else 0)
    return _packet(head, topic, _LENGTH.pack(mid) if mid else b"", properties, payload)


def parse_publish(head: int, body: bytes) -> Message:
    """Read a PUBLISH; raises MalformedError, or UnreadableError where only its topic is at fault."""
    qos = head >> 1 & 3
    if qos > 1 or len(body) < 3:
        raise MalformedError("a PUBLISH of a kind that was not asked for")
    (length,) = _LENGTH.unpack_from(body)
    at = 2 + length
    mid = 0
    try:
        if qos:
            (mid,) = _LENGTH.unpack_from(body, at)
            at += 2
        details, at = _parse_details(body, at)
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise MalformedError("a PUBLISH that is cut off, or whose properties are no UTF-8") from error
    if not length or (qos and not mid):
        raise MalformedError("a PUBLISH without a topic or packet identifier")
    try:
        topic = body[2 : 2 + length].decode()
    except UnicodeDecodeError:
        raise UnreadableError(mid) from None
    return Message(
        topic=topic,
        payload=body[at:],
        qos=qos,
        retain=bool(head & 1),
        duplicate=bool(head & 8),
        mid=mid,
        connection=0,
        details=details,
    )


def parse_connack(body: bytes) -> Connack:
    """Read a CONNACK; raises MalformedError."""
    if len(body) < 2:
        raise MalformedError("a CONNACK that is cut off")
    reason = body[1]
    if reason:
        return Connack(reason=reason)
    known = _parse_properties(body, 2)
    return Connack(
        reason=0,
        session=bool(body[0] & 1),
        receive_maximum=int(known.get(_RECEIVE_MAXIMUM, MAX_PACKET_ID)) or 1,  # type: ignore[call-overload]
        max_packet_bytes=int(known.get(_MAXIMUM_PACKET, MAX_VARINT + 5)),  # type: ignore[call-overload]
        keep_alive_s=known.get(_SERVER_KEEP_ALIVE),  # type: ignore[arg-type]
        client_id=str(known.get(_ASSIGNED_ID, "")),
    )


def parse_answer(body: bytes) -> tuple[int, int]:
    """Return (packet identifier, reason) of a PUBACK; raises MalformedError."""
    if len(body) < 2:
        raise MalformedError("a PUBACK that is cut off")
    return _LENGTH.unpack_from(body)[0], body[2] if len(body) > 2 else 0


def parse_suback(body: bytes) -> tuple[int, bytes]:
    """Return (packet identifier, reason of each filter) of a SUBACK or UNSUBACK; raises MalformedError."""
    if len(body) < 3:
        raise MalformedError("a SUBACK that is cut off")
    try:
        length, at = _parse_varint(body, 2)
    except IndexError as error:
        raise MalformedError("a SUBACK that is cut off") from error
    return _LENGTH.unpack_from(body)[0], body[at + length :]


def _parse_properties(body: bytes, at: int) -> dict[int, object]:
    """Return the properties of a packet but the user's; raises MalformedError."""
    known: dict[int, object] = {}
    try:
        length, at = _parse_varint(body, at)
        end = at + length
        if end > len(body):
            raise MalformedError("properties longer than their packet")
        while at < end:
            kind, at = body[at], at + 1
            value, at = _parse_value(kind, body, at)
            if kind in known:
                raise MalformedError(f"property {kind} is there twice")
            if kind != _USER:
                known[kind] = value
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise MalformedError("properties that are cut off") from error
    return known


def _parse_value(kind: int, body: bytes, at: int) -> tuple[object, int]:
    if kind == _USER:
        name, at = _parse_text(body, at)
        value, at = _parse_text(body, at)
        return (name, value), at
    if kind in _TEXTS:
        return _parse_text(body, at)
    if kind in _BYTES:
        return _parse_bytes(body, at)
    if kind == _SUBSCRIPTION:
        return _parse_varint(body, at)
    if kind not in _NUMBERS:
        raise MalformedError(f"there is no property {kind}")
    end = at + _NUMBERS[kind]
    return int.from_bytes(body[at:end], "big"), end


def _parse_details(body: bytes, at: int) -> tuple[Details, int]:
    """Return a PUBLISH's properties and where its payload begins."""
    length, at = _parse_varint(body, at)
    if not length:
        return _NO_DETAILS, at
    end = at + length
    known: dict[int, object] = {}
    user: list[tuple[str, str]] = []
    while at < end:
        kind = body[at]
        value, at = _parse_value(kind, body, at + 1)
        if kind == _USER:
            user.append(value)  # type: ignore[arg-type]
        elif kind not in _OF_PUBLISH or (kind in known and kind != _SUBSCRIPTION):
            raise MalformedError(f"property {kind} is there twice, or does not belong to a PUBLISH")
        else:
            known[kind] = value
    if at != end or end > len(body):
        raise MalformedError("properties longer than they say")
    details = Details(
        response_topic=known.get(_RESPONSE_TOPIC),  # type: ignore[arg-type]
        correlation=known.get(_CORRELATION),  # type: ignore[arg-type]
        content_type=known.get(_CONTENT_TYPE),  # type: ignore[arg-type]
        expiry_s=known.get(_EXPIRY),  # type: ignore[arg-type]
        user=tuple(user),
    )
    return details, end


def _parse_bytes(body: bytes, at: int) -> tuple[bytes, int]:
    start = at + 2
    end = start + (body[at] << 8 | body[at + 1])
    if end > len(body):
        raise MalformedError("a value longer than its packet")
    return body[start:end], end


def _parse_text(body: bytes, at: int) -> tuple[str, int]:
    raw, at = _parse_bytes(body, at)
    return raw.decode(), at


def _parse_varint(body: bytes, at: int) -> tuple[int, int]:
    """Return a variable byte integer (section 1.5.5) and where it ends."""
    value = body[at]
    if value < 0x80:
        return value, at + 1
    value &= 0x7F
    for place in (1, 2, 3):
        digit = body[at + place]
        value |= (digit & 0x7F) << 7 * place
        if digit < 0x80:
            return value, at + place + 1
    raise MalformedError("a length that has no end")


def _varint(value: int) -> bytes:
    if value < 0x80:
        return bytes((value,))
    digits = bytearray()
    while value >= 0x80:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    digits.append(value)
    return bytes(digits)


def _packet(head: int, *parts: bytes) -> bytes:
    length = sum(map(len, parts))
    if length > MAX_VARINT:
        raise ValueError(f"a packet of {length} bytes; MQTT ends at {MAX_VARINT}")
    return b"".join((bytes((head,)), _varint(length), *parts))


def _packed_text(text: str) -> bytes:
    """Return a text with its length; raises ValueError for one over which brokers close the connection."""
    if not is_text(text):
        raise ValueError("no text that brokers take")
    raw = text.encode()
    return _LENGTH.pack(len(raw)) + raw


def _packed_user(user: tuple[tuple[str, str], ...]) -> bytes:
    return b"".join(b"\x26" + _text(name) + _text(value) for name, value in user)


_cached_text: Callable[[str], bytes] = functools.lru_cache(CACHED_TEXTS)(_packed_text)
_cached_user: Callable[[tuple[tuple[str, str], ...]], bytes] = functools.lru_cache(CACHED_TEXTS)(_packed_user)


def _text(text: str) -> bytes:
    """Return a packed text; the short ones repeat from message to message."""
    return _cached_text(text) if len(text) <= MAX_CACHED_LETTERS else _packed_text(text)


def _user(user: tuple[tuple[str, str], ...]) -> bytes:
    """Return packed user properties; those of one model's answers are the same again and again."""
    short = len(user) <= 8 and sum([len(name) + len(value) for name, value in user]) <= MAX_CACHED_LETTERS
    return _cached_user(user) if short else _packed_user(user)
