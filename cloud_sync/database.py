"""`state.db`: SQLite in one thread of its own, where calls that wait together are committed together.

What `run` has returned is on the disk (WAL, `synchronous=FULL`). A corrupt file is set aside and a new one
begun. A reserve on the disk is given up when the disk is full, so that what was accepted can still be finished.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from cloud_sync.errors import StoreError

T = TypeVar("T")

MAX_WAITING: Final = 10_000
MAX_BATCH: Final = 256
MAX_SET_ASIDE: Final = 3
CHECKPOINT_PAGES: Final = 256
"""How far the journal grows (1 MiB) before it is copied into the file."""
RESERVE_BYTES: Final = 2 << 20
"""Room for that copy on a full disk, and for the journal beside it."""

MIGRATIONS: Final = (
    """
    CREATE TABLE current (
        model TEXT PRIMARY KEY, version TEXT NOT NULL, digest TEXT NOT NULL,
        previous_version TEXT NOT NULL, previous_digest TEXT NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE failed (
        number INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE, code TEXT NOT NULL, message TEXT NOT NULL
    );
    CREATE TABLE fact (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
    CREATE TABLE outbox (
        number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, key BLOB NOT NULL, head BLOB NOT NULL,
        body BLOB NOT NULL, answer BLOB, bytes INTEGER NOT NULL
    );
    CREATE UNIQUE INDEX outbox_key ON outbox (key) WHERE key != x'';
    CREATE TABLE answer (number INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, body BLOB NOT NULL);
    CREATE TABLE size (name TEXT PRIMARY KEY, rows INTEGER NOT NULL, bytes INTEGER NOT NULL) WITHOUT ROWID;
    INSERT INTO size VALUES ('outbox', 0, 0), ('answer', 0, 0);
    CREATE TRIGGER outbox_in AFTER INSERT ON outbox BEGIN
        UPDATE size SET rows = rows + 1, bytes = bytes + NEW.bytes WHERE name = 'outbox'; END;
    CREATE TRIGGER outbox_out AFTER DELETE ON outbox BEGIN
        UPDATE size SET rows = rows - 1, bytes = bytes - OLD.bytes WHERE name = 'outbox'; END;
    CREATE TRIGGER outbox_change AFTER UPDATE OF bytes ON outbox BEGIN
        UPDATE size SET bytes = bytes + NEW.bytes - OLD.bytes WHERE name = 'outbox'; END;
    CREATE TRIGGER answer_in AFTER INSERT ON answer BEGIN
        UPDATE size SET rows = rows + 1, bytes = bytes + length(NEW.body) WHERE name = 'answer'; END;
    CREATE TRIGGER answer_out AFTER DELETE ON answer BEGIN
        UPDATE size SET rows = rows - 1, bytes = bytes - length(OLD.body) WHERE name = 'answer'; END;
    """,
    """
    ALTER TABLE failed ADD COLUMN decision TEXT NOT NULL DEFAULT '';
    ALTER TABLE failed ADD COLUMN label TEXT NOT NULL DEFAULT '';
    """,
)
"""One script for each version of the schema; additive, so that the version before can read what this one writes."""


class _Call:
    """One function that waits for the thread, and what became of it."""

    def __init__(self, function: Callable[[sqlite3.Connection], Any], done: asyncio.Future[Any]) -> None:
        self.function = function
        self.done = done
        self.result: Any = None
        self.error: Exception | None = None

    def settle(self) -> None:
        """Tell the caller, in the loop's thread."""
        if self.done.done():
            return
        if self.error is None:
            self.done.set_result(self.result)
        else:
            self.done.set_exception(self.error)


class Database:
    """The open file. `set_aside` names the corrupt file that was found in its place, or is empty."""

    def __init__(self, path: Path, *, reserve_bytes: int = RESERVE_BYTES) -> None:
        self.path = path
        self.set_aside = ""
        self.short_of_space = False
        """Whether the disk was full and the reserve is not back yet: take nothing new."""
        self._reserve = path.with_name(path.name + ".reserve")
        self._reserve_bytes = reserve_bytes
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._waiting = 0
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name=path.name, daemon=True)
        self._ready: asyncio.Future[None] = self._loop.create_future()

    @classmethod
    async def open(cls, path: Path, *, reserve_bytes: int = RESERVE_BYTES) -> Self:
        """Open or create the file and bring its schema forward; raises StoreError."""
        database = cls(path, reserve_bytes=reserve_bytes)
        database._thread.start()
        await database._ready
        return database

    async def run(self, function: Callable[[sqlite3.Connection], T]) -> T:
        """Call `function` in the thread, inside a transaction; its result is returned once that is on the disk.

        Raises what `function` raises (its changes are undone), or StoreError. Runs to its end even where the
        caller is cancelled; may be called again where the disk fails, so it must do nothing but use the connection.
        """
        if self._waiting >= MAX_WAITING:
            raise StoreError("busy", f"{self._waiting} calls wait for {self.path.name} already")
        if not self._thread.is_alive():
            raise StoreError("closed", f"{self.path.name} is closed")
        call = _Call(function, self._loop.create_future())
        self._waiting += 1
        self._calls.put(call)
        result: T = await call.done
        return result

    async def close(self) -> None:
        """Finish what waits and close the file."""
        self._calls.put(None)
        await asyncio.to_thread(self._thread.join)

    # The rest runs in the thread.

    def _work(self) -> None:
        try:
            connection = self._open()
        except (StoreError, OSError, sqlite3.Error) as error:
            self._tell(self._ready.set_exception, _as_store_error(error))
            return
        self._tell(self._ready.set_result, None)
        with contextlib.closing(connection):
            open_still = True
            while open_still:
                batch, open_still = self._take()
                if batch:
                    self._run(connection, batch)
                    self._tell(self._settle, batch)

    def _take(self) -> tuple[list[_Call], bool]:
        """Wait for a call and take those that wait with it; False once the file is to be closed."""
        batch: list[_Call] = []
        call = self._calls.get()
        while call is not None:
            batch.append(call)
            if len(batch) == MAX_BATCH or self._calls.empty():
                return batch, True
            call = self._calls.get()
        return batch, False

    def _run(self, connection: sqlite3.Connection, batch: list[_Call]) -> None:
        if self.short_of_space:
            self._make_reserve()
        try:
            _transact(connection, batch)
        except sqlite3.Error as error:
            if _primary_code(error) == sqlite3.SQLITE_FULL and not self.short_of_space:
                self._give_up_reserve(connection)
            for call in batch:  # each alone, so that one that cannot be kept takes no other with it
                _run_alone(connection, call, error)

    def _settle(self, batch: list[_Call]) -> None:
        self._waiting -= len(batch)
        for call in batch:
            call.settle()

    def _tell(self, function: Callable[..., None], argument: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody waits any more
            self._loop.call_soon_threadsafe(function, argument)

    def _open(self) -> sqlite3.Connection:
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        _sync_folder(self.path.parent)
        try:
            connection = _connect(self.path)
        except sqlite3.DatabaseError as error:
            if _primary_code(error) not in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}:
                raise
            self.set_aside = _set_aside(self.path)
            connection = _connect(self.path)
        self._make_reserve()
        return connection

    def _make_reserve(self) -> None:
        try:
            reserve = os.open(self._reserve, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            self.short_of_space = True
            return
        try:
            os.posix_fallocate(reserve, 0, self._reserve_bytes)
            self.short_of_space = False
        except OSError:
            self.short_of_space = True
            self._reserve.unlink(missing_ok=True)
        finally:
            os.close(reserve)

    def _give_up_reserve(self, connection: sqlite3.Connection) -> None:
        """Make room for what deletes rows: without the reserve the journal can be emptied."""
        self.short_of_space = True
        with contextlib.suppress(OSError, sqlite3.Error):  # where even this fails, the calls fail on their own
            self._reserve.unlink(missing_ok=True)
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def _transact(connection: sqlite3.Connection, batch: list[_Call]) -> None:
    """Run the calls in one transaction; one that raises is undone alone. Raises sqlite3.Error if none is kept."""
    try:
        connection.execute("BEGIN")
        for call in batch:
            connection.execute("SAVEPOINT call")
            call.error = None
            try:
                call.result = call.function(connection)
            except sqlite3.IntegrityError as error:
                call.error = _as_store_error(error)
            except sqlite3.Error:
                raise
            except Exception as error:  # noqa: BLE001 - handed to the caller, who alone knows what it means
                call.error = error
            if call.error is not None:
                connection.execute("ROLLBACK TO call")
            connection.execute("RELEASE call")
        connection.execute("COMMIT")
    except sqlite3.Error:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _run_alone(connection: sqlite3.Connection, call: _Call, earlier: sqlite3.Error) -> None:
    """Try a call of a failed batch again, unless the disk itself failed: a second fsync would only seem to work."""
    if _primary_code(earlier) == sqlite3.SQLITE_IOERR:
        call.error = _as_store_error(earlier)
        return
    try:
        _transact(connection, [call])
    except sqlite3.Error as error:
        call.error = _as_store_error(error)


def _connect(path: Path) -> sqlite3.Connection:
    """Open, check and migrate; a damaged file raises sqlite3.DatabaseError with SQLITE_CORRUPT or SQLITE_NOTADB."""
    connection = sqlite3.connect(path, isolation_level=None, timeout=5.0)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        connection.execute("PRAGMA journal_size_limit = 1048576")
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            damaged = sqlite3.DatabaseError(verdict)
            damaged.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
            raise damaged
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        for number, script in enumerate(MIGRATIONS[version:], version + 1):
            connection.executescript(f"BEGIN; {script} PRAGMA user_version = {number}; COMMIT;")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _set_aside(path: Path) -> str:
    """Move a damaged file and its journal out of the way, keeping at most three; return its new name."""
    names = [path.with_name(f"{path.name}.corrupt-{n}") for n in range(1, MAX_SET_ASIDE + 1)]
    target = next((name for name in names if not name.exists()), names[-1])
    path.replace(target)
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    _sync_folder(path.parent)
    return target.name


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _as_store_error(error: Exception) -> StoreError:
    """Name what is wrong with the disk or the call."""
    if isinstance(error, StoreError):
        return error
    codes = {
        sqlite3.SQLITE_FULL: "no_space",
        sqlite3.SQLITE_READONLY: "read_only",
        sqlite3.SQLITE_IOERR: "io_error",
        sqlite3.SQLITE_CORRUPT: "corrupt",
        sqlite3.SQLITE_NOTADB: "corrupt",
        sqlite3.SQLITE_CANTOPEN: "io_error",
        sqlite3.SQLITE_CONSTRAINT: "conflict",
    }
    return StoreError(codes.get(_primary_code(error), "io_error"), str(error))


def _primary_code(error: Exception) -> int:
    """Return SQLite's result code without its extension; 0 where the error is not SQLite's own."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF
