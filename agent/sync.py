"""Runs the short-lived sync process and reads what it found; decides when to look again."""

from __future__ import annotations

import asyncio
import logging
import random
import sys
from collections.abc import Awaitable, Callable

import msgspec

from cloud_sync.errors import FetchError
from cloud_sync.sync_settings import SyncError, SyncOutcome, SyncProgress, SyncSettings, sync_event

log = logging.getLogger(__name__)

MAX_LINE_BYTES = 4 << 20
FIRST_RETRY_S = 5.0
MAX_RETRY_S = 3600.0


async def run_sync(settings: SyncSettings) -> SyncOutcome:
    """Make one pass over the repository; raises FetchError where it ended without an outcome."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-I",
        "-m",
        "cloud_sync.sync",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=MAX_LINE_BYTES,
    )
    try:
        return await _converse(process, settings)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _converse(process: asyncio.subprocess.Process, settings: SyncSettings) -> SyncOutcome:
    if process.stdin is None or process.stdout is None:
        raise FetchError("internal", "the sync process has no pipes")
    process.stdin.write(msgspec.json.encode(settings))
    process.stdin.close()
    problem = FetchError("internal", "the sync process ended without a word")
    outcome: SyncOutcome | None = None
    async for line in process.stdout:
        match sync_event.decode(line):
            case SyncOutcome() as event:
                outcome = event
            case SyncError() as event:
                problem = FetchError(event.code, event.message)
            case SyncProgress() as event:
                log.debug("%s@%s: %d of %d bytes", event.model, event.version, event.done_bytes, event.total_bytes)
    await process.wait()
    if outcome is None:
        raise problem
    return outcome


class Looker:
    """Looks at the repository now, after hints, and every `look_every_s`."""

    def __init__(
        self,
        settings: Callable[[], Awaitable[SyncSettings]],
        *,
        look_every_s: float,
        hint_spread_s: float,
        on_outcome: Callable[[SyncOutcome], Awaitable[None]],
        on_problem: Callable[[FetchError], None],
    ) -> None:
        self._settings = settings
        self._look_every_s = look_every_s
        self._hint_spread_s = hint_spread_s
        self._on_outcome = on_outcome
        self._on_problem = on_problem
        self._hinted = asyncio.Event()

    def hint(self) -> None:
        """Somebody says that there is something new: look soon, at a moment of this box's own."""
        self._hinted.set()

    async def run(self) -> None:
        """Look for ever; a root task."""
        failures = 0
        while True:
            self._hinted.clear()
            try:
                outcome = await run_sync(await self._settings())
                await self._on_outcome(outcome)
                failures = 0
                pause_s = self._look_every_s
            except (FetchError, msgspec.DecodeError) as error:
                failures += 1
                problem = error if isinstance(error, FetchError) else FetchError("internal", f"not understood: {error}")
                self._on_problem(problem)
                ceiling_s = min(MAX_RETRY_S, self._look_every_s, FIRST_RETRY_S * 2.0**failures)
                pause_s = random.uniform(FIRST_RETRY_S, max(FIRST_RETRY_S, ceiling_s))  # noqa: S311 - jitter
            await self._pause(pause_s)

    async def _pause(self, pause_s: float) -> None:
        try:
            async with asyncio.timeout(pause_s):
                await self._hinted.wait()
        except TimeoutError:
            return
        await asyncio.sleep(random.uniform(0, self._hint_spread_s))  # noqa: S311 - spreads a fleet's looks
