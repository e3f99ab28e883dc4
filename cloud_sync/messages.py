"""What a link to a broker is told, and the messages it takes and gives. Pure: no I/O, no clock."""

from __future__ import annotations

import re
from typing import Annotated, Final

import msgspec
from msgspec import Meta

MAX_TEXT_BYTES: Final = 65_535
_NEVER = re.compile(
    "[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef"
    + "".join(f"{chr(plane << 16 | 0xFFFE)}{chr(plane << 16 | 0xFFFF)}" for plane in range(17))
    + "]"
)


def is_text(text: str) -> bool:
    """Whether brokers take `text` as a topic or a property (MQTT 5 section 1.5.4): some close the connection over it.

    No control character, no surrogate, none of Unicode's noncharacters; 65,535 bytes at most.
    """
    return _NEVER.search(text) is None and len(text.encode()) <= MAX_TEXT_BYTES


class LinkSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the broker is and how to speak to it. Files are paths; times are seconds."""

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=1, le=65535)] = 1883
    client_id: str = ""
    username: str = ""
    password_file: str = ""
    ca: str = ""
    certificate: str = ""
    key: str = ""
    keepalive_s: Annotated[int, Meta(ge=1, le=65535)] = 60
    session_expiry_s: Annotated[int, Meta(ge=0, le=0xFFFFFFFF)] = 3600
    receive_maximum: Annotated[int, Meta(ge=1, le=65535)] = 100
    clean_start: bool = False
    max_packet_bytes: Annotated[int, Meta(ge=1, le=0xFFFFFFFF)] = 16 << 20
    max_backoff_s: Annotated[float, Meta(ge=0)] = 60.0


class Details(msgspec.Struct, frozen=True, kw_only=True):
    """The MQTT 5 properties that Spillway reads and writes."""

    response_topic: str | None = None
    correlation: bytes | None = None
    content_type: str | None = None
    expiry_s: int | None = None
    user: tuple[tuple[str, str], ...] = ()


class Message(msgspec.Struct, kw_only=True):
    """A message that arrived. `connection` counts the connections, since packet ids belong to one."""

    topic: str
    payload: bytes
    qos: int
    retain: bool
    duplicate: bool
    mid: int
    connection: int
    details: Details
    settled: bool = False


class Will(msgspec.Struct, frozen=True):
    """What the broker says of us when we vanish."""

    topic: str
    payload: bytes
    retain: bool = True
    qos: int = 1
