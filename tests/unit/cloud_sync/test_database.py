"""The file that keeps what must survive a power cut."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from cloud_sync.database import MIGRATIONS, Database
from cloud_sync.errors import StoreError


def insert(name: str) -> Callable[[sqlite3.Connection], None]:
    def write(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO fact VALUES (?, x'00')", (name,))

    return write


def names(connection: sqlite3.Connection) -> list[str]:
    return [name for (name,) in connection.execute("SELECT name FROM fact ORDER BY name")]


def modes(folder: Path) -> set[int]:
    return {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}


def files(folder: Path, pattern: str) -> int:
    return len(list(folder.glob(pattern)))


def gate(database: Database) -> threading.Event:
    """Hold the thread until the event is set, so that what is asked meanwhile waits together."""
    opened = threading.Event()
    waiting = asyncio.ensure_future(database.run(lambda _connection: opened.wait(10)))
    waiting.add_done_callback(lambda done: done.result())
    return opened


async def test_what_was_returned_is_there_after_opening_again(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "state.db")
    await database.run(insert("a"))
    await database.close()
    database = await Database.open(tmp_path / "state.db")
    assert await database.run(names) == ["a"]
    assert database.set_aside == ""
    await database.close()


async def test_it_syncs_each_commit_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "state.db")
    settings = [
        await database.run(lambda c, name=name: c.execute(f"PRAGMA {name}").fetchone()[0])  # type: ignore[misc]
        for name in ("journal_mode", "synchronous", "user_version")
    ]
    assert settings == ["wal", 2, len(MIGRATIONS)]
    assert modes(tmp_path) == {0o600}
    await database.close()


async def test_calls_that_wait_together_are_committed_together(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "state.db")
    commits = 0

    def watch(connection: sqlite3.Connection) -> None:
        def count(statement: str) -> None:
            nonlocal commits
            commits += statement == "COMMIT"

        connection.set_trace_callback(count)

    await database.run(watch)
    before = commits
    opened = gate(database)
    inserts = asyncio.gather(*(database.run(insert(f"n{n:03}")) for n in range(100)))
    await asyncio.sleep(0)
    opened.set()
    await inserts
    assert commits - before <= 2
    assert len(await database.run(names)) == 100
    await database.close()


async def test_a_call_that_fails_is_undone_alone(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "state.db")

    def half(connection: sqlite3.Connection) -> None:
        insert("half")(connection)
        raise KeyError("half")

    results = await asyncio.gather(
        database.run(insert("a")),
        database.run(half),
        database.run(insert("a")),
        database.run(lambda c: c.execute("SELECT * FROM nowhere")),
        database.run(insert("b")),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [type(None), KeyError, StoreError, StoreError, type(None)]
    assert isinstance(results[2], StoreError)
    assert results[2].code == "conflict"
    assert await database.run(names) == ["a", "b"]
    await database.close()


async def test_a_cancelled_caller_does_not_undo_what_was_asked(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "state.db")
    task = asyncio.create_task(database.run(insert("a")))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await database.run(names) == ["a"]
    await database.close()


async def test_a_closed_database_says_so(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "state.db")
    await database.close()
    with pytest.raises(StoreError) as caught:
        await database.run(names)
    assert caught.value.code == "closed"


@pytest.mark.parametrize("damage", [b"not a database at all, but long enough" * 100, b"SQLite format 3\0"])
async def test_a30_a_corrupt_file_is_set_aside_and_a_new_one_begun(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "state.db"
    path.write_bytes(damage)
    database = await Database.open(path)
    assert database.set_aside == "state.db.corrupt-1"
    assert (tmp_path / "state.db.corrupt-1").read_bytes() == damage
    await database.run(insert("a"))
    await database.close()


async def test_a30_a_file_of_zero_length_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / "state.db").touch()
    database = await Database.open(tmp_path / "state.db")
    assert await database.run(names) == []
    await database.close()


async def test_a30_pages_lost_in_the_middle_are_noticed_at_the_next_start(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    database = await Database.open(path)
    for start in range(0, 2000, 500):
        await asyncio.gather(*(database.run(insert(f"{n:0500}")) for n in range(start, start + 500)))
    await database.close()
    raw = bytearray(path.read_bytes())
    raw[40 * 4096 : 60 * 4096] = bytes(20 * 4096)
    path.write_bytes(raw)
    database = await Database.open(path)
    assert database.set_aside == "state.db.corrupt-1"
    await database.close()


async def test_no_more_than_three_corrupt_files_are_kept(tmp_path: Path) -> None:
    for _ in range(5):
        (tmp_path / "state.db").write_bytes(b"garbage" * 1000)
        database = await Database.open(tmp_path / "state.db")
        await database.close()
    assert files(tmp_path, "state.db.corrupt-*") == 3


async def test_a_folder_that_is_not_there_is_an_error_with_a_code(tmp_path: Path) -> None:
    with pytest.raises(StoreError) as caught:
        await Database.open(tmp_path / "nowhere" / "state.db")
    assert caught.value.code == "io_error"


async def test_b7_a_full_disk_gives_up_the_reserve_and_only_the_call_that_has_no_room_fails(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "state.db", reserve_bytes=4096)
    reserve = tmp_path / "state.db.reserve"
    assert reserve.stat().st_size == 4096
    await database.run(lambda c: c.execute("PRAGMA max_page_count = 1").fetchone())
    opened = gate(database)
    big = database.run(lambda c: c.execute("INSERT INTO fact VALUES ('big', zeroblob(1000000))"))
    both = asyncio.gather(big, database.run(insert("small")), return_exceptions=True)
    await asyncio.sleep(0)
    opened.set()
    results = await both
    assert isinstance(results[0], StoreError)
    assert results[0].code == "no_space"
    assert results[1] is None
    assert (database.short_of_space, reserve.exists()) == (True, False)
    assert await database.run(names) == ["small"]
    assert (database.short_of_space, reserve.exists()) == (False, True)
    await database.close()


async def test_a_schema_of_a_later_release_is_left_as_it_is(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "state.db")
    await database.run(lambda c: c.execute("PRAGMA user_version = 99"))
    await database.close()
    database = await Database.open(tmp_path / "state.db")
    assert await database.run(lambda c: c.execute("PRAGMA user_version").fetchone()[0]) == 99
    assert database.set_aside == ""
    await database.close()
