from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from agent.presence import HEALTH_EVERY_S, Presence
from agent.reporting import Reporter
from cloud_sync.errors import FetchError
from cloud_sync.messages import Will
from cloud_sync.report import FIGURES_S, GAP_S
from cloud_sync.sync_settings import Problem, SyncOutcome, TargetModel
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
        self.reporter = Reporter("kitchen")
        self.near, self.far = MemoryBroker(), MemoryBroker()
        here.health.state = "online"
        self.local = self._link(self.near, will=Will(STATUS, b"offline"))
        self.cloud = self._link(self.far)
        self.presence = Presence(
            Topics("spillway", "kitchen"),
            here.health,
            here.activation,
            self.local,  # type: ignore[arg-type]
            self.cloud,  # type: ignore[arg-type]
            self.reporter,
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
async def test_a_box_that_changes_all_the_time_reports_every_few_seconds_and_the_last_word_is_true(
    tmp_path: Path,
) -> None:
    async with telling(tmp_path) as told:
        told.cloud.connect()
        started = told.bench.box.clock()
        for number in range(100):
            target = TargetModel(name="lost", version=str(number), error=Problem("not_found", "no such pack"))
            await told.bench.apply(target)
            told.presence.changed.set()
            await asyncio.sleep(0.3)
        await asyncio.sleep(GAP_S + 1)
        assert len(told.said(REPORT)) <= (told.bench.box.clock() - started) / GAP_S + 1
        assert msgspec.json.decode(told.said(REPORT)[-1])["models"]["lost"]["target"] == "99"


@virtual_time
async def test_what_failed_here_and_what_the_repository_said_is_reported(tmp_path: Path) -> None:
    async with telling(tmp_path) as told:
        told.bench.broken["1"] = "model.onnx: truncated"
        await told.bench.apply(target := told.bench.install("1"))
        told.reporter.looked(SyncOutcome(models=[], pools=[], bytes_in=17, issued="2026-11-22T00:00:00Z"))
        told.reporter.could_not_look(FetchError("unreachable", "no route"))
        told.cloud.connect()
        await turns()
        report = msgspec.json.decode(told.said(REPORT)[-1])
        assert report["models"]["digits"]["code"] == "trial_failed"
        words = {"code": "trial_failed", "message": "model.onnx: truncated", "label": "digits@1"}
        assert report["failed"] == [{"digest": target.digest, **words}]
        assert (report["repository"]["issued"], report["repository"]["code"]) == ("2026-11-22T00:00:00Z", "unreachable")
        assert report["bytes"]["fetched"] == 17


@virtual_time
async def test_bytes_alone_are_reported_once_an_hour(tmp_path: Path) -> None:
    async with telling(tmp_path) as told:
        told.cloud.connect()
        for _ in range(2 * round(FIGURES_S / HEALTH_EVERY_S)):
            told.reporter.bytes.fetched += 1000
            await asyncio.sleep(HEALTH_EVERY_S)
        assert len(told.said(REPORT)) in (2, 3)
        assert msgspec.json.decode(told.said(REPORT)[-1])["bytes"]["fetched"] > 1000


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
