"""One asker for every box and echo: same client, same properties, one question after another or many at once."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from cloud_sync.link import Link
from cloud_sync.messages import Details, LinkSettings, Message
from cloud_sync.wire import Topics

NAME = "asker"
PATIENCE_S = 120.0


class WrongAnswerError(Exception):
    """A box answered with an error."""


class Asker:
    """Asks over MQTT with QoS 1 and awaits the answer by its Correlation Data."""

    def __init__(self, port: int) -> None:
        settings = LinkSettings(port=port, client_id=NAME, clean_start=True, receive_maximum=1000)
        self._link = Link(settings, on_message=self._receive)
        self._waiting: dict[bytes, asyncio.Future[Message]] = {}
        self._numbers = itertools.count(1)
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._link.subscribe(f"spillway/+/reply/{NAME}/+", 1)
        self._task = asyncio.create_task(self._link.run())
        await asyncio.wait_for(self._link.wait_up(), PATIENCE_S)
        await asyncio.sleep(0.1)  # until the broker has subscribed us
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._link.close()
        if self._task is not None:
            self._task.cancel()

    async def ask(self, device: str, model: str, body: bytes, content_type: str) -> float:
        """Ask once and return the seconds until the answer is here; raises WrongAnswerError."""
        topics = Topics("spillway", device)
        correlation = b"%d" % next(self._numbers)
        details = Details(response_topic=topics.reply(NAME, model), correlation=correlation, content_type=content_type)
        answered = self._waiting[correlation] = asyncio.get_running_loop().create_future()
        started = time.perf_counter()
        self._link.publish(topics.infer(model, NAME), body, qos=1, details=details)
        message = await answered
        took_s = time.perf_counter() - started
        if ("status", "ok") not in message.details.user:
            raise WrongAnswerError(message.payload[:300].decode(errors="replace"))
        return took_s

    async def one_by_one(
        self, device: str, model: str, bodies: Sequence[bytes], content_type: str, number: int
    ) -> list[float]:
        """Ask `number` questions, each after the answer to the one before; return the seconds of each."""
        return [
            await asyncio.wait_for(self.ask(device, model, bodies[at % len(bodies)], content_type), PATIENCE_S)
            for at in range(number)
        ]

    async def at_once(
        self, device: str, model: str, bodies: Sequence[bytes], content_type: str, number: int, in_flight: int
    ) -> tuple[float, list[float]]:
        """Ask `number` questions, `in_flight` at any time; return the seconds of all together and of each."""
        took: list[float] = []
        turns = iter(range(number))

        async def asker() -> None:
            for at in turns:
                took.append(await self.ask(device, model, bodies[at % len(bodies)], content_type))  # noqa: PERF401

        started = time.perf_counter()
        async with asyncio.timeout(PATIENCE_S + number), asyncio.TaskGroup() as group:
            for _ in range(in_flight):
                group.create_task(asker())
        return time.perf_counter() - started, took

    def _receive(self, message: Message) -> None:
        answered = self._waiting.pop(message.details.correlation or b"", None)
        if answered is not None:
            answered.set_result(message)
        if message.qos:
            self._link.acknowledge(message)
