"""A box with its MQTT door on a broker in memory, and an asker beside it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from agent.mqtt import MqttDoor
from cloud_sync.messages import Details, Message
from tests.fakes.cloud_door import MemoryCloud
from tests.fakes.link import MemoryBroker, MemoryLink
from tests.support.box import Box, open_box, turns

INFER = "spillway/kitchen/infer/digits/me"
REPLY = "spillway/kitchen/reply/me/digits"
RESULTS = "spillway/kitchen/results/digits"


class Heard(msgspec.Struct, frozen=True):
    """One reply as an asker sees it."""

    topic: str
    body: bytes
    facts: dict[str, str]
    correlation: bytes | None
    qos: int
    content_type: str | None

    @property
    def json(self) -> dict[str, object]:
        """The body as an object."""
        value: dict[str, object] = msgspec.json.decode(self.body)
        return value

    @property
    def code(self) -> object:
        """The error's code; None for an answer."""
        told = self.json.get("error")
        return told.get("code") if isinstance(told, dict) else told


class MqttBox:
    """What the tests hold: the box, its door, and everything that was published to askers."""

    def __init__(self, box: Box, broker: MemoryBroker, door: MqttDoor, link: MemoryLink) -> None:
        self.box = box
        self.broker = broker
        self.door = door
        self.link = link
        self.asker = broker.link(self.receive, clean_start=True)
        self.heard: list[Heard] = []

    def receive(self, message: Message) -> None:
        """Take a reply in."""
        details = message.details
        self.heard.append(
            Heard(
                message.topic,
                message.payload,
                dict(details.user),
                details.correlation,
                message.qos,
                details.content_type,
            )
        )

    async def ask(self, body: bytes = b"hello", topic: str = INFER, *, qos: int = 1, **details: object) -> None:
        """Publish a request; `details` are its MQTT 5 properties."""
        self.asker.publish(topic, body, qos=qos, details=Details(**details))  # type: ignore[arg-type]
        await turns()

    async def answered(self, number: int = 1) -> list[Heard]:
        """Wait until so many replies have come and no request is open; there must be no more of them."""
        async with asyncio.timeout(100):
            while len(self.heard) < number or self.box.service.intake.tickets:  # noqa: ASYNC110 - on jumping time
                await asyncio.sleep(0.01)
        await turns()
        assert len(self.heard) == number
        return self.heard

    @property
    def unacknowledged(self) -> int:
        """Requests that the broker still holds for the box."""
        return len(self.link._unacknowledged)


@contextlib.asynccontextmanager
async def open_mqtt_box(
    folder: Path, addition: str = "", *, cloud: MemoryCloud | None = None
) -> AsyncIterator[MqttBox]:
    """Open a box whose door is connected; askers may listen on every topic under it."""
    async with open_box(folder, addition, cloud=cloud) as box:
        broker = MemoryBroker()
        door = MqttDoor(box.config, box.service, box.clock)
        link = broker.link(door.receive)
        mqtt = MqttBox(box, broker, door, link)
        asker = mqtt.asker
        asker.subscribe("spillway/kitchen/reply/#", 1)
        asker.subscribe("spillway/kitchen/results/#", 1)
        asker.subscribe("elsewhere/#", 1)
        asker.connect()
        door.attach(link)  # type: ignore[arg-type]
        link.connect()
        yield mqtt
