"""Objects that are given up when they come too slowly, and counted when they come (FAULTS A7).

The inner store is read in a thread of its own, because a blocking read that gets a byte now and then never
times out by itself; a thread that is given up ends with the process, which is short-lived.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from cloud_sync.errors import FetchError
from cloud_sync.objects import Blob, Objects

AHEAD: Final = 16
"""How many chunks may wait for their reader."""


class _Head(NamedTuple):
    etag: str


_Item = _Head | bytes | None | BaseException


class Paced:
    """Wraps Objects: raises FetchError `slow_retrieval` below `min_bytes_s` over `window_s` of waiting."""

    def __init__(
        self, inner: Objects, *, min_bytes_s: float, window_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._inner = inner
        self._min_bytes_s = min_bytes_s
        self._window_s = window_s
        self._clock = clock
        self.bytes_in = 0

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> Blob:
        """Return the object as the inner store gives it, watched."""
        items: queue.Queue[_Item] = queue.Queue(AHEAD)
        stopped = threading.Event()
        work = (items, stopped, key, start, length)
        threading.Thread(target=self._fill, args=work, name=f"get {key}", daemon=True).start()
        received = self._receive(items, stopped, key)
        head = next(received)
        assert isinstance(head, _Head)
        return Blob(head.etag, self._counted(received))

    def put(self, key: str, data: bytes | Path, *, only_new: bool = False, if_match: str | None = None) -> str:
        """Write through."""
        return self._inner.put(key, data, only_new=only_new, if_match=if_match)

    def exists(self, key: str) -> bool:
        """Ask through."""
        return self._inner.exists(key)

    def names(self, prefix: str) -> Iterator[str]:
        """List through."""
        return self._inner.names(prefix)

    def delete(self, key: str) -> None:
        """Delete through."""
        self._inner.delete(key)

    def _fill(
        self, items: queue.Queue[_Item], stopped: threading.Event, key: str, start: int, length: int | None
    ) -> None:
        try:
            blob = self._inner.get(key, start=start, length=length)
            _hand_on(items, stopped, _Head(blob.etag))
            with contextlib.closing(blob.chunks) as chunks:
                for chunk in chunks:
                    if not _hand_on(items, stopped, chunk):
                        return
            _hand_on(items, stopped, None)
        except BaseException as error:  # noqa: BLE001  It is raised in the reader's thread instead.
            _hand_on(items, stopped, error)

    def _receive(self, items: queue.Queue[_Item], stopped: threading.Event, key: str) -> Generator[_Head | bytes]:
        waited_s, received = 0.0, 0
        try:
            while True:
                before = self._clock()
                try:
                    item = items.get(timeout=max(self._window_s - waited_s, 0.001))
                except queue.Empty:
                    item = b""
                waited_s += self._clock() - before
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                received += len(item) if isinstance(item, bytes) else 0
                if waited_s >= self._window_s:
                    self._judge(key, received)
                    waited_s, received = 0.0, 0
                if item:
                    yield item
        finally:
            stopped.set()

    def _judge(self, key: str, received: int) -> None:
        if received < self._min_bytes_s * self._window_s:
            raise FetchError("slow_retrieval", f"{key}: {received} bytes in {self._window_s:g} s of waiting")

    def _counted(self, received: Generator[_Head | bytes]) -> Generator[bytes]:
        with contextlib.closing(received):
            for chunk in received:
                assert isinstance(chunk, bytes)
                self.bytes_in += len(chunk)
                yield chunk


def _hand_on(items: queue.Queue[_Item], stopped: threading.Event, item: _Item) -> bool:
    """Give an item to the reader, unless it has gone."""
    while not stopped.is_set():
        try:
            items.put(item, timeout=1.0)
        except queue.Full:
            continue
        return True
    return False
