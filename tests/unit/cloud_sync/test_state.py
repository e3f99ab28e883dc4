"""What a box remembers beside its files."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cloud_sync.database import Database
from cloud_sync.deployment import Pool, PoolKey
from cloud_sync.state import MAX_FAILED, Current, Failure, State


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = await Database.open(tmp_path / "state.db")
    yield database
    await database.close()


async def test_a_new_box_remembers_nothing(database: Database) -> None:
    state = State(database)
    assert (await state.current(), await state.failed(), await state.pools()) == ({}, {}, [])


async def test_what_runs_is_remembered_across_a_restart(tmp_path: Path, database: Database) -> None:
    await State(database).set_current("digits", Current("1", "aa"))
    await State(database).set_current("digits", Current("2", "bb", "1", "aa"))
    await State(database).set_current("sea", Current("1", "cc"))
    await State(database).drop_current("sea")
    await State(database).drop_current("sea")
    again = await Database.open(tmp_path / "state.db")
    assert await State(again).current() == {"digits": Current("2", "bb", "1", "aa")}
    await again.close()


async def test_a25_a_failed_digest_is_remembered_until_an_admin_says_otherwise(database: Database) -> None:
    state = State(database)
    await state.mark_failed("aa", Failure("golden", "differs"))
    await state.mark_failed("aa", Failure("crash_loop", "ended 3 times", "salt", "digits@2"))
    assert await state.failed() == {"aa": Failure("crash_loop", "ended 3 times", "salt", "digits@2")}
    await state.clear_failed("aa")
    assert await state.failed() == {}


async def test_a19_the_way_back_and_what_failed_are_noted_together(database: Database) -> None:
    state = State(database)
    await state.activate("digits", Current("2", "bb", "1", "aa"), b"record of 2")
    assert (await state.count_start(), await state.count_start()) == (1, 2)
    await state.activate("digits", Current("1", "aa"), b"record of 1", ("bb", Failure("rolled_back", "errors")))
    assert await state.current() == {"digits": Current("1", "aa")}
    assert await state.failed() == {"bb": Failure("rolled_back", "errors")}
    assert await state.record("digits") == b"record of 1"
    assert await state.count_start() == 1
    await state.clear_starts()
    assert await state.count_start() == 1
    await state.drop_current("digits")
    assert await state.record("digits") is None


async def test_failures_are_bounded_and_the_oldest_forgotten(database: Database) -> None:
    state = State(database)
    for number in range(MAX_FAILED + 5):
        await state.mark_failed(f"{number:064x}", Failure("golden", "differs"))
    failed = await state.failed()
    assert len(failed) == MAX_FAILED
    assert f"{0:064x}" not in failed


async def test_pools_are_remembered_whole(database: Database) -> None:
    pools = [Pool("default", "spillway/handoff/default", [PoolKey("k1", "00" * 32, "2027-01-31T00:00:00Z")])]
    await State(database).set_pools(pools)
    assert await State(database).pools() == pools
    await State(database).set_pools([])
    assert await State(database).pools() == []
