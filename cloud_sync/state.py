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
    """Why a digest is not tried again."""

    code: str
    message: str


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

    async def drop_current(self, model: str) -> None:
        """Note that a model does not run here any more."""

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM current WHERE model = ?", (model,))

        await self._database.run(write)

    async def failed(self) -> dict[str, Failure]:
        """Return the digests that are not tried again, and why."""

        def read(connection: sqlite3.Connection) -> dict[str, Failure]:
            query = "SELECT digest, code, message FROM failed"
            return {digest: Failure(*rest) for digest, *rest in connection.execute(query)}

        return await self._database.run(read)

    async def mark_failed(self, digest: str, code: str, message: str) -> None:
        """Note that a digest failed here, so that it is not tried again."""

        def write(connection: sqlite3.Connection) -> None:
            values = (digest, code, message)
            connection.execute("INSERT OR REPLACE INTO failed (digest, code, message) VALUES (?, ?, ?)", values)
            oldest = "DELETE FROM failed WHERE number <= (SELECT max(number) FROM failed) - ?"
            connection.execute(oldest, (MAX_FAILED,))

        await self._database.run(write)

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
