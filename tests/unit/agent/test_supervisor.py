"""A version after its activation: watched, rolled back, recycled, unloaded; on jumping time with twins of workers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from agent.activation import RETRY_S
from agent.admission import IDLE_S, MAX_THREADS
from agent.records import PROVEN_S
from agent.supervisor import CRASH_LIMIT, ROOM_RETRY_S
from agent.watch import PAUSE_S, SETTLE_S
from agent.workers import Holding
from cloud_sync.state import Current
from cloud_sync.sync_settings import TargetModel
from models.channel import Ask, Piece
from tests.fakes.worker import MemoryWorker, echo
from tests.support.bench import Bench, Script, bench
from tests.support.box import Asked, turns
from tests.support.virtual_time import virtual_time


def answering(*, ms: float = 5.0, score: float = 0.9, fail: bool = False) -> Script:
    """Answer golden samples as they must be, and everything else so."""

    def script(ask: Ask) -> list[Piece]:
        if ask.request.body == b"golden":
            return echo(ask)
        if fail:
            return [Piece(ticket=ask.ticket, code="model_failed", message="not a number", compute_ms=ms)]
        body = msgspec.json.encode({"outputs": [{"label": "7", "score": score}]})
        return [Piece(ticket=ask.ticket, body=body, compute_ms=ms)]

    return script


async def ask_many(here: Bench, number: int, until: Callable[[], bool] = bool) -> list[Asked]:
    """Ask one question after the other, until something is so."""
    asked: list[Asked] = []
    while len(asked) < number and not until():
        asked.append(await here.ask())
        await asyncio.sleep(0.05)
    return asked


def decided(target: TargetModel, decision: str) -> TargetModel:
    return msgspec.structs.replace(target, decision=decision)


async def served(here: Bench, *, ms: float = 5.0, score: float = 0.9) -> tuple[TargetModel, TargetModel]:
    """Let version 1 show what it can, then return it and a version 2 to come."""
    here.scripts["1"] = answering(ms=ms, score=score)
    first = here.install("1")
    await here.apply(first)
    await ask_many(here, 200)
    return first, here.install("2")


@pytest.mark.parametrize(
    ("script", "word"),
    [
        (answering(fail=True), "errors: "),
        (answering(ms=60.0), "latency: "),
        (answering(score=0.4), "confidence: the best score is 0.400"),
    ],
)
def test_a25_a_version_that_does_worse_is_rolled_back_at_once_and_reported_with_the_figure(
    tmp_path: Path, script: Script, word: str
) -> None:
    @virtual_time
    async def play() -> None:
        async with bench(tmp_path) as here:
            first, second = await served(here)
            here.scripts["2"] = script
            await here.apply(decided(second, "salt"))
            bad = here.worker
            await asyncio.sleep(SETTLE_S + 3)
            asked = await ask_many(here, 500, lambda: here.report.version == "1")
            assert len(asked) <= 60
            report = here.report
            assert (report.state, report.version, report.target, report.code) == ("serving", "1", "2", "rolled_back")
            assert word in report.message
            failure = (await here.state.failed())[second.digest]
            assert (failure.code, failure.decision, failure.label) == ("rolled_back", "salt", "digits@2")
            assert word in failure.message
            assert (await here.state.current())["digits"] == Current("1", first.digest)
            assert (await here.ask()).final.model == "digits@1"
            await turns()
            assert bad.ended.done()

    play()


@virtual_time
async def test_the_old_version_s_worker_is_ready_before_the_failing_one_is_left_and_nothing_is_lost(
    tmp_path: Path,
) -> None:
    async with bench(tmp_path) as here:
        _, second = await served(here)
        here.scripts["2"] = answering(fail=True)
        await here.apply(second)
        asked = await ask_many(here, 100)
        assert {one.final.model for one in asked if not one.code} == {"digits@1"}
        assert {one.code for one in asked} == {"", "model_failed"}
        codes = [one.code for one in asked]
        assert codes == sorted(codes, reverse=True), "an answer of the old version, then again one of the new"


@virtual_time
async def test_a_version_that_was_rolled_back_is_not_tried_again_until_admins_decide_for_it_anew(
    tmp_path: Path,
) -> None:
    async with bench(tmp_path) as here:
        _, second = await served(here)
        here.scripts["2"] = answering(fail=True)
        await here.apply(decided(second, "salt"))
        await ask_many(here, 100, lambda: here.report.version == "1")
        for _ in range(3):
            await here.apply(decided(second, "salt"))
            await here.apply(decided(second, ""))
            assert (here.report.version, here.report.target, here.report.code) == ("1", "2", "rolled_back")
        here.scripts["2"] = answering()
        await here.apply(decided(second, "pepper"))
        assert (here.report.version, here.report.code) == ("2", "")
        assert await here.state.failed() == {}


@virtual_time
async def test_a_failure_from_before_decisions_were_kept_is_bound_to_the_first_that_is_seen(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        here.broken["1"] = "truncated"
        target = here.install("1")
        await here.apply(target)
        del here.broken["1"]
        await here.apply(decided(target, "salt"))
        assert here.report.code == "trial_failed"
        await here.apply(decided(target, "pepper"))
        assert here.report.state == "serving"


@virtual_time
async def test_a_version_as_good_as_the_one_before_stays(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        _, second = await served(here)
        here.scripts["2"] = answering(ms=6.0, score=0.85)
        await here.apply(second)
        await asyncio.sleep(SETTLE_S)
        await ask_many(here, 1000)
        assert (here.report.version, here.report.code) == ("2", "")
        assert len(here.made) == 2


@virtual_time
async def test_the_figures_of_the_version_before_outlive_a_restart(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        _, second = await served(here)
        await here.apply(second)
    async with bench(tmp_path) as here:
        here.scripts["1"], here.scripts["2"] = answering(), answering(score=0.3)
        await here.activation.resume()
        await asyncio.sleep(1)
        await ask_many(here, 200, lambda: here.report.version == "1")
        assert (here.report.version, here.report.code) == ("1", "rolled_back")
        assert here.report.message.startswith("confidence")


@virtual_time
async def test_a_slow_box_is_not_taken_for_a_slow_version(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        _, second = await served(here)
        here.scripts["2"] = answering(ms=60.0)
        await here.apply(second)

        def hot(ask: Ask) -> list[Piece]:
            return [Piece(ticket=ask.ticket, body=echo(ask)[0].body, compute_ms=60.0)]

        here.scripts["1"] = hot
        await asyncio.sleep(SETTLE_S + 3)
        await ask_many(here, 60)
        assert here.report.version == "2"
        assert len(here.made) == 3
        assert here.made[-1].ended.done()
        here.scripts["1"] = answering()
        await asyncio.sleep(PAUSE_S)
        await ask_many(here, 60, lambda: here.report.version == "1")
        assert here.report.code == "rolled_back"


@virtual_time
async def test_where_the_version_before_cannot_be_started_the_new_one_serves_on(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        _, second = await served(here)
        here.scripts["2"] = answering(score=0.3)
        await here.apply(second)
        here.broken["1"] = "cannot allocate memory"
        await ask_many(here, 80)
        assert (here.report.state, here.report.version) == ("serving", "2")
        assert len(here.made) == 3
        del here.broken["1"]
        await asyncio.sleep(PAUSE_S)
        await ask_many(here, 80, lambda: here.report.version == "1")
        assert here.report.code == "rolled_back"


@virtual_time
async def test_a26_an_agent_that_crashes_in_a_loop_after_an_activation_rolls_back_at_the_third_start(
    tmp_path: Path,
) -> None:
    async with bench(tmp_path) as here:
        first, second = await served(here)
        await here.activation.settle()
        await here.apply(second)
    for number in (1, 2, 3):
        async with bench(tmp_path) as here:
            await here.activation.resume()
            await asyncio.sleep(10)
            version, code = ("1", "rolled_back") if number == 3 else ("2", "")
            assert (here.report.state, here.report.version, here.report.code) == ("serving", version, code)
    assert here.report.message.startswith("agent: it ended several times")
    async with bench(tmp_path) as here:
        assert (await here.state.current())["digits"] == Current("1", first.digest)
        assert second.digest in await here.state.failed()


@virtual_time
async def test_a26_a_first_version_has_nothing_to_go_back_to_and_is_served_on(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        await here.apply(here.install("1"))
    for _ in range(6):
        async with bench(tmp_path) as here:
            await here.activation.resume()
            await asyncio.sleep(1)
            assert (here.report.state, here.report.code) == ("serving", "")


@virtual_time
async def test_a26_clean_ends_and_long_runs_are_no_crash_loop(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        _, second = await served(here)
        await here.apply(second)
    for _ in range(5):
        async with bench(tmp_path) as here:
            await here.activation.resume()
            await asyncio.sleep(10)
            await here.activation.settle()
    async with bench(tmp_path) as here:
        await here.activation.resume()
        await asyncio.sleep(PROVEN_S + 10)
    for _ in range(5):
        async with bench(tmp_path) as here:
            await here.activation.resume()
            await asyncio.sleep(10)
    assert (here.report.state, here.report.version) == ("serving", "2")


@virtual_time
async def test_a_leaking_worker_is_replaced_between_requests_and_nobody_notices(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        await here.apply(here.install("1", memory_mb=100))
        leaking = here.worker
        leaking.holds = Holding(own_mb=213)
        await asyncio.sleep(3)
        assert len(here.made) == 1
        leaking.script = None
        going = here.box.ask(b"going")
        await turns()
        leaking.holds = Holding(own_mb=215)
        await asyncio.sleep(3)
        assert (len(here.made), leaking.ended.done()) == (2, False)
        assert (await here.ask()).final.model == "digits@1"
        leaking.answer(leaking.asks[-1])
        await here.box.finished(going)
        await turns()
        assert (going.code, leaking.ended.done(), here.report.state) == ("", True, "serving")


@virtual_time
async def test_a_version_that_leaks_again_and_again_is_rolled_back(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        await here.apply(here.install("1", memory_mb=100))
        await here.apply(here.install("2", memory_mb=100))
        here.holds["2"] = Holding(own_mb=1000)
        here.worker.holds = Holding(own_mb=1000)
        await asyncio.sleep(60)
        assert (here.report.state, here.report.version, here.report.code) == ("serving", "1", "rolled_back")
        assert here.report.message.startswith("memory: it holds 1000 MiB of its own, over 214 MiB")
        assert len(here.made) <= CRASH_LIMIT + 3


@virtual_time
async def test_a_worker_with_hundreds_of_threads_is_ended_and_its_requests_are_asked_again(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        await here.apply(here.install("1"))
        here.worker.script = None
        asked = here.box.ask(b"hi")
        await turns()
        here.worker.holds = Holding(threads=MAX_THREADS + 1)
        await here.box.finished(asked)
        assert asked.code == ""
        assert len(here.made) == 2


@virtual_time
async def test_e19_a_model_without_room_waits_unloaded_says_why_and_is_loaded_once_there_is_room(
    tmp_path: Path,
) -> None:
    async with bench(tmp_path) as here:
        here.total_mb = 300
        target = here.install("1", memory_mb=400)
        await here.apply(target)
        assert (here.report.state, here.report.code) == ("starting", "no_room")
        assert here.report.message == "no room in memory: it needs 400 MiB and 236 can be had"
        assert (await here.ask()).code == "overloaded"
        assert await here.state.failed() == {}
        here.total_mb = 600
        await asyncio.sleep(RETRY_S + 5)
        assert (here.report.state, here.report.version, here.report.code) == ("serving", "1", "")


@virtual_time
async def test_e19_what_served_before_a_restart_and_has_no_room_now_says_so_to_askers(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        await here.apply(here.install("1", memory_mb=400))
    async with bench(tmp_path) as here:
        here.total_mb = 300
        early = here.box.ask(b"early")
        await here.activation.resume()
        await asyncio.sleep(1)
        await here.box.finished(early)
        assert (here.report.state, here.report.code) == ("unloaded", "no_room")
        asked = await here.ask()
        assert asked.code == "overloaded"
        assert b"no room in memory: it needs 400 MiB and 236 can be had" in asked.final.body
        here.total_mb = 600
        await asyncio.sleep(ROOM_RETRY_S + 1)
        assert (await here.ask()).code == ""
        assert (here.report.state, here.report.code) == ("serving", "")


def is_loaded(here: Bench, name: str) -> bool:
    return any(worker.version.name == name and worker.serving for worker in here.made)


@virtual_time
async def test_e19_the_longest_idle_model_makes_room_and_comes_back_when_it_is_asked(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        here.total_mb = 600
        here.holds = {"1": Holding(resident_mb=250, peak_mb=250), "2": Holding(resident_mb=250, peak_mb=250)}
        old, new = here.install("1", name="digits", memory_mb=250), here.install("1", name="sea", memory_mb=250)
        await here.apply(old, new)
        await asyncio.sleep(IDLE_S + 1)
        await here.box.finished(here.box.ask(model="sea"))
        third = here.install("2", name="language", memory_mb=250)
        await here.apply(old, new, third)
        states = {name: report.state for name, report in here.activation.reports().items()}
        assert states == {"digits": "unloaded", "sea": "serving", "language": "serving"}
        assert (is_loaded(here, "digits"), is_loaded(here, "sea")) == (False, True)
        await asyncio.sleep(IDLE_S + 1)
        await here.box.finished(here.box.ask(model="sea"))
        asked = await here.ask()
        assert (asked.code, asked.final.model) == ("", "digits@1")
        states = {name: report.state for name, report in here.activation.reports().items()}
        assert states == {"digits": "serving", "sea": "serving", "language": "unloaded"}


@virtual_time
async def test_e19_two_models_that_are_both_busy_do_not_chase_each_other_out(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        here.total_mb = 350
        here.holds = {"1": Holding(resident_mb=250, peak_mb=250)}
        both = here.install("1", name="digits", memory_mb=250), here.install("1", name="sea", memory_mb=250)
        await here.apply(*both)
        codes = []
        for _ in range(100):
            for name in ("digits", "sea"):
                asked = here.box.ask(model=name)
                await here.box.finished(asked)
                codes.append(asked.code)
            await asyncio.sleep(0.5)
        assert len(here.made) < 6
        assert codes.count("") >= 100
        assert set(codes) <= {"", "overloaded"}


@virtual_time
async def test_two_versions_that_do_not_fit_together_switch_one_after_the_other_and_requests_wait(
    tmp_path: Path,
) -> None:
    async with bench(tmp_path) as here:
        here.total_mb = 400
        here.holds = {"1": Holding(resident_mb=250, peak_mb=250), "2": Holding(resident_mb=250, peak_mb=250)}
        await here.apply(here.install("1", memory_mb=250))
        old = here.worker
        old.script = None
        going = here.box.ask(b"going")
        await turns()
        switching = asyncio.ensure_future(here.apply(here.install("2", memory_mb=250)))
        await asyncio.sleep(1)
        waiting = here.box.ask(b"waiting")
        await turns()
        assert len([worker for worker in here.made if worker.serving]) == 1
        old.answer(old.asks[-1])
        await switching
        await here.box.finished(going, waiting)
        assert (going.final.model, waiting.final.model) == ("digits@1", "digits@2")
        assert max(alive_together(here.made)) == 1


def alive_together(made: list[MemoryWorker]) -> list[int]:
    """Return how many workers are alive now, in a list for `max`."""
    return [len([worker for worker in made if not worker.ended.done()])]


@virtual_time
async def test_a_trial_that_fails_where_the_old_version_had_to_end_first_brings_the_old_one_back(
    tmp_path: Path,
) -> None:
    async with bench(tmp_path) as here:
        here.total_mb = 400
        here.holds = {"1": Holding(resident_mb=250, peak_mb=250)}
        await here.apply(here.install("1", memory_mb=250))
        here.broken["2"] = "truncated"
        await here.apply(here.install("2", memory_mb=250))
        await asyncio.sleep(1)
        assert (here.report.state, here.report.version, here.report.code) == ("serving", "1", "trial_failed")
        assert (await here.ask()).final.model == "digits@1"


@virtual_time
async def test_a_version_over_its_memory_budget_fails_its_trial_with_the_figure(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        here.holds["1"] = Holding(resident_mb=150)
        await here.apply(here.install("1", memory_mb=100))
        assert here.report.code == "trial_failed"
        assert here.report.message == "budget.memory_mb: 150 MiB are over 100 MiB"


@virtual_time
async def test_a_budget_that_is_missed_once_by_a_busy_box_is_measured_again(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        asked = 0

        def busy_first(ask: Ask) -> list[Piece]:
            nonlocal asked
            asked += 1
            return [Piece(ticket=ask.ticket, body=echo(ask)[0].body, compute_ms=900.0 if asked < 20 else 5.0)]

        here.scripts["1"] = busy_first
        await here.apply(here.install("1", p95_ms=100))
        assert (here.report.state, here.report.p95_ms) == ("serving", 5.0)


@virtual_time
async def test_what_a_version_held_here_counts_at_its_next_start_in_place_of_its_budget(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        here.holds["1"] = Holding(resident_mb=50, peak_mb=60)
        await here.apply(here.install("1", memory_mb=400))
        await asyncio.sleep(5)
    async with bench(tmp_path) as here:
        here.total_mb = 200
        await here.activation.resume()
        await asyncio.sleep(1)
        assert here.report.state == "serving"


@virtual_time
async def test_a_mistake_of_ours_in_a_supervisor_ends_the_root_task(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        await here.apply(here.install("1"))
        running = asyncio.ensure_future(here.activation.run())
        here.activation._on_fault(RuntimeError("a mistake"))
        with pytest.raises(RuntimeError, match="a mistake"):
            await running


@virtual_time
async def test_e19_models_that_fit_one_after_the_other_wait_for_each_other_at_the_start(tmp_path: Path) -> None:
    async with bench(tmp_path) as here:
        await here.apply(here.install("1", memory_mb=400), here.install("1", name="sea", memory_mb=400))
    async with bench(tmp_path) as here:
        here.total_mb = 700
        here.holds["1"] = Holding(resident_mb=100, peak_mb=100)
        await here.activation.resume()
        await asyncio.sleep(1)
        assert {report.state for report in here.activation.reports().values()} == {"serving"}
        assert len(here.made) == 2
