"""What the box publishes of itself: presence, models, health and the report, whenever they change."""

from __future__ import annotations

import asyncio
import contextlib
import logging

import msgspec

from agent.activation import Activation
from agent.health import Health
from cloud_sync.link import Link
from cloud_sync.notify import notify
from cloud_sync.wire import Topics

log = logging.getLogger(__name__)

HEALTH_EVERY_S = 60.0
LEAVE_TIMEOUT_S = 2.0


class Presence:
    """Retained messages on both links; `changed` asks for a new look."""

    def __init__(
        self, device: str, topics: Topics, health: Health, activation: Activation, local: Link, cloud: Link | None
    ) -> None:
        self.changed = asyncio.Event()
        self._device = device
        self._topics = topics
        self._health = health
        self._activation = activation
        self._local = local
        self._cloud = cloud
        self._told: dict[str, bytes] = {}

    async def run(self) -> None:
        """Publish what changed, and health every minute; a root task."""
        while True:
            try:
                async with asyncio.timeout(HEALTH_EVERY_S):
                    await self.changed.wait()
            except TimeoutError:
                self._told.pop(self._topics.health, None)
            self.changed.clear()
            self.tell()

    def tell(self) -> None:
        """Publish what is not yet said on each link that is up."""
        models = self._activation.reports()
        summary = self._health.summary()
        self._publish(
            self._local,
            {
                self._topics.status: self._health.state.encode(),
                self._topics.models: msgspec.json.encode(models),
                self._topics.health: msgspec.json.encode(summary),
            },
        )
        report = {"device": self._device, "state": self._health.state, "models": models}
        self._publish(self._cloud, {self._topics.report: msgspec.json.encode(report)})
        notify(f"STATUS={self._health.status_line()}")

    async def leave(self) -> None:
        """Say `offline` and close both links: after a clean goodbye no broker speaks the will."""
        if self._local.connected:
            with contextlib.suppress(TimeoutError, ConnectionError):
                async with asyncio.timeout(LEAVE_TIMEOUT_S):
                    await self._local.publish(self._topics.status, b"offline", qos=1, retain=True)
        await self._local.close()
        if self._cloud is not None:
            self._health.state = "offline"
            self.tell()
            await self._cloud.close()

    def _publish(self, link: Link | None, messages: dict[str, bytes]) -> None:
        """Publish what differs from the last time; after a reconnection, everything."""
        if link is None or not link.connected:
            for topic in messages:
                self._told.pop(topic, None)
            return
        for topic, payload in messages.items():
            if self._told.get(topic) != payload:
                self._told[topic] = payload
                link.publish(topic, payload, qos=1, retain=True).add_done_callback(_look)


def _look(done: asyncio.Future[None]) -> None:
    if not done.cancelled() and done.exception() is not None:
        log.debug("a retained message was not taken: %s", done.exception())
