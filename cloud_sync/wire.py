"""What crosses the brokers: names, topics, and the two hand-off messages (PROTOCOL 0 and 5). Pure: no I/O, no clock."""

from __future__ import annotations

import functools
import re
import struct
from typing import Final

import msgspec

from cloud_sync.errors import HandoffError
from cloud_sync.messages import is_text
from models.manifest import is_name

MAX_TOPIC_BYTES: Final = 1024
"""The longest topic that an asker may name; Spillway's own topics keep to the strictest broker's 256."""
MAX_MESSAGE_BYTES: Final = 128 << 10
"""The strictest public broker's limit of a payload."""
MAX_PAYLOAD_BYTES: Final = 96 << 10
"""The most bytes of one hand-off or reply message that Spillway sends."""
MAX_HEADER_BYTES: Final = 2048
MAX_TTL_MS: Final = 7 * 86_400_000
MAX_PREFIX_PARTS: Final = 4
CACHED_TOPICS: Final = 1024
MAX_CACHED_LETTERS: Final = 256
RESERVED_DEVICES: Final = frozenset({"handoff", "fleet"})
NUMBER_BITS: Final = 20
RUN_BITS: Final = 43
REQUEST_INFO: Final = b"spillway handoff 1\x00"

_KID = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,63}")
_ID = re.compile(r"[0-9a-f]{32}")
_CONTENT_TYPE = re.compile(r"[a-z0-9][a-z0-9!#$&^_.+-]{0,62}/[a-z0-9][a-z0-9!#$&^_.+-]{0,62}")
_PREFIX_PART = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,63}")
_LENGTH = struct.Struct(">H")


def is_device(text: str) -> bool:
    """Whether `text` can name a device."""
    return is_name(text) and text not in RESERVED_DEVICES


def is_prefix(text: str) -> bool:
    """Whether `text` can stand in front of every topic: one to four parts, so that every topic keeps to its limits."""
    parts = text.split("/")
    return len(parts) <= MAX_PREFIX_PARTS and len(text) <= 64 and all(map(_PREFIX_PART.fullmatch, parts))


def is_publishable(topic: str) -> bool:
    """Whether a message may be published on a topic that an asker names: no wildcard, no `$`, only a broker's text."""
    if not topic or topic[0] == "$" or "+" in topic or "#" in topic:
        return False
    return is_text(topic) and len(topic.encode()) <= MAX_TOPIC_BYTES


class Asked(msgspec.Struct, frozen=True):
    """Which model an infer or cancel topic names, and who asks (`any` where the topic does not say)."""

    model: str
    client: str


@functools.lru_cache(CACHED_TOPICS)
def _parse_asked(start: str, topic: str) -> Asked | None:
    """Read a topic that begins with `start`; askers use the same again and again."""
    parts = topic[len(start) :].split("/")
    if not topic.startswith(start) or len(parts) > 2 or not all(map(is_name, parts)):
        return None
    return Asked(parts[0], parts[1] if len(parts) == 2 else "any")


@functools.lru_cache(CACHED_TOPICS)
def _is_inside(topic: str, starts: tuple[str, ...]) -> bool:
    """Whether a topic that can be published on lies under one of `starts`."""
    inside = any(topic.startswith(start) and len(topic) > len(start) for start in starts)
    return inside and is_publishable(topic)


