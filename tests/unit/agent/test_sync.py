from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable

from agent.sync import FIRST_RETRY_S, MAX_RETRY_S, Looker
from cloud_sync.errors import CloudError, FetchError, StoreError
from cloud_sync.sync_settings import SyncOutcome, SyncSettings
from tests.support.virtual_time import virtual_time

DAY_S = 86_400.0


def unreachable() -> FetchError:
    return FetchError("unreachable", "no route")


class Looks:
    """A looker whose looks all fail before they begin, and when they were made."""

    def __init__(
        self, error: Callable[[], Exception], *, look_every_s: float = DAY_S, hint_spread_s: float = 300.0
    ) -> None:
        self.error = error
        self.at: list[float] = []
        self.problems: list[CloudError] = []
        self.looker = Looker(
            self._settings,
            look_every_s=look_every_s,
            hint_spread_s=hint_spread_s,
            on_outcome=self._outcome,
            on_problem=self.problems.append,
        )

    async def _settings(self) -> SyncSettings:
        self.at.append(asyncio.get_running_loop().time())
        raise self.error()

    async def _outcome(self, outcome: SyncOutcome) -> None:
        raise AssertionError(outcome)

    @property
    def pauses(self) -> list[float]:
        """Seconds between the looks."""
        return [later - earlier for earlier, later in itertools.pairwise(self.at)]


@contextlib.asynccontextmanager
async def looking(looks: Looks) -> AsyncIterator[None]:
    task = asyncio.create_task(looks.looker.run())
    try:
        yield
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@virtual_time
async def test_a_repository_that_cannot_be_read_is_looked_at_again_ever_later_up_to_an_hour() -> None:
    looks = Looks(unreachable)
    async with looking(looks):
        await asyncio.sleep(DAY_S)
    assert all(FIRST_RETRY_S <= pause <= MAX_RETRY_S + 1 for pause in looks.pauses)
    assert all(pause <= FIRST_RETRY_S * 2**number + 1 for number, pause in enumerate(looks.pauses[:8], 1))
    assert 24 <= len(looks.at) <= 200
    assert {problem.code for problem in looks.problems} == {"unreachable"}


@virtual_time
async def test_a_repository_that_is_gone_for_years_ends_nothing() -> None:
    looks = Looks(unreachable)
    async with looking(looks):
        await asyncio.sleep(DAY_S * 365)
    assert len(looks.at) > 1100


@virtual_time
async def test_a_box_that_looks_often_also_tries_again_as_often() -> None:
    looks = Looks(unreachable, look_every_s=30.0)
    async with looking(looks):
        await asyncio.sleep(3600)
    assert max(looks.pauses) <= 31


@virtual_time
async def test_b7_a_disk_that_gives_nothing_is_a_problem_and_not_the_end() -> None:
    looks = Looks(lambda: StoreError("io_error", "disk I/O error"))
    async with looking(looks):
        await asyncio.sleep(60)
    assert [problem.code for problem in looks.problems[:1]] == ["io_error"]


@virtual_time
async def test_b19_a_process_that_cannot_be_started_is_a_problem_and_not_the_end() -> None:
    looks = Looks(lambda: BlockingIOError(11, "Resource temporarily unavailable"))
    async with looking(looks):
        await asyncio.sleep(60)
    assert looks.problems[0].code == "internal"
    assert "temporarily unavailable" in looks.problems[0].message


@virtual_time
async def test_a_hint_brings_the_next_look_forward_to_a_moment_of_the_box_s_own() -> None:
    looks = Looks(unreachable, hint_spread_s=10.0)
    async with looking(looks):
        await asyncio.sleep(DAY_S)
        seen = len(looks.at)
        hinted_at = asyncio.get_running_loop().time()
        for _ in range(5):
            looks.looker.hint()
        await asyncio.sleep(10.1)
        (look,) = looks.at[seen:]
        assert 0 <= look - hinted_at <= 10
