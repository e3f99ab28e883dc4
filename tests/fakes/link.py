"""The in-memory twin of `cloud_sync.link.Link`, and of the broker between such links.

It keeps what matters of MQTT: filters with wildcards, shared subscriptions, retained messages, QoS 1 messages that come
again after a reconnection until they are acknowledged, PUBACKs in the order of arrival, sessions and wills.
"""

from __future__ import annotations

import asyncio
import collections
import itertools
from collections.abc import Callable

from cloud_sync.messages import Details, Message, Will, is_text

NO_DETAILS = Details()
MAX_HELD = 10_000


def matches(pattern: str, topic: str) -> bool:
    """Whether a topic falls under a filter (MQTT 5 section 4.7)."""
    wanted, parts = pattern.split("/"), topic.split("/")
    for index, want in enumerate(wanted):
        if want == "#":
            return True
        if index >= len(parts) or want not in {"+", parts[index]}:
            return False
    return len(wanted) == len(parts)


class MemoryBroker:
    """Carries messages between twins, and remembers all that it saw."""

    def __init__(self) -> None:
        self.seen: list[Message] = []
        self.links: list[MemoryLink] = []
        self.retained: dict[str, Message] = {}
        self._turns: collections.Counter[str] = collections.Counter()

    def link(
        self,
        on_message: Callable[[Message], None],
        *,
        will: Will | None = None,
        on_up: Callable[[], None] = lambda: None,
        on_down: Callable[[], None] = lambda: None,
        clean_start: bool = False,
    ) -> MemoryLink:
        """Make a link that is not connected yet."""
        link = MemoryLink(self, on_message, will=will, on_up=on_up, on_down=on_down, clean_start=clean_start)
        self.links.append(link)
        return link

    def carry(self, topic: str, payload: bytes, qos: int, details: Details, *, retain: bool) -> None:
        """Give a message to everyone who subscribed; one link of each shared group."""
        self.seen.append(_message(topic, payload, qos, details, retain=retain))
        if retain:
            self.retained[topic] = self.seen[-1]
        groups: dict[str, list[MemoryLink]] = {}
        for link in self.links:
            for pattern in link.filters:
                if pattern.startswith("$share/"):
                    _, _, inner = pattern.split("/", 2)
                    if matches(inner, topic) and link.connected:
                        groups.setdefault(pattern, []).append(link)
                elif matches(pattern, topic):
                    link.take(topic, payload, min(qos, link.filters[pattern]), details, retain=False)
        for pattern, members in groups.items():
            turn = self._turns[pattern]
            self._turns[pattern] += 1
            members[turn % len(members)].take(topic, payload, qos, details, retain=False)


class MemoryLink:
    """One connection; `connect` and `drop` are the network's doing."""

    def __init__(
        self,
        broker: MemoryBroker,
        on_message: Callable[[Message], None],
        *,
        will: Will | None,
        on_up: Callable[[], None],
        on_down: Callable[[], None],
        clean_start: bool,
    ) -> None:
        self.connected = False
        self.alive_at = 0.0
        self.dropped = 0
        self.filters: dict[str, int] = {}
        self.acknowledged: list[Message] = []
        self._broker = broker
        self._deliver = on_message
        self._will = will
        self._on_up = on_up
        self._on_down = on_down
        self._clean_start = clean_start
        self._connection = 0
        self._numbers = itertools.count(1)
        self._unacknowledged: list[Message] = []
        self._waiting: list[tuple[Callable[[], None], asyncio.Future[None]]] = []
        self._up = asyncio.Event()
        self._ended = asyncio.Event()

    def connect(self) -> None:
        """The network is there: the session goes on, and what was not acknowledged comes again."""
        self.connected = True
        self._connection += 1
        again, self._unacknowledged = self._unacknowledged, []
        for message in [] if self._clean_start else again:
            self.take(
                message.topic, message.payload, message.qos, message.details, retain=message.retain, duplicate=True
            )
        waiting, self._waiting = self._waiting, []
        for send, done in waiting:
            send()
            if not done.done():
                done.set_result(None)
        self._up.set()
        self._on_up()

    def drop(self) -> None:
        """The network is gone, without a goodbye."""
        self.connected = False
        self._up.clear()
        if self._will is not None:
            self._broker.carry(
                self._will.topic, self._will.payload, self._will.qos, NO_DETAILS, retain=self._will.retain
            )
        self._on_down()

    def take(
        self, topic: str, payload: bytes, qos: int, details: Details, *, retain: bool, duplicate: bool = False
    ) -> None:
        """The broker's side: a message for this link."""
        message = _message(topic, payload, qos, details, retain=retain)
        message.duplicate = duplicate
        message.mid = next(self._numbers) if qos else 0
        message.connection = self._connection
        if qos:
            self._unacknowledged.append(message)
        if self.connected:
            self._deliver(message)

    # What follows is the face of `Link`.

    def subscribe(
        self,
        topic: str,
        qos: int = 1,
        *,
        retain_as_published: bool = True,
        on_refused: Callable[[str], None] | None = None,
    ) -> None:
        del retain_as_published, on_refused  # what is carried live has no such flag here, and nothing is refused
        self.filters[topic] = qos
        for kept in self._broker.retained.values():
            if not topic.startswith("$share/") and matches(topic, kept.topic):
                self.take(kept.topic, kept.payload, min(qos, kept.qos), kept.details, retain=True)

    def unsubscribe(self, topic: str) -> None:
        self.filters.pop(topic, None)

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 0,
        retain: bool = False,
        details: Details | None = None,
        expendable: bool = False,
    ) -> asyncio.Future[None]:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def send() -> None:
            self._broker.carry(topic, payload, qos, details or NO_DETAILS, retain=retain)

        told = details or NO_DETAILS
        texts = [topic, told.response_topic or "", told.content_type or "", *itertools.chain(*told.user)]
        if not topic or not all(map(is_text, texts)):
            done.set_exception(ConnectionError("no broker takes such a topic or such properties"))
        elif self.connected:
            asyncio.get_running_loop().call_soon(send)
            asyncio.get_running_loop().call_soon(lambda: None if done.done() else done.set_result(None))
        elif qos and len(self._waiting) < (MAX_HELD // 2 if expendable else MAX_HELD):
            self._waiting.append((send, done))
        else:
            done.set_exception(ConnectionError("cannot publish: the link is down"))
        return done

    def acknowledge(self, message: Message) -> None:
        message.settled = True
        while self.connected and self._unacknowledged and self._unacknowledged[0].settled:
            self.acknowledged.append(self._unacknowledged.pop(0))

    async def run(self) -> None:
        self.connect()
        await self._ended.wait()

    async def wait_up(self) -> None:
        await self._up.wait()

    async def close(self, timeout_s: float = 2.0) -> None:
        del timeout_s
        self.connected = False
        self._ended.set()


def _message(topic: str, payload: bytes, qos: int, details: Details, *, retain: bool) -> Message:
    return Message(
        topic=topic, payload=payload, qos=qos, retain=retain, duplicate=False, mid=0, connection=0, details=details
    )
