"""An in-memory twin of a worker's process: the agent's own `Worker` with its socket and its process taken away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from agent.workers import Holding, Version, Worker, WorkerEndedError
from models.backend_settings import BackendSettings
from models.channel import Ask, Cancel, Count, Counted, FromWorker, Piece, Ready, ToWorker
from models.errors import ModelError

_AS_SHIPPED = BackendSettings()
Script = Callable[[Ask], Sequence[FromWorker]]


def version(name: str = "digits", number: str = "1", *, manifest: bytes = b"{}") -> Version:
    """Return a version that lies on no disk."""
    return Version(
        name=name,
        version=number,
        digest=f"{number:0>64}",
        folder=Path("/nowhere"),
        variant="default",
        manifest=manifest,
    )


def echo(ask: Ask) -> list[Piece]:
    """Answer a request with its own body as one generated text, after 5 ms of compute."""
    body = msgspec.json.encode({"outputs": ask.request.body.decode(errors="replace")})
    return [Piece(ticket=ask.ticket, body=body, compute_ms=5.0)]


class MemoryWorker(Worker):
    """Keeps what it is sent; answers by `script` at the loop's next turn, or when the test says so."""

    def __init__(
        self,
        of: Version | None = None,
        *,
        capacity: int = 1,
        context_tokens: int = 0,
        longest_token_bytes: int = 0,
        script: Script | None = None,
        tokens: Callable[[Count], Counted] | None = None,
    ) -> None:
        super().__init__(of or version())
        self.sent: list[ToWorker] = []
        self.script = script
        self.broken = ""
        self.holds = Holding()
        self._tokens = tokens
        self._facts = Ready(
            load_ms=1.0,
            capacity=capacity,
            context_tokens=context_tokens,
            longest_token_bytes=longest_token_bytes,
        )

    @property
    def asks(self) -> list[Ask]:
        """The requests that it was given, in order."""
        return [message for message in self.sent if isinstance(message, Ask)]

    @property
    def cancels(self) -> list[int]:
        """The tickets that nobody wants any more."""
        return [message.ticket for message in self.sent if isinstance(message, Cancel)]

    def serve(self) -> MemoryWorker:
        """Be loaded and warm."""
        self._receive(self._facts)
        return self

    def answer(self, ask: Ask, body: bytes = b'{"outputs":1}', **facts: object) -> None:
        """Send a piece of an answer, the final one unless it says otherwise."""
        self._receive(Piece(ticket=ask.ticket, body=body, **facts))  # type: ignore[arg-type]

    def die(self, why: str = "its socket closed") -> None:
        """End as a killed process does."""
        self._end(why)

    async def start(self, *, threads: int, slots: int, backends: BackendSettings = _AS_SHIPPED) -> Ready:
        del threads, slots, backends
        if self.broken:
            self._end(self.broken)
            raise ModelError(self.broken)
        self.serve()
        return self._facts

    def holding(self) -> Holding:
        return self.holds

    def memory_mb(self) -> float:
        return self.holds.resident_mb

    async def stop(self) -> None:
        self.stopping = True
        self._end("stopped")

    def _send(self, message: ToWorker) -> None:
        if self.ended.done():
            raise WorkerEndedError(f"the worker of {self.version.label} is gone")
        self.sent.append(message)
        loop = asyncio.get_running_loop()
        if isinstance(message, Ask) and self.script is not None:
            for reply in self.script(message):
                loop.call_soon(self._receive_if_alive, reply)
        elif isinstance(message, Count):
            counted = self._tokens(message) if self._tokens is not None else Counted(ticket=message.ticket)
            loop.call_soon(self._receive_if_alive, counted)

    def _receive_if_alive(self, message: FromWorker) -> None:
        if not self.ended.done():
            self._receive(message)
