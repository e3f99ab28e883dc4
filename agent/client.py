"""A small client: ask a box a question over MQTT and get its answer.

from agent.client import ask
answer = ask("kitchen", "assistant", "What is MQTT?", host="127.0.0.1")
print(answer.text)
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from typing import Any, Self

import msgspec

from agent.telling import text_of
from cloud_sync.link import Link
from cloud_sync.messages import Details, LinkSettings, Message
from cloud_sync.wire import Topics


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """One reply message: a whole answer, a piece of one, or an error; `facts` are its user properties."""

    body: bytes
    facts: dict[str, str]

    @property
    def final(self) -> bool:
        """Whether nothing follows."""
        return self.facts.get("final", "true") == "true"

    @property
    def failed(self) -> bool:
        """Whether this is an error."""
        return self.facts.get("status") == "error"

    @property
    def value(self) -> Any:
        """The answer's JSON."""
        return msgspec.json.decode(self.body)

    @property
    def text(self) -> str:
        """The text in the answer, where its form has one; else its JSON."""
        return text_of(self.value)


class Client:
    """An asker: one link to a box's broker, any number of questions."""

    def __init__(self, device: str, settings: LinkSettings, *, name: str = "", prefix: str = "spillway") -> None:
        self.name = name or f"ask-{os.urandom(6).hex()}"
        self._topics = Topics(prefix, device)
        self._link = Link(
            msgspec.structs.replace(settings, client_id=settings.client_id or self.name, clean_start=True),
            on_message=self._receive,
        )
        self._waiting: dict[bytes, asyncio.Queue[Answer]] = {}
        self._task: asyncio.Task[None] | None = None
        self._state = ""
        self._seen = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._link.subscribe(self._topics.reply(self.name, "+"), 1)
        self._link.subscribe(self._topics.status, 1)
        self._task = asyncio.create_task(self._link.run())
        try:
            async with asyncio.timeout(10):
                await self._link.wait_up()
        except TimeoutError:
            self._task.cancel()
            settings = self._link.settings
            raise ConnectionError(f"no broker answers at {settings.host}:{settings.port}") from None
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._link.close()
        if self._task is not None:
            self._task.cancel()

    async def ask(
        self, model: str, body: bytes, content_type: str = "", wishes: dict[str, str] | None = None
    ) -> Answer:
        """Ask and return the final answer (an error is one too); raises TimeoutError where none comes."""
        async for answer in self.replies(model, body, content_type, wishes):
            if answer.final:
                return answer
        raise ConnectionError("the answer ended early")

    async def replies(
        self,
        model: str,
        body: bytes,
        content_type: str = "",
        wishes: dict[str, str] | None = None,
        *,
        timeout_s: float = 120.0,
    ) -> AsyncGenerator[Answer, None]:
        """Ask and yield every reply; `wishes` are the user properties of PROTOCOL 1, such as `deadline-ms`."""
        correlation = os.urandom(16)
        queue = self._waiting[correlation] = asyncio.Queue()
        details = Details(
            response_topic=self._topics.reply(self.name, model),
            correlation=correlation,
            content_type=content_type or None,
            user=tuple((wishes or {}).items()),
        )
        try:
            async with asyncio.timeout(timeout_s):
                await self._link.publish(self._topics.infer(model, self.name), body, qos=1, details=details)
                while True:
                    answer = await queue.get()
                    yield answer
                    if answer.final:
                        return
        finally:
            self._waiting.pop(correlation, None)

    async def presence(self, timeout_s: float) -> str:
        """Return the box's retained state (`online`, `draining`, `offline`); empty where none came in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._seen.wait()
        except TimeoutError:
            return ""
        return self._state

    def _receive(self, message: Message) -> None:
        if message.topic == self._topics.status:
            self._state = message.payload.decode(errors="replace")[:20]
            self._seen.set()
        queue = self._waiting.get(message.details.correlation or b"")
        if queue is not None:
            queue.put_nowait(Answer(body=message.payload, facts=dict(message.details.user)))
        if message.qos:
            self._link.acknowledge(message)


def ask(
    device: str, model: str, question: str | bytes, *, host: str = "127.0.0.1", port: int = 1883, **wishes: str
) -> Answer:
    """Ask one question and wait for the answer: text, or the bytes of an image or of JSON.

    `wishes` are the user properties of a request, with `_` for `-`: `deadline_ms="500"`, `privacy="local-only"`.
    """
    said = {name.replace("_", "-"): value for name, value in wishes.items()}

    async def once() -> Answer:
        async with Client(device, LinkSettings(host=host, port=port)) as client:
            body = question.encode() if isinstance(question, str) else question
            return await client.ask(model, body, "text/plain" if isinstance(question, str) else "", said)

    return asyncio.run(once())
