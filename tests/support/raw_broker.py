"""A broker made of single packets: it says what the test wants said, right or wrong, and keeps all that it heard."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
from collections.abc import Callable
from typing import Self

import msgspec

CONNECT, PUBLISH, PUBACK, SUBSCRIBE, DISCONNECT = 1, 3, 4, 8, 14


class Packet(msgspec.Struct, frozen=True):
    """One packet of MQTT 5: kind, the four flags, and what follows the length; `at` is the monotonic clock."""

    kind: int
    flags: int
    body: bytes
    connection: int
    at: float

    @property
    def mid(self) -> int:
        """The packet id of a SUBSCRIBE, PUBACK or QoS 1 PUBLISH."""
        if self.kind != PUBLISH:
            return int.from_bytes(self.body[:2], "big")
        start = 2 + int.from_bytes(self.body[:2], "big")
        return int.from_bytes(self.body[start : start + 2], "big")

    @property
    def duplicate(self) -> bool:
        """Whether a PUBLISH is marked as sent again."""
        return bool(self.flags & 8)


def packet(kind: int, body: bytes, flags: int = 0) -> bytes:
    """Return a packet's bytes."""
    length, left = b"", len(body)
    while True:
        left, digit = divmod(left, 128)
        length += bytes([digit | (128 if left else 0)])
        if not left:
            return bytes([kind << 4 | flags]) + length + body


def connack(reason: int = 0, properties: bytes = b"", *, session: bool = False) -> bytes:
    """Accept or refuse a connection."""
    return packet(2, bytes([session, reason, len(properties)]) + properties)


def publish(topic: bytes, payload: bytes, mid: int = 0, *, duplicate: bool = False, properties: bytes = b"") -> bytes:
    """Publish at QoS 1, or at 0 without a packet id."""
    ident = struct.pack(">H", mid) if mid else b""
    body = struct.pack(">H", len(topic)) + topic + ident + bytes([len(properties)]) + properties + payload
    return packet(PUBLISH, body, (2 if mid else 0) | (8 if duplicate else 0))


def puback(mid: int) -> bytes:
    """Acknowledge a publish."""
    return packet(PUBACK, struct.pack(">H", mid))


def suback(asked: Packet, *reasons: int) -> bytes:
    """Answer a SUBSCRIBE."""
    return packet(9, struct.pack(">HB", asked.mid, 0) + bytes(reasons))


def kindly(heard: Packet) -> bytes:
    """Answer as a broker without a mind of its own does."""
    if heard.kind == CONNECT:
        return connack()
    if heard.kind == SUBSCRIBE:
        return suback(heard, 1)
    if heard.kind == PUBLISH and heard.flags & 6:
        return puback(heard.mid)
    return packet(13, b"") if heard.kind == 12 else b""


class RawBroker:
    """Answers each packet with what `script` returns; `send` and `cut` act on the latest connection."""

    def __init__(self, script: Callable[[Packet], bytes] = kindly) -> None:
        self.script = script
        self.heard: list[Packet] = []
        self.port = 0
        self.connections = 0
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        await asyncio.sleep(0)

    def kinds(self, kind: int) -> list[Packet]:
        """Return the packets of a kind that were heard."""
        return [one for one in self.heard if one.kind == kind]

    async def hears(self, kind: int, number: int = 1, timeout_s: float = 10.0) -> list[Packet]:
        """Wait until so many packets of a kind were heard."""
        async with asyncio.timeout(timeout_s):
            while len(self.kinds(kind)) < number:  # noqa: ASYNC110 - a look now and then is enough for a test
                await asyncio.sleep(0.005)
        return self.kinds(kind)

    def send(self, data: bytes) -> None:
        """Send bytes on the latest connection."""
        self._writers[-1].write(data)

    def cut(self) -> None:
        """End every connection without a word."""
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        self._writers.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                heard = await _read(reader, number)
                self.heard.append(heard)
                writer.write(self.script(heard))
        writer.close()


async def _read(reader: asyncio.StreamReader, connection: int) -> Packet:
    (head,) = await reader.readexactly(1)
    length = shift = 0
    while True:
        (digit,) = await reader.readexactly(1)
        length |= (digit & 127) << shift
        shift += 7
        if not digit & 128:
            break
    return Packet(head >> 4, head & 15, await reader.readexactly(length), connection, time.monotonic())
