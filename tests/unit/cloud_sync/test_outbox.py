"""Where accepted requests wait durably."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from cloud_sync.database import Database
from cloud_sync.errors import HandoffError
from cloud_sync.outbox import Answer, Outbox, Row
from models.request import Dialect, Status

ROW = Row(
    id="00112233445566778899aabbccddeeff",
    place="local",
    model="digits",
    client="cam",
    content_type="application/json",
    dialect=Dialect.HUGGINGFACE,
    body=b'{"inputs": [1]}',
    reply_topic="spillway/pi-7/reply/cam/digits",
    correlation=b"\x00\xff",
    key=b"k",
    stored_at_ms=1_000,
    deadline_at_ms=31_000,
    reason="overflow",
    priority=7,
)
ANSWER = Answer(status=Status.OK, body=b'{"outputs": [2]}', route="cloud", reason="overflow", model="digits@1")


def row(number: int, **changes: object) -> Row:
    return msgspec.structs.replace(ROW, **({"id": f"{number:032x}", "key": b"k%d" % number} | changes))


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = await Database.open(tmp_path / "state.db")
    yield database
    await database.close()


@pytest.fixture
def outbox(database: Database) -> Outbox:
    return Outbox(database)


async def test_b1_a_stored_row_is_there_whole_after_a_restart(tmp_path: Path, outbox: Outbox) -> None:
    assert await outbox.put(ROW) == ROW.id
    again = await Database.open(tmp_path / "state.db")
    assert await Outbox(again).rows() == [ROW]
    assert await Outbox(again).row(ROW.id) == ROW
    await again.close()


async def test_rows_come_in_the_order_of_arrival_and_without_bodies_where_asked(outbox: Outbox) -> None:
    for number in (5, 1, 3):
        await outbox.put(row(number))
    assert [r.id for r in await outbox.rows()] == [row(n).id for n in (5, 1, 3)]
    assert {r.body for r in await outbox.rows(bodies=False)} == {b""}
    assert not any(r.damaged for r in await outbox.rows(bodies=False))


async def test_asking_again_with_the_same_key_joins_the_row_that_waits(outbox: Outbox) -> None:
    await outbox.put(ROW)
    assert await outbox.put(row(2, key=ROW.key)) == ROW.id
    assert len(await outbox.rows()) == 1


async def test_without_a_key_every_request_is_new(outbox: Outbox) -> None:
    await outbox.put(row(1, key=b""))
    await outbox.put(row(2, key=b""))
    assert len(await outbox.rows()) == 2


async def test_a_moved_row_waits_elsewhere(outbox: Outbox) -> None:
    await outbox.put(ROW)
    assert await outbox.move(ROW.id, "cloud", "default", "oversized")
    moved = await outbox.row(ROW.id)
    assert moved == msgspec.structs.replace(ROW, place="cloud", pool="default", reason="oversized")
    assert not await outbox.move("0" * 32, "cloud", "default", "oversized")


async def test_d2_only_the_first_final_answer_is_kept(outbox: Outbox) -> None:
    await outbox.put(ROW)
    late = msgspec.structs.replace(ANSWER, body=b"late")
    assert await outbox.settle(ROW.id, ANSWER)
    assert not await outbox.settle(ROW.id, late)
    (settled,) = await outbox.rows()
    assert settled == msgspec.structs.replace(ROW, body=b"", answer=ANSWER)
    assert await outbox.finish(ROW.id, late)
    assert await outbox.answer(ROW.key) == ANSWER
    assert not await outbox.finish(ROW.id)
    assert not await outbox.settle(ROW.id, late)


async def test_a_finished_row_is_gone_and_its_answer_remembered(outbox: Outbox) -> None:
    await outbox.put(ROW)
    assert await outbox.finish(ROW.id, ANSWER)
    assert await outbox.rows() == []
    assert await outbox.row(ROW.id) is None
    assert await outbox.answer(ROW.key) == ANSWER
    assert await outbox.answer(b"other") is None


async def test_the_answer_to_a_request_without_a_key_is_not_kept(outbox: Outbox) -> None:
    await outbox.put(row(1, key=b""))
    await outbox.finish(row(1).id, ANSWER)
    assert await outbox.answer(b"") is None


async def test_d1_the_outbox_is_bounded_by_rows(database: Database) -> None:
    outbox = Outbox(database, max_rows=2)
    await outbox.put(row(1))
    await outbox.put(row(2))
    with pytest.raises(HandoffError) as caught:
        await outbox.put(row(3))
    assert caught.value.code == "outbox_full"
    await outbox.finish(row(1).id)
    await outbox.put(row(3))


async def test_d1_the_outbox_is_bounded_by_bytes(database: Database) -> None:
    outbox = Outbox(database, max_bytes=5000)
    await outbox.put(row(1, body=bytes(4000)))
    with pytest.raises(HandoffError) as caught:
        await outbox.put(row(2, body=bytes(1000)))
    assert caught.value.code == "outbox_full"
    await outbox.settle(row(1).id, ANSWER)
    await outbox.put(row(2, body=bytes(1000)))


async def test_the_size_is_exact_after_everything_that_can_happen(outbox: Outbox) -> None:
    for number in range(20):
        await outbox.put(row(number, body=bytes(number)))
    for number in range(0, 20, 2):
        await outbox.settle(row(number).id, ANSWER)
    for number in range(0, 20, 3):
        await outbox.move(row(number).id, "cloud", "default", "oversized")
        await outbox.finish(row(number).id)
    assert (await outbox.size())[0] == len(await outbox.rows())
    for waiting in await outbox.rows():
        await outbox.finish(waiting.id)
    assert await outbox.size() == (0, 0)


async def test_recent_answers_are_bounded_by_count_and_bytes(database: Database) -> None:
    few = Outbox(database, max_answers=3)
    for number in range(5):
        await few.remember(b"%d" % number, ANSWER)
    assert [await few.answer(b"%d" % n) is not None for n in range(5)] == [False, False, True, True, True]
    small = Outbox(database, max_answer_bytes=1000)
    await small.remember(b"big", msgspec.structs.replace(ANSWER, body=bytes(800)))
    assert await small.answer(b"4") is None
    await small.remember(b"huge", msgspec.structs.replace(ANSWER, body=bytes(2000)))
    assert await small.answer(b"huge") is None
    assert await small.answer(b"big") is not None


async def test_an_answer_given_again_replaces_the_one_before(outbox: Outbox) -> None:
    await outbox.remember(b"k", ANSWER)
    again = msgspec.structs.replace(ANSWER, body=b"again")
    await outbox.remember(b"k", again)
    assert await outbox.answer(b"k") == again


async def test_b2_a_body_that_the_disk_damaged_is_told_and_a_head_dropped(database: Database, outbox: Outbox) -> None:
    await outbox.put(row(1))
    await outbox.put(row(2))
    await outbox.put(row(3))
    await database.run(lambda c: c.execute("UPDATE outbox SET body = x'0000000041' WHERE number = 1"))
    await database.run(lambda c: c.execute("UPDATE outbox SET head = x'0000000041' WHERE number = 2"))
    damaged, whole = await outbox.rows()
    assert (damaged.id, damaged.damaged, damaged.body) == (row(1).id, True, b"")
    assert whole == row(3)
    assert (await outbox.size())[0] == 2


async def test_b7_nothing_new_is_taken_while_the_disk_is_full_but_what_waits_is_finished(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "full.db")
    outbox = Outbox(database)
    await outbox.put(ROW)
    database.short_of_space = True
    with pytest.raises(HandoffError) as caught:
        await outbox.put(row(2))
    assert caught.value.code == "outbox_full"
    assert await outbox.finish(ROW.id, ANSWER)
    await database.close()


async def test_many_requests_at_once_are_all_kept(outbox: Outbox) -> None:
    await asyncio.gather(*(outbox.put(row(n)) for n in range(300)))
    assert len(await outbox.rows()) == 300


@pytest.mark.parametrize("junk", ["x'c1'", "x''", "x'80'", "x'81a6737461747573a2ff'"])
async def test_b2_an_answer_that_the_disk_damaged_is_deleted_and_the_others_are_read(
    database: Database, outbox: Outbox, junk: str
) -> None:
    for key in (b"1", b"2", b"3"):
        await outbox.remember(key, ANSWER)
    await database.run(lambda c: c.execute(f"UPDATE answer SET body = {junk} WHERE number < 3"))
    assert await outbox.answer(b"1") is None
    assert await outbox.answers() == [(b"3", ANSWER)]
    assert await database.run(lambda c: c.execute("SELECT count(*) FROM answer").fetchone()) == (1,)


async def test_b2_a_row_whose_head_decodes_to_no_row_is_dropped(database: Database, outbox: Outbox) -> None:
    await outbox.put(row(1))
    await outbox.put(row(2))
    junk = b"\xc1"
    damaged = zlib.crc32(junk).to_bytes(4, "big") + junk
    await database.run(lambda c: c.execute("UPDATE outbox SET head = ? WHERE number = 1", (damaged,)))
    assert await outbox.row(row(1).id) is None
    assert await outbox.rows() == [row(2)]


async def test_b2_a_row_that_lost_its_settled_answer_is_damaged_and_can_be_settled_again(
    database: Database, outbox: Outbox
) -> None:
    await outbox.put(ROW)
    await outbox.settle(ROW.id, ANSWER)
    await database.run(lambda c: c.execute("UPDATE outbox SET answer = x'c1'"))
    for _ in range(2):
        (damaged,) = await outbox.rows()
        assert (damaged.id, damaged.damaged, damaged.body, damaged.answer) == (ROW.id, True, b"", None)
    assert await outbox.settle(ROW.id, ANSWER)
    assert (await outbox.rows())[0].answer == ANSWER