class Topics:
    """The topics of one prefix and, where `device` is given, of one box."""

    def __init__(self, prefix: str = "spillway", device: str = "") -> None:
        if not is_prefix(prefix):
            raise ValueError(f"{prefix!r} cannot be a topic prefix: use 1 to 4 parts of letters, digits, `.`, `_`, `-`")
        if device and not is_device(device):
            raise ValueError(f"{device!r} cannot name a device")
        self.prefix = prefix
        self.device = device
        self.status = self._own("status")
        self.models = self._own("models")
        self.health = self._own("health")
        self.report = self._own("report")
        self.bindings = self._own("bindings")
        self.handoff_reply = self._own("handoff/reply")
        self.infer_filters = (self._own("infer/+"), self._own("infer/+/+"))
        self.cancel_filters = (self._own("cancel/+"), self._own("cancel/+/+"))

    def _own(self, rest: str) -> str:
        return f"{self.prefix}/{self.device}/{rest}"

    def infer(self, model: str, client: str = "") -> str:
        """Return where `client` (or anyone) asks `model`."""
        return self._own(f"infer/{model}/{client}" if client else f"infer/{model}")

    def cancel(self, model: str, client: str = "") -> str:
        """Return where `client` (or anyone) takes a question back."""
        return self._own(f"cancel/{model}/{client}" if client else f"cancel/{model}")

    def parse_infer(self, topic: str) -> Asked | None:
        """Read an infer topic of this box; None where it is another's, or its names break the rule."""
        return self._parse_asked(topic, "infer/")

    def parse_cancel(self, topic: str) -> Asked | None:
        """Read a cancel topic of this box; None where it is another's, or its names break the rule."""
        return self._parse_asked(topic, "cancel/")

    def _parse_asked(self, topic: str, kind: str) -> Asked | None:
        parse = _parse_asked if len(topic) <= MAX_CACHED_LETTERS else _parse_asked.__wrapped__
        return parse(self._own(kind), topic)

    def results(self, model: str) -> str:
        """Return where answers go that name no reply topic and no client."""
        return self._own(f"results/{model}")

    def reply(self, client: str, model: str) -> str:
        """Return the reply topic of a request that names none."""
        return self.results(model) if client == "any" else self._own(f"reply/{client}/{model}")

    def reply_allowed(self, topic: str, client: str, prefixes: tuple[str, ...] = ()) -> bool:
        """Whether `client` may have its answers on `topic`; `prefixes` are what the configuration adds."""
        is_inside = _is_inside if len(topic) <= MAX_CACHED_LETTERS else _is_inside.__wrapped__
        return is_inside(topic, (self._own(f"reply/{client}/"), *prefixes))

    def handoff(self, pool: str, model: str) -> str:
        """Return where a box hands a request for `model` to `pool`."""
        return f"{self.prefix}/handoff/{pool}/{model}"

    def handoff_filter(self, pool: str) -> str:
        """Return the shared subscription by which the gateways of `pool` divide the work."""
        return f"$share/gateway/{self.prefix}/handoff/{pool}/+"

    def parse_handoff(self, topic: str) -> tuple[str, str] | None:
        """Return (pool, model) of a hand-off topic; None where it is none."""
        start = f"{self.prefix}/handoff/"
        parts = topic[len(start) :].split("/")
        if not topic.startswith(start) or len(parts) != 2 or not all(map(is_name, parts)):
            return None
        return parts[0], parts[1]

    def handoff_reply_of(self, device: str) -> str:
        """Return where a gateway answers `device`."""
        return f"{self.prefix}/{device}/handoff/reply"

    def hint(self, group: str) -> str:
        """Return where admins tell `group` to look for a new deployment."""
        return f"{self.prefix}/fleet/{group}/hint"

    def parse_hint(self, topic: str) -> str | None:
        """Return the group of a hint topic; None where it is none."""
        start = f"{self.prefix}/fleet/"
        group, slash, rest = topic[len(start) :].partition("/")
        return group if topic.startswith(start) and slash and rest == "hint" and is_name(group) else None


class HandoffHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a broker may see of a hand-off; `ttl_ms` is what is left of the deadline at sending."""

    v: int = 1
    kid: str
    id: str
    device: str
    pool: str
    model: str
    ttl_ms: int
    content_type: str
    stream: bool


class ReplyHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a broker may see of a reply; `status` is ok, partial or error."""

    v: int = 1
    id: str
    sequence: int
    final: bool
    status: str


def to_sequence(run: int, number: int) -> int:
    """Return the sequence of an answer's piece `number` (from 0).

    `run` (43 random bits for each time an answer is made) stands above it: two gateways that answer the same sealed
    request then never use a nonce twice, and a box never takes pieces of one answer for pieces of another.
    """
    if number >> NUMBER_BITS or run >> RUN_BITS:
        raise HandoffError("too_large", f"an answer of more than {1 << NUMBER_BITS} pieces")
    return run << NUMBER_BITS | number


def from_sequence(sequence: int) -> tuple[int, int]:
    """Return (run, number) of a piece."""
    return sequence >> NUMBER_BITS, sequence & (1 << NUMBER_BITS) - 1


