"""What a box remembers beside its files: what runs, what failed, and the pools it may hand work to."""

from __future__ import annotations

import sqlite3
from typing import Final

import msgspec

from cloud_sync.database import Database
from cloud_sync.deployment import Pool

MAX_FAILED: Final = 1000


class Current(msgspec.Struct, frozen=True):
    """The version of a model that runs, and the one before it to roll back to (empty: none)."""

    version: str
    digest: str
    previous_version: str = ""
    previous_digest: str = ""


class Failure(msgspec.Struct, frozen=True):
    """Why a digest is not tried again, under which decision of the admins' it failed, and its `name@version`.

    An empty decision or label is not known.
    """

    code: str
    message: str
    decision: str = ""
    label: str = ""


_pools = msgspec.json.Decoder(list[Pool])


class State:
    """Durable facts in `state.db`; each method returns once they are on the disk, and raises StoreError."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def current(self) -> dict[str, Current]:
        """Return what runs, by model."""

        def read(connection: sqlite3.Connection) -> dict[str, Current]:
            query = "SELECT model, version, digest, previous_version, previous_digest FROM current"
            return {model: Current(*rest) for model, *rest in connection.execute(query)}

        return await self._database.run(read)

    async def set_current(self, model: str, current: Current) -> None:
        """Note what runs now."""
        values = (model, *msgspec.structs.astuple(current))

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT OR REPLACE INTO current VALUES (?, ?, ?, ?, ?)", values)

        await self._database.run(write)

    async def activate(
        self, model: str, current: Current, record: bytes, failed: tuple[str, Failure] | None = None
    ) -> None:
        """Note at once what runs now, what is kept of it, and the digest that it takes the place of if that failed.

        The agent's starts are counted anew from here.
        """
        values = (model, *msgspec.structs.astuple(current))

        def write(connection: sqlite3.Connection) -> None:
            if failed is not None:
                _add_failed(connection, *failed)
            connection.execute("INSERT OR REPLACE INTO current VALUES (?, ?, ?, ?, ?)", values)
            connection.execute("INSERT OR REPLACE INTO fact VALUES (?, ?)", (_record_name(model), record))
            connection.execute("DELETE FROM fact WHERE name = 'starts'")

        await self._database.run(write)

    async def record(self, model: str) -> bytes | None:
        """Return what was kept of the version that runs, or None."""
        return await self._fact(_record_name(model))

    async def keep_record(self, model: str, record: bytes) -> None:
        """Keep what is known of the version that runs."""

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT OR REPLACE INTO fact VALUES (?, ?)", (_record_name(model), record))

        await self._database.run(write)

    async def count_start(self) -> int:
        """Count a start of the agent; return how many there were since one last ended or ran well."""

        def write(connection: sqlite3.Connection) -> int:
            add = "INSERT INTO fact VALUES ('starts', '1') ON CONFLICT (name) DO UPDATE SET value = value + 1"
            connection.execute(add)
            (starts,) = connection.execute("SELECT value FROM fact WHERE name = 'starts'").fetchone()
            return int(starts)

        return await self._database.run(write)

    async def clear_starts(self) -> None:
        """Note that the agent ran or ended well."""

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM fact WHERE name = 'starts'")

        await self._database.run(write)

    async def drop_current(self, model: str) -> None:
        """Note that a model does not run here any more."""

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM current WHERE model = ?", (model,))
            connection.execute("DELETE FROM fact WHERE name = ?", (_record_name(model),))

        await self._database.run(write)

    async def failed(self) -> dict[str, Failure]:
        """Return the digests that are not tried again, and why."""

        def read(connection: sqlite3.Connection) -> dict[str, Failure]:
            query = "SELECT digest, code, message, decision, label FROM failed ORDER BY number"
            return {digest: Failure(*rest) for digest, *rest in connection.execute(query)}

        return await self._database.run(read)

    async def mark_failed(self, digest: str, failure: Failure) -> None:
        """Note that a digest failed here under a decision of the admins', so that it is not tried again under that."""
        await self._database.run(lambda connection: _add_failed(connection, digest, failure))

    async def clear_failed(self, digest: str) -> None:
        """Let a digest be tried again."""

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM failed WHERE digest = ?", (digest,))

        await self._database.run(write)

    async def pools(self) -> list[Pool]:
        """Return the pools of the last trusted deployment; none where there was none yet."""
        raw = await self._fact("pools")
        return [] if raw is None else _pools.decode(raw)

    async def set_pools(self, pools: list[Pool]) -> None:
        """Note the pools of a trusted deployment."""
        value = msgspec.json.encode(pools)

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT OR REPLACE INTO fact VALUES ('pools', ?)", (value,))

        await self._database.run(write)

    async def _fact(self, name: str) -> bytes | None:
        def read(connection: sqlite3.Connection) -> bytes | None:
            found = connection.execute("SELECT value FROM fact WHERE name = ?", (name,)).fetchone()
            return None if found is None else bytes(found[0])

        return await self._database.run(read)


def _add_failed(connection: sqlite3.Connection, digest: str, failure: Failure) -> None:
    add = "INSERT OR REPLACE INTO failed (digest, code, message, decision, label) VALUES (?, ?, ?, ?, ?)"
    connection.execute(add, (digest, *msgspec.structs.astuple(failure)))
    oldest = "DELETE FROM failed WHERE number <= (SELECT max(number) FROM failed) - ?"
    connection.execute(oldest, (MAX_FAILED,))


def _record_name(model: str) -> str:
    return f"model/{model}"
