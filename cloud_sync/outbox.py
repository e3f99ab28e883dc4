"""Where accepted requests wait durably, and the answers that were given last.

A row stays until its asker has the answer: `put` before the request is acknowledged, `settle` with the one final
answer before it is published, `finish` once the publish is acknowledged. What a power cut leaves is in `rows`.
"""

from __future__ import annotations

import logging
import sqlite3
import zlib

import msgspec

from cloud_sync.database import Database
from cloud_sync.errors import HandoffError
from models.request import Dialect, Response

log = logging.getLogger(__name__)

Answer = Response
"""The final reply to a request, as it is published."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """An accepted request. Wall-clock times are milliseconds since 1970; `key` is empty where asking again is new.

    `place` is `local` or `cloud`; `enveloped` askers speak MQTT 3.1.1, and
    `envelope_id` is their id. `answer` is set once
    settled, and then the body is gone. `damaged` rows lost their body on the disk: only an error can answer them.
    """

    id: str
    place: str
    model: str
    client: str
    content_type: str
    dialect: Dialect
    reply_topic: str
    stored_at_ms: int
    deadline_at_ms: int
    pool: str = ""
    body: bytes = b""
    stream: bool = False
    local_only: bool = False
    provisional: bool = False
    priority: int = 5
    correlation: bytes | None = None
    qos: int = 1
    envelope_id: str | None = None
    enveloped: bool = False
    key: bytes = b""
    reason: str = ""
    answer: Answer | None = None
    damaged: bool = False


_NO_BODY = bytes(4)
_WITH_BODIES = "SELECT number, head, body, answer FROM outbox ORDER BY number"
_WITHOUT_BODIES = "SELECT number, head, x'00000000', answer FROM outbox ORDER BY number"
_encode = msgspec.msgpack.Encoder().encode
_row = msgspec.msgpack.Decoder(Row)
_answer = msgspec.msgpack.Decoder(Answer)
_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError)


class Outbox:
    """Rows and recent answers in `state.db`, each bounded by count and bytes."""

    def __init__(
        self,
        database: Database,
        max_rows: int = 100_000,
        max_bytes: int = 256 << 20,
        *,
        max_answers: int = 1000,
        max_answer_bytes: int = 16 << 20,
    ) -> None:
        self._database = database
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._max_answers = max_answers
        self._max_answer_bytes = max_answer_bytes

    async def put(self, row: Row) -> str:
        """Store a request durably; return its id, or that of the row that holds the same key already.

        Raises HandoffError `outbox_full` at the bounds or on a full disk, StoreError where the disk fails.
        """
        if self._database.short_of_space:
            raise HandoffError("outbox_full", "the disk is full")
        head = _checked(_encode(msgspec.structs.replace(row, body=b"", answer=None)))
        body = _checked(row.body)

        def insert(connection: sqlite3.Connection) -> str:
            held = row.key and connection.execute("SELECT id FROM outbox WHERE key = ?", (row.key,)).fetchone()
            if held:
                return str(held[0])
            rows, size = connection.execute("SELECT rows, bytes FROM size WHERE name = 'outbox'").fetchone()
            weight = len(head) + len(body)
            if rows >= self._max_rows or size + weight > self._max_bytes:
                raise HandoffError("outbox_full", f"{rows} requests of {size} bytes wait already")
            connection.execute(
                "INSERT INTO outbox (id, key, head, body, bytes) VALUES (?, ?, ?, ?, ?)",
                (row.id, row.key, head, body, weight),
            )
            return row.id

        return await self._database.run(insert)

    async def move(self, row_id: str, place: str, pool: str, reason: str) -> bool:
        """Note durably that a request now waits elsewhere; False where the row is gone."""

        def update(connection: sqlite3.Connection) -> bool:
            found = connection.execute("SELECT head FROM outbox WHERE id = ?", (row_id,)).fetchone()
            row = None if found is None else _whole(found[0], _NO_BODY, None)
            if row is None:
                return False
            head = _checked(_encode(msgspec.structs.replace(row, place=place, pool=pool, reason=reason)))
            connection.execute("UPDATE outbox SET head = ? WHERE id = ?", (head, row_id))
            return True

        return await self._database.run(update)

    async def settle(self, row_id: str, answer: Answer) -> bool:
        """Fix the one final answer before it is published; False where there is one already, or no row."""
        body = _encode(answer)

        def update(connection: sqlite3.Connection) -> bool:
            changed = connection.execute(
                "UPDATE outbox SET answer = ?1, body = x'00000000', bytes = length(head) + length(?1)"
                " WHERE id = ?2 AND answer IS NULL",
                (body, row_id),
            )
            return changed.rowcount == 1

        return await self._database.run(update)

    async def finish(self, row_id: str, answer: Answer | None = None) -> bool:
        """Delete a row whose asker has its answer and remember that answer; False where the row is gone."""

        def delete(connection: sqlite3.Connection) -> bool:
            found = connection.execute("SELECT key, answer FROM outbox WHERE id = ?", (row_id,)).fetchone()
            if found is None:
                return False
            connection.execute("DELETE FROM outbox WHERE id = ?", (row_id,))
            key, settled = found
            body = settled if settled is not None else _encode(answer) if answer is not None else None
            if key and body is not None:
                self._remember(connection, key, body)
            return True

        return await self._database.run(delete)

    async def rows(self, *, bodies: bool = True) -> list[Row]:
        """Return every row in the order of arrival; without bodies where only the heads are needed.

        A row whose head the disk lost cannot be answered: it is deleted and logged. One whose answer it lost is a
        damaged row, without answer.
        """
        query = _WITH_BODIES if bodies else _WITHOUT_BODIES

        def read(connection: sqlite3.Connection) -> list[Row]:
            found = {number: _whole(*columns) for number, *columns in connection.execute(query)}
            lost = [(number,) for number, row in found.items() if row is None]
            if lost:
                log.error("%d requests in the outbox are damaged beyond reading; deleted", len(lost))
                connection.executemany("DELETE FROM outbox WHERE number = ?", lost)
            damaged = [(number,) for number, row in found.items() if row is not None and row.damaged]
            connection.executemany("UPDATE outbox SET answer = NULL, body = x'' WHERE number = ?", damaged)
            return [row for row in found.values() if row is not None]

        return await self._database.run(read)

    async def row(self, row_id: str) -> Row | None:
        """Return one row with its body; None where it is gone."""

        def read(connection: sqlite3.Connection) -> Row | None:
            found = connection.execute("SELECT head, body, answer FROM outbox WHERE id = ?", (row_id,)).fetchone()
            return None if found is None else _whole(*found)

        return await self._database.run(read)

    async def size(self) -> tuple[int, int]:
        """Return how many rows wait, and their bytes."""

        def read(connection: sqlite3.Connection) -> tuple[int, int]:
            rows, size = connection.execute("SELECT rows, bytes FROM size WHERE name = 'outbox'").fetchone()
            return rows, size

        return await self._database.run(read)

    async def remember(self, key: bytes, answer: Answer) -> None:
        """Keep an answer for an asker that asks again with this key; the oldest make room."""
        body = _encode(answer)
        await self._database.run(lambda connection: self._remember(connection, key, body))

    async def answer(self, key: bytes) -> Answer | None:
        """Return the answer that was given last for this key; one that the disk damaged is deleted."""

        def read(connection: sqlite3.Connection) -> Answer | None:
            found = connection.execute("SELECT number, body FROM answer WHERE key = ?", (key,)).fetchone()
            return None if found is None else self._readable(connection, *found)

        return await self._database.run(read)

    async def answers(self) -> list[tuple[bytes, Answer]]:
        """Return the answers that are still kept and their keys, the oldest first; damaged ones are deleted."""

        def read(connection: sqlite3.Connection) -> list[tuple[bytes, Answer]]:
            kept = connection.execute("SELECT key, number, body FROM answer ORDER BY number").fetchall()
            read_back = [(key, self._readable(connection, number, body)) for key, number, body in kept]
            return [(key, answer) for key, answer in read_back if answer is not None]

        return await self._database.run(read)

    def _readable(self, connection: sqlite3.Connection, number: int, body: bytes) -> Answer | None:
        answer = _decoded(body)
        if answer is None:
            log.error("an answer that was kept is damaged beyond reading; deleted")
            connection.execute("DELETE FROM answer WHERE number = ?", (number,))
        return answer

    def _remember(self, connection: sqlite3.Connection, key: bytes, body: bytes) -> None:
        if len(body) > self._max_answer_bytes:
            return
        connection.execute("DELETE FROM answer WHERE key = ?", (key,))
        connection.execute("INSERT INTO answer (key, body) VALUES (?, ?)", (key, body))
        while True:
            rows, size = connection.execute("SELECT rows, bytes FROM size WHERE name = 'answer'").fetchone()
            if rows <= self._max_answers and size <= self._max_answer_bytes:
                return
            connection.execute("DELETE FROM answer WHERE number = (SELECT min(number) FROM answer)")


def _checked(data: bytes) -> bytes:
    """Return the bytes behind their CRC-32 (big-endian): SQLite checks its journal's pages, but not the file's."""
    return zlib.crc32(data).to_bytes(4, "big") + data


def _unchecked(data: bytes) -> bytes | None:
    """Return the bytes without their checksum; None where it does not fit."""
    return data[4:] if zlib.crc32(data[4:]).to_bytes(4, "big") == data[:4] else None


def _decoded(body: bytes) -> Answer | None:
    try:
        return _answer.decode(body)
    except _UNREADABLE:
        return None


def _whole(head: bytes, body: bytes, answer: bytes | None) -> Row | None:
    """Put a row together; None where its head cannot be read. A row is damaged without readable body or answer."""
    intact = _unchecked(head)
    if intact is None:
        return None
    try:
        row = _row.decode(intact)
    except _UNREADABLE:
        return None
    content = _unchecked(body)
    given = None if answer is None else _decoded(answer)
    lost = content is None or answer is not None  # the body left when the answer came
    return msgspec.structs.replace(row, body=content or b"", answer=given, damaged=lost and given is None)
