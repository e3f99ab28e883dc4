"""The one load generator for everything that speaks HTTP: kept-alive connections, one request after another on each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence


class WrongAnswerError(Exception):
    """A server answered with something else than 200."""


class Connection:
    """One kept-alive connection."""

    def __init__(self, port: int, path: str, content_type: str) -> None:
        self._port = port
        self._head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {content_type}\r\nContent-Length: "
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, body: bytes) -> float:
        """Ask once and return the seconds until the answer is here; raises WrongAnswerError."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        started = time.perf_counter()
        writer.write(f"{self._head}{len(body)}\r\n\r\n".encode() + body)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        if "transfer-encoding: chunked" in head:
            answer = await _chunks(reader)
        else:
            answer = await reader.readexactly(int(head.split("content-length:")[1].split("\r\n")[0]))
        took_s = time.perf_counter() - started
        if not head.startswith("http/1.1 200"):
            raise WrongAnswerError(f"{head.splitlines()[0]}: {answer[:300]!r}")
        return took_s

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    answer = b""
    while size := int(await reader.readline(), 16):
        answer += await reader.readexactly(size)
        await reader.readline()
    await reader.readline()
    return answer


async def at_once(
    port: int, path: str, bodies: Sequence[bytes], content_type: str, number: int, in_flight: int
) -> tuple[float, list[float]]:
    """Ask `number` questions, `in_flight` at any time; return the seconds of all together and of each."""
    took: list[float] = []
    turns = iter(range(number))

    async def asker() -> None:
        connection = Connection(port, path, content_type)
        for at in turns:
            took.append(await connection.ask(bodies[at % len(bodies)]))  # noqa: PERF401
        connection.close()

    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(in_flight):
            group.create_task(asker())
    return time.perf_counter() - started, took