class HandoffMessage(msgspec.Struct, frozen=True):
    """A parsed hand-off: `head` is everything before the sealed part, byte for byte."""

    header: HandoffHeader
    head: bytes
    sealed: bytes


class ReplyMessage(msgspec.Struct, frozen=True):
    """A parsed reply: `head` is everything before the sealed part, byte for byte."""

    header: ReplyHeader
    head: bytes
    sealed: bytes


_encode = msgspec.json.Encoder().encode
_handoff_header = msgspec.json.Decoder(HandoffHeader)
_reply_header = msgspec.json.Decoder(ReplyHeader)


def pack_handoff_head(header: HandoffHeader) -> bytes:
    """Return everything before a hand-off's sealed part; raises HandoffError `bad_header`."""
    _check_handoff(header)
    return _pack_head(b"SPW1", _encode(header))


def parse_handoff(payload: bytes) -> HandoffMessage:
    """Split a hand-off message and check its header; raises HandoffError `bad_header` or `too_large`."""
    raw, head, sealed = _split(b"SPW1", payload)
    try:
        header = _handoff_header.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HandoffError("bad_header", str(error)) from error
    _check_handoff(header)
    return HandoffMessage(header, head, sealed)


def pack_reply_head(header: ReplyHeader) -> bytes:
    """Return everything before a reply's sealed part; raises HandoffError `bad_header`."""
    _check_reply(header)
    return _pack_head(b"SPR1", _encode(header))


def parse_reply(payload: bytes) -> ReplyMessage:
    """Split a reply message and check its header; raises HandoffError `bad_header` or `too_large`."""
    raw, head, sealed = _split(b"SPR1", payload)
    try:
        header = _reply_header.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HandoffError("bad_header", str(error)) from error
    _check_reply(header)
    return ReplyMessage(header, head, sealed)


def _pack_head(magic: bytes, header: bytes) -> bytes:
    if len(header) > MAX_HEADER_BYTES:
        raise HandoffError("bad_header", f"a header of {len(header)} bytes is over the limit of {MAX_HEADER_BYTES}")
    return magic + _LENGTH.pack(len(header)) + header


def _split(magic: bytes, payload: bytes) -> tuple[bytes, bytes, bytes]:
    """Return (header, everything before the sealed part, sealed part)."""
    if len(payload) > MAX_MESSAGE_BYTES:
        raise HandoffError("too_large", f"a message of {len(payload)} bytes is over the limit of {MAX_MESSAGE_BYTES}")
    if payload[:4] != magic or len(payload) < 6:
        raise HandoffError("bad_header", f"does not begin with {magic.decode()}")
    (length,) = _LENGTH.unpack_from(payload, 4)
    end = 6 + length
    if length > MAX_HEADER_BYTES or end > len(payload):
        raise HandoffError("bad_header", f"`header length` = {length}: over the limit or past the message's end")
    return payload[6:end], payload[:end], payload[end:]


def _check_handoff(header: HandoffHeader) -> None:
    _check("v", header.v == 1)
    _check("kid", _KID.fullmatch(header.kid) is not None)
    _check("id", _ID.fullmatch(header.id) is not None)
    _check("device", is_device(header.device))
    _check("pool", is_name(header.pool))
    _check("model", is_name(header.model))
    _check("ttl_ms", 0 < header.ttl_ms <= MAX_TTL_MS)
    _check("content_type", is_content_type(header.content_type))


def _check_reply(header: ReplyHeader) -> None:
    _check("v", header.v == 1)
    _check("id", _ID.fullmatch(header.id) is not None)
    _check("sequence", 0 <= header.sequence < 1 << 63)
    _check("status", header.status in {"ok", "partial", "error"})
    _check("final", header.final == (header.status != "partial"))


def _check(field: str, right: bool) -> None:  # noqa: FBT001 - a verdict about one field
    if not right:
        raise HandoffError("bad_header", f"`{field}` is not what the protocol allows")


def is_content_type(text: str) -> bool:
    """Whether `text` is a media type in lower case, without parameters."""
    return _CONTENT_TYPE.fullmatch(text) is not None
