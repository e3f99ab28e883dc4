"""A network between two TCP ends that can fall silent, in both directions or in one, or break with a reset."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from typing import Self

RESET = struct.pack("ii", 1, 0)
"""SO_LINGER at 0 seconds: close with RST in place of FIN."""


class Proxy:
    """Passes bytes on to a loopback port; while it holds, neither end hears of the other, and none is told."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._forth, self._back = threading.Event(), threading.Event()
        self._ends: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self.release()

    def __enter__(self) -> Self:
        self._accepting.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()
        self.reset()
        self.release()

    def hold(self, *, forth: bool = True, back: bool = True) -> None:
        """Fall silent: `forth` is from who connects, `back` is to it."""
        if forth:
            self._forth.clear()
        if back:
            self._back.clear()

    def release(self) -> None:
        """Pass on what was held and what comes."""
        self._forth.set()
        self._back.set()

    def reset(self) -> None:
        """Break every connection with a reset on both sides."""
        ends, self._ends = self._ends, []
        for end in ends:
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                end.shutdown(socket.SHUT_RD)  # wakes the thread that reads it
            end.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self._ends.append(near)
                far = socket.create_connection(("127.0.0.1", self._target))
                self._ends.append(far)
                for source, sink, gate in ((near, far, self._forth), (far, near, self._back)):
                    threading.Thread(target=_pump, args=(source, sink, gate), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket, gate: threading.Event) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            gate.wait()
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
