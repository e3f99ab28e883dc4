"""A bucket over HTTP on loopback that answers as told: right, wrong, slowly or without end."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Answer = Callable[["Handler", bytes], None]


class FaultyBucket:
    """Serves GETs of path-style S3 from a folder. `faults` holds, by a part of the key, the next answers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: dict[str, list[Answer]] = {}
        self.asked: list[tuple[str, str]] = []
        self.over = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"bucket": self}))
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def next_fault(self, key: str) -> Answer | None:
        """The answer that a key is to get, if any."""
        for part, answers in self.faults.items():
            if part in key and answers:
                return answers.pop(0)
        return None

    @contextmanager
    def running(self) -> Iterator[FaultyBucket]:
        """Serve while the block runs."""
        thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.over.set()
            self._server.shutdown()
            self._server.server_close()
            thread.join()


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    bucket: FaultyBucket
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        key = self.path.removeprefix("/bucket/")
        asked = self.headers.get("Range", "")
        self.bucket.asked.append((key, asked))
        path = self.bucket.folder / key
        if not path.is_file():
            return status(404, "NoSuchKey")(self, b"")
        data = path.read_bytes()
        return (self.bucket.next_fault(key) or right)(self, data)

    def asked_range(self) -> tuple[int, int] | None:
        """First and last byte that are asked for."""
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        return (int(found[1]), int(found[2])) if found else None

    def begin(self, code: int, **headers: Any) -> None:
        """Send a status line and headers."""
        self.send_response(code)
        self.send_header("ETag", '"etag"')
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing."""


def right(handler: Handler, data: bytes) -> None:
    """What was asked for."""
    asked = handler.asked_range()
    if asked is None:
        handler.begin(200, Content_Length=len(data))
        handler.wfile.write(data)
        return
    first, last = asked
    part = data[first : last + 1]
    handler.begin(206, Content_Length=len(part), Content_Range=f"bytes {first}-{last}/{len(data)}")
    handler.wfile.write(part)


def status(code: int, word: str, **headers: Any) -> Answer:
    """An error of S3."""
    page = f"<?xml version='1.0'?><Error><Code>{word}</Code><Message>fault</Message></Error>".encode()

    def answer(handler: Handler, data: bytes) -> None:
        handler.begin(code, Content_Length=len(page), Content_Type="application/xml", **headers)
        handler.wfile.write(page)

    return answer


def page_with_200(handler: Handler, data: bytes) -> None:
    """An error page that says it is the object."""
    page = b"<?xml version='1.0'?><Error><Code>InternalError</Code></Error>".ljust(len(data))
    right(handler, page)


def whole_object(handler: Handler, data: bytes) -> None:
    """The whole object where a range was asked for."""
    handler.begin(200, Content_Length=len(data))
    handler.wfile.write(data)


def wrong_range(handler: Handler, data: bytes) -> None:
    """Another range than was asked for."""
    first, last = handler.asked_range() or (0, len(data) - 1)
    part = data[first + 1 : last + 1]
    handler.begin(206, Content_Length=len(part), Content_Range=f"bytes {first + 1}-{last}/{len(data)}")
    handler.wfile.write(part)


def cut_short(handler: Handler, data: bytes) -> None:
    """Half of it, and the connection ends."""
    asked = handler.asked_range()
    first, last = asked or (0, len(data) - 1)
    part = data[first : last + 1]
    headers = {"Content_Range": f"bytes {first}-{last}/{len(data)}"} if asked else {}
    handler.begin(206 if asked else 200, Content_Length=len(part), **headers)
    handler.wfile.write(part[: len(part) // 2])
    handler.close_connection = True


def shorter_length(handler: Handler, data: bytes) -> None:
    """A Content-Length below the range's."""
    first, last = handler.asked_range() or (0, len(data) - 1)
    part = data[first : last + 1][:-3]
    handler.begin(206, Content_Length=len(part), Content_Range=f"bytes {first}-{last}/{len(data)}")
    handler.wfile.write(part)


def hang_up(handler: Handler, data: bytes) -> None:
    """No answer at all."""
    handler.close_connection = True


def endless(handler: Handler, data: bytes) -> None:
    """Zeros for ever, without a length."""
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    block = b"10000\r\n" + bytes(1 << 16) + b"\r\n"
    try:
        while not handler.bucket.over.is_set():
            handler.wfile.write(block)
    except OSError:
        handler.close_connection = True


def drip(handler: Handler, data: bytes) -> None:
    """A byte now and then."""
    asked = handler.asked_range()
    first, last = asked or (0, len(data) - 1)
    headers = {"Content_Range": f"bytes {first}-{last}/{len(data)}"} if asked else {}
    handler.begin(206 if asked else 200, Content_Length=last - first + 1, **headers)
    try:
        for byte in data[first : last + 1]:
            handler.wfile.write(bytes([byte]))
            if handler.bucket.over.wait(0.05):
                return
    except OSError:
        handler.close_connection = True


def drip_headers(handler: Handler, data: bytes) -> None:
    """A header that never ends."""
    try:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        for _ in range(10_000):
            handler.wfile.write(b"x")
            if handler.bucket.over.wait(0.05):
                return
    except OSError:
        handler.close_connection = True


def elsewhere(location: str) -> Answer:
    """A redirect to another host."""
    return status(307, "TemporaryRedirect", Location=location)


def after(seconds: float, then: Answer) -> Answer:
    """An answer that comes late."""

    def answer(handler: Handler, data: bytes) -> None:
        time.sleep(seconds)
        then(handler, data)

    return answer
