"""What the box publishes of itself: presence, models, health and the report, whenever they change."""

from __future__ import annotations

import asyncio
import contextlib
import logging

import msgspec

from agent.activation import Activation
from agent.health import Health
from agent.reporting import Reporter
from cloud_sync.link import Link
from cloud_sync.notify import notify
from cloud_sync.report import Pacer, facts_of, report_bytes
from cloud_sync.wire import Topics

log = logging.getLogger(__name__)

HEALTH_EVERY_S = 60.0
LEAVE_TIMEOUT_S = 2.0


class Presence:
    """Retained messages on both links; `changed` asks for a new look."""

    def __init__(
        self,
        topics: Topics,
        health: Health,
        activation: Activation,
        local: Link,
        cloud: Link | None,
        reporter: Reporter,
    ) -> None:
        self.changed = asyncio.Event()
        self._reporter = reporter
        self._pacer = Pacer()
        self._later: asyncio.TimerHandle | None = None
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
        self._tell_fleet(now_or_never=False)
        notify(f"STATUS={self._health.status_line()}")

    def _tell_fleet(self, *, now_or_never: bool) -> None:
        """Publish the report where it is due; a box that changes all the time does so every few seconds."""
        if self._cloud is None or not self._cloud.connected:
            self._pacer.forget()
            return
        loop = asyncio.get_running_loop()
        report = self._reporter.report(self._health, self._activation)
        facts = facts_of(report)
        wait_s = self._pacer.wait_s(loop.time(), facts)
        if wait_s is None:
            return
        if wait_s > 0 and not now_or_never:
            if self._later is None:
                self._later = loop.call_later(wait_s, self._look_again)
            return
        self._pacer.told(loop.time(), facts)
        self._cloud.publish(self._topics.report, report_bytes(report), qos=1, retain=True).add_done_callback(_look)

    def _look_again(self) -> None:
        self._later = None
        self.changed.set()

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
            self._tell_fleet(now_or_never=True)
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
