from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from agent.presence import HEALTH_EVERY_S, Presence
from cloud_sync.messages import Will
from cloud_sync.sync_settings import Problem, TargetModel
from cloud_sync.wire import Topics
from tests.fakes.link import MemoryBroker, MemoryLink
from tests.support.bench import Bench, bench
from tests.support.box import turns
from tests.support.virtual_time import virtual_time

STATUS = "spillway/kitchen/status"
MODELS = "spillway/kitchen/models"
HEALTH = "spillway/kitchen/health"
REPORT = "spillway/kitchen/report"


class Told:
    """A box's presence on two brokers in memory."""

    def __init__(self, here: Bench) -> None:
        self.bench = here
        self.near, self.far = MemoryBroker(), MemoryBroker()
        here.health.state = "online"
        self.local = self._link(self.near, will=Will(STATUS, b"offline"))
        self.cloud = self._link(self.far)
        self.presence = Presence(
            "kitchen",
            Topics("spillway", "kitchen"),
            here.health,
            here.activation,
            self.local,  # type: ignore[arg-type]
            self.cloud,  # type: ignore[arg-type]
        )

    def _link(self, broker: MemoryBroker, will: Will | None = None) -> MemoryLink:
        def changed() -> None:
            self.presence.changed.set()

        return broker.link(lambda _: None, will=will, on_up=changed, on_down=changed)

    def said(self, topic: str) -> list[bytes]:
        """Return what was published on a topic, in order."""
        return [
            message.payload for broker in (self.near, self.far) for message in broker.seen if message.topic == topic
        ]


@contextlib.asynccontextmanager
async def telling(folder: Path) -> AsyncIterator[Told]:
    async with bench(folder) as here:
        told = Told(here)
        task = asyncio.create_task(told.presence.run())
        try:
            yield told
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@virtual_time
async def test_a_box_tells_its_state_its_models_and_its_health_once_it_is_connected(tmp_path: Path) -> None:
    async with telling(tmp_path) as told:
        await told.bench.apply(told.bench.install("1"))
        told.presence.changed.set()
        await turns()
        assert told.near.seen == []
        told.local.connect()
        await turns()
        assert told.said(STATUS) == [b"online"]
        (models,) = map(msgspec.json.decode, told.said(MODELS))
        assert (models["digits"]["state"], models["digits"]["version"]) == ("serving", "1")
        (health,) = map(msgspec.json.decode, told.said(HEALTH))
        assert (health["ready"], health["models"]) == (True, {"digits": "serving"})
        assert all(message.retain and message.qos == 1 for message in told.near.seen)


@virtual_time
async def test_only_what_changed_is_told_again(tmp_path: Path) -> None:
    async with telling(tmp_path) as told:
        told.local.connect()
        await turns()
        await told.bench.apply(TargetModel(name="lost", version="1", error=Problem("not_found", "no such pack")))
        told.presence.changed.set()
        await turns()
        assert len(told.said(STATUS)) == 1
        assert len(told.said(MODELS)) == 2
        assert msgspec.json.decode(told.said(MODELS)[1])["lost"]["code"] == "not_found"


@virtual_time
async def test_health_is_told_every_minute_though_nothing_changed(tmp_path: Path) -> None:
    async with telling(tmp_path) as told:
        told.local.connect()
        await asyncio.sleep(HEALTH_EVERY_S * 3 + 1)
        assert len(told.said(HEALTH)) == 4
        assert len(told.said(MODELS)) == 1


@virtual_time
async def test_after_each_reconnection_everything_is_told_again(tmp_path: Path) -> None:
    async with telling(tmp_path) as told:
        told.local.connect()
        await turns()
        told.local.drop()
        await turns()
        assert told.said(STATUS) == [b"online", b"offline"]  # the broker spoke the will
        told.local.connect()
        await turns()
        assert told.said(STATUS) == [b"online", b"offline", b"online"]
        assert len(told.said(MODELS)) == 2


@virtual_time
async def test_the_report_goes_to_the_cloud_and_nothing_else_does(tmp_path: Path) -> None:
    async with telling(tmp_path) as told:
        await told.bench.apply(told.bench.install("1"))
        told.cloud.connect()
        await turns()
        assert {message.topic for message in told.far.seen} == {REPORT}
        report = msgspec.json.decode(told.said(REPORT)[-1])
        assert (report["device"], report["state"], report["models"]["digits"]["version"]) == ("kitchen", "online", "1")


@virtual_time
async def test_a_box_that_leaves_says_offline_last_on_both_links(tmp_path: Path) -> None:
    async with telling(tmp_path) as told:
        told.local.connect()
        told.cloud.connect()
        await turns()
        told.bench.health.state = "draining"
        told.presence.changed.set()
        await turns()
        await told.presence.leave()
        await turns()
        assert told.said(STATUS) == [b"online", b"draining", b"offline"]
        assert msgspec.json.decode(told.said(REPORT)[-1])["state"] == "offline"
        assert not told.local.connected
        assert not told.cloud.connected


@virtual_time
async def test_a_box_without_its_brokers_leaves_all_the_same(tmp_path: Path) -> None:
    async with telling(tmp_path) as told:
        started = told.bench.box.clock()
        await told.presence.leave()
        assert told.bench.box.clock() - started < 5
