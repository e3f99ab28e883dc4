"""A real worker process on the other end of a socket pair, spoken to in blocking calls."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Self

from models.backend_settings import BackendSettings
from models.channel import HEADER, Ask, Broken, FromWorker, Open, Piece, Ready, ToWorker, frame, from_worker
from models.manifest import Manifest, manifest_bytes
from models.request import Request

AS_SHIPPED = BackendSettings()
ROOT = Path(__file__).resolve().parents[2]
START = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from models.worker import main; main()"


class WorkerProcess:
    """Starts `models.worker` in isolated mode, as a box does, and ends it with its socket."""

    def __init__(self, timeout_s: float = 60.0, start: str = START) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(timeout_s)
        with theirs:
            command = [sys.executable, "-I", "-c", start, str(theirs.fileno())]
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=dict(os.environ))
        self._reader = self.socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> int:
        """Close the socket and return the worker's exit status."""
        self._reader.close()
        self.socket.close()
        try:
            return self.process.wait(timeout=10)
        finally:
            self.process.kill()

    def send(self, *messages: ToWorker) -> None:
        self.socket.sendall(b"".join(frame(message) for message in messages))

    def receive(self) -> FromWorker:
        header = self._reader.read(HEADER.size)
        if len(header) < HEADER.size:
            raise ConnectionError("the worker is gone")
        message: FromWorker = from_worker.decode(self._reader.read(HEADER.unpack(header)[0]))
        return message

    def open(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        threads: int = 1,
        slots: int = 4,
        backends: BackendSettings = AS_SHIPPED,
    ) -> Ready | Broken:
        raw = manifest_bytes(manifest)
        asked = Open(
            folder=str(folder), manifest=raw, variant="default", threads=threads, slots=slots, backends=backends
        )
        self.send(asked)
        answer = self.receive()
        assert isinstance(answer, Ready | Broken)
        return answer

    def ask(self, request: Request, ticket: int = 1, budget_ms: float = 60_000) -> Piece:
        """Ask and return the final piece; its body is all pieces' bodies where there are several."""
        self.send(Ask(ticket, request, budget_ms))
        while True:
            piece = self.receive()
            assert isinstance(piece, Piece)
            assert piece.ticket == ticket
            if piece.final:
                return piece
