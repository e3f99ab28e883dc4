from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import msgspec
import pytest

from agent.supervisor import CRASH_LIMIT, START_LIMIT
from cloud_sync.report import ModelReport
from cloud_sync.state import Current
from cloud_sync.sync_settings import Problem, TargetModel
from models.channel import Ask, Piece
from tests.fakes.worker import echo
from tests.support.bench import Bench, Script, bench
from tests.support.box import turns
from tests.support.virtual_time import virtual_time


def wrong(ask: Ask) -> list[Piece]:
    return [Piece(ticket=ask.ticket, body=b'{"outputs": "something else"}')]


def slow(ask: Ask) -> list[Piece]:
    return [Piece(ticket=ask.ticket, body=echo(ask)[0].body, compute_ms=900.0)]


@virtual_time
async def test_a_first_version_serves_once_it_has_shown_its_golden_samples(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        target = here.install("1")
        await here.apply(target)
        assert here.report == ModelReport(state="serving", version="1", digest=target.digest, p95_ms=5.0)
        assert here.health.models == {"digits": "serving"}
        assert {ask.request.body for ask in here.worker.asks} == {b"golden"}
        assert (await here.state.current())["digits"] == Current("1", target.digest)
        assert (await here.ask()).final.model == "digits@1"
        assert here.changes > 0


@virtual_time
async def test_the_next_version_takes_over_and_the_worker_before_it_ends_when_it_is_done(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        await here.apply(first := here.install("1"))
        old = here.worker
        old.script = None
        going = here.box.ask(b"going")
        await turns()
        await here.apply(second := here.install("2"))
        assert (await here.ask()).final.model == "digits@2"
        await asyncio.sleep(1)
        assert not old.ended.done()
        old.answer(old.asks[-1])
        await here.box.finished(going)
        assert going.final.model == "digits@1"
        await turns()
        assert old.ended.done()
        assert (await here.state.current())["digits"] == Current("2", second.digest, "1", first.digest)


@virtual_time
async def test_a_worker_that_does_not_finish_in_time_is_ended_and_its_requests_are_asked_again(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        await here.apply(here.install("1"))
        here.worker.script = None
        going = here.box.ask(b"going")
        await turns()
        await here.apply(here.install("2"))
        await here.box.finished(going)
        assert going.final.model == "digits@2"


@pytest.mark.parametrize(("script", "word"), [(wrong, "expected"), (slow, "p95")])
def test_a25_a_version_that_does_not_show_what_it_must_is_not_tried_again_and_the_old_one_serves_on(
    tmp_path: Path, script: Script, word: str
) -> None:
    @virtual_time
    async def play() -> None:
        async with bench(tmp_path) as here:
            await here.apply(first := here.install("1"))
            here.scripts["2"] = script
            target = here.install("2", p95_ms=100.0)
            for _ in range(3):
                await here.apply(target)
            assert len(here.made) == 2
            assert here.worker.ended.done()
            report = here.report
            assert (report.state, report.version, report.target, report.code) == ("serving", "1", "2", "trial_failed")
            assert word in report.message
            assert (await here.state.failed())[target.digest].code == "trial_failed"
            assert (await here.state.current())["digits"] == Current("1", first.digest)
            assert (await here.ask()).final.model == "digits@1"

    play()


@virtual_time
async def test_a25_a_version_that_kills_its_worker_over_a_golden_sample_fails_its_trial(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:

        def crash(_ask: Ask) -> list[Piece]:
            asyncio.get_running_loop().call_soon(here.worker.die, "signal 11")
            return []

        here.scripts["1"] = crash
        await here.apply(here.install("1"))
        assert (here.report.state, here.report.code) == ("starting", "trial_failed")
        assert "signal 11" in here.report.message


@virtual_time
async def test_a25_a_version_that_answers_no_golden_sample_fails_after_a_minute(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        here.scripts["1"] = None
        started = here.box.clock()
        await here.apply(here.install("1"))
        assert here.report.code == "trial_failed"
        assert here.box.clock() - started == pytest.approx(60, abs=1)


@virtual_time
async def test_a25_a_version_that_cannot_be_opened_fails_its_trial(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        here.broken["1"] = "model.onnx: truncated"
        await here.apply(here.install("1"))
        assert (here.report.code, here.report.message) == ("trial_failed", "model.onnx: truncated")


@virtual_time
async def test_one_model_that_fails_keeps_the_others_from_nothing(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        here.broken["1"] = "truncated"
        missing = TargetModel(name="lost", version="1", error=Problem("not_found", "no such pack"))
        unstaged = TargetModel(name="waiting", version="1", digest="0" * 64)
        await here.apply(here.install("1"), missing, unstaged, here.install("2", name="language"))
        reports = here.activation.reports()
        assert {name: report.state for name, report in reports.items()} == {
            "digits": "starting",
            "lost": "starting",
            "waiting": "starting",
            "language": "serving",
        }
        assert (reports["lost"].code, reports["lost"].target) == ("not_found", "1")


@virtual_time
async def test_b5_a_disk_that_takes_no_note_keeps_the_old_version_serving_and_blames_nobody(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        await here.apply(here.install("1"))
        await here.box.database.run(lambda connection: connection.execute("PRAGMA query_only = 1"))
        target = here.install("2")
        await here.apply(target)
        assert (here.report.state, here.report.version, here.report.code) == ("serving", "1", "trial_impossible")
        assert (await here.ask()).final.model == "digits@1"
        await here.box.database.run(_writable)
        assert await here.state.failed() == {}
        await here.apply(target)
        assert here.report == ModelReport(state="serving", version="2", digest=target.digest, p95_ms=5.0)


def _writable(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA query_only = 0")


@virtual_time
async def test_what_served_before_a_restart_serves_after_it_without_a_trial(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        await here.apply(here.install("1"))
    async with bench(tmp_path) as here:
        await here.activation.resume()
        assert here.report.state == "starting"
        asked = here.box.ask(b"early")
        await turns(100)
        await here.box.finished(asked)
        assert asked.final.model == "digits@1"
        assert [ask.request.body for ask in here.worker.asks] == [b"early"]


@virtual_time
async def test_a_version_that_is_gone_from_the_disk_is_reported_and_taken_up_when_it_is_back(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        await here.state.set_current("digits", Current("1", "f" * 64))
        await here.activation.resume()
        assert (here.report.state, here.report.code) == ("failed", "missing")
        await here.apply(here.install("1"))
        assert (here.report.state, here.report.code) == ("serving", "")


@virtual_time
async def test_e16_a_worker_that_died_is_back_within_a_second_and_nobody_is_refused_meanwhile(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        await here.apply(here.install("1"))
        here.worker.script = None
        asked = [here.box.ask(str(number).encode()) for number in range(20)]
        await turns()
        died_at = here.box.clock()
        here.worker.die("signal 11")
        await here.box.finished(*asked)
        assert {one.code for one in asked} == {""}
        assert here.box.clock() - died_at < 1
        assert here.report.state == "serving"


@virtual_time
async def test_e16_each_restart_waits_longer_than_the_one_before(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        await here.apply(here.install("1"))
        waits = []
        for _ in range(CRASH_LIMIT - 1):
            died_at, number = here.box.clock(), len(here.made)
            here.worker.die("signal 11")
            async with asyncio.timeout(60):
                while len(here.made) == number or not here.worker.serving:  # noqa: ASYNC110 - on jumping time
                    await asyncio.sleep(0.01)
            waits.append(here.box.clock() - died_at)
        assert waits == sorted(waits)
        assert waits[0] < 0.2
        assert waits[-1] > 2


async def crash_in_a_loop(here: Bench) -> None:
    """Let the current version's workers die as often as it takes."""
    for _ in range(CRASH_LIMIT):
        worker = here.worker
        worker.die("signal 11")
        await asyncio.sleep(10)
        if here.worker is worker:
            return


@virtual_time
async def test_a_version_that_crashes_in_a_loop_is_rolled_back_and_the_one_before_serves(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        await here.apply(first := here.install("1"))
        await here.apply(second := here.install("2"))
        await crash_in_a_loop(here)
        report = here.report
        assert (report.state, report.version, report.target, report.code) == ("serving", "1", "2", "rolled_back")
        assert (await here.ask()).final.model == "digits@1"
        assert (await here.state.current())["digits"] == Current("1", first.digest)
        await here.apply(second)
        assert (here.report.version, here.report.code) == ("1", "rolled_back")


@virtual_time
async def test_e8_a_version_that_crashes_in_a_loop_with_none_before_it_is_given_up(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        await here.apply(here.install("1"))
        await crash_in_a_loop(here)
        assert (here.report.state, here.report.code) == ("failed", "rolled_back")
        number = len(here.made)
        asked = await here.ask()
        assert asked.code == "overloaded"
        await asyncio.sleep(100)
        assert len(here.made) == number
        assert await here.state.current() == {}


@virtual_time
async def test_crashes_far_apart_are_no_loop(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        await here.apply(here.install("1"))
        for _ in range(CRASH_LIMIT * 2):
            await asyncio.sleep(60)
            here.worker.die("signal 11")
            await asyncio.sleep(1)
        await asyncio.sleep(60)
        assert here.report.state == "serving"


@virtual_time
async def test_b19_a_current_version_that_cannot_be_started_for_a_while_is_tried_until_it_can(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        await here.apply(here.install("1"))
        here.broken["1"] = "cannot allocate memory"
        here.worker.die("killed")
        await asyncio.sleep(60)
        assert (here.report.state, here.report.code) == ("restarting", "start_failed")
        assert here.report.message == "cannot allocate memory"
        assert len(here.made) < 12
        assert (await here.ask()).code == "overloaded"
        del here.broken["1"]
        await asyncio.sleep(60)
        assert (here.report.state, here.report.code) == ("serving", "")
        assert (await here.ask()).code == ""
        assert await here.state.failed() == {}


@virtual_time
async def test_a29_a_current_version_that_cannot_be_started_any_more_is_left_for_the_one_before(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        await here.apply(here.install("1"))
        await here.apply(here.install("2"))
        here.broken["2"] = "model.onnx: the SHA-256 does not fit"
        here.worker.die("killed")
        await asyncio.sleep(60)
        report = here.report
        assert (report.state, report.version, report.target, report.code) == ("serving", "1", "2", "rolled_back")
        assert len([worker for worker in here.made if worker.broken]) == START_LIMIT
        assert (await here.ask()).final.model == "digits@1"


@virtual_time
async def test_a_model_that_no_deployment_names_any_more_ends_after_its_requests(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        await here.apply(here.install("1"))
        worker = here.worker
        worker.script = None
        going = here.box.ask(b"going")
        await turns()
        removing = asyncio.ensure_future(here.apply())
        await asyncio.sleep(1)
        worker.answer(worker.asks[-1])
        await here.box.finished(going)
        await removing
        assert going.code == ""
        assert worker.ended.done()
        assert here.activation.reports() == {}
        assert here.health.models == {}
        assert (await here.ask()).code == "model_not_found"
        assert await here.state.current() == {}


@virtual_time
async def test_stopping_in_the_middle_of_a_trial_leaves_no_worker(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        here.scripts["1"] = None
        trying = asyncio.ensure_future(here.apply(here.install("1")))
        await asyncio.sleep(1)
        trying.cancel()
        await asyncio.gather(trying, return_exceptions=True)
        assert here.worker.ended.done()
        assert await here.state.current() == {}


@virtual_time
async def test_a27_versions_that_follow_quickly_end_with_the_last_and_one_worker(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        targets = [here.install(str(number)) for number in range(1, 6)]
        await asyncio.gather(*(here.apply(target) for target in targets))
        await asyncio.sleep(10)
        assert (here.report.state, here.report.version) == ("serving", "5")
        assert len([worker for worker in here.made if not worker.ended.done()]) == 1


@virtual_time
async def test_a_new_version_in_place_of_one_that_crashes_ends_the_crashing(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        await here.apply(here.install("1"))
        here.worker.die("signal 11")
        await here.apply(here.install("2"))
        await asyncio.sleep(60)
        assert (here.report.state, here.report.version) == ("serving", "2")
        assert len([worker for worker in here.made if not worker.ended.done()]) == 1


@virtual_time
async def test_a_trial_teaches_how_long_the_new_version_takes(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        here.scripts["1"] = slow
        await here.apply(here.install("1"))
        assert here.box.service.queues["digits"].law.predict_ms(0, 0) == pytest.approx(900, rel=0.2)


@virtual_time
async def test_what_the_kernel_lacks_to_confine_a_worker_is_reported_while_it_is_so(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        assert b"unprotected" not in msgspec.json.encode(ModelReport(state="serving"))
        here.lacking, here.without = ["files: no Landlock"], ["cuda: not built in"]
        await here.apply(here.install("1"))
        assert (here.report.unprotected, here.report.fallbacks) == (["files: no Landlock"], ["cuda: not built in"])
        here.lacking = []
        here.worker.die()
        await asyncio.sleep(1)
        assert (here.report.state, here.report.unprotected) == ("serving", [])
