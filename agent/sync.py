"""Runs the short-lived sync process and reads what it found; decides when to look again."""

from __future__ import annotations

import asyncio
import logging
import random
import sys
from collections.abc import Awaitable, Callable

import msgspec

from cloud_sync.errors import RETRYABLE_FETCH, CloudError, FetchError
from cloud_sync.sync_settings import SyncError, SyncOutcome, SyncProgress, SyncSettings, sync_event

log = logging.getLogger(__name__)

MAX_LINE_BYTES = 4 << 20
FIRST_RETRY_S = 5.0
MAX_RETRY_S = 3600.0
MAX_PASS_S = 6 * 3600.0
WORTH_A_RETRY = RETRYABLE_FETCH | {"no_space", "corrupt"}


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
        on_problem: Callable[[CloudError], None],
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
            problem = await self._look()
            failures = failures + 1 if problem is not None else 0
            if problem is not None:
                self._on_problem(problem)
            await self._pause(self._look_every_s if problem is None else self._retry_s(failures))

    async def _look(self) -> CloudError | None:
        """Make one pass and take its outcome; return what is worth another try soon, if anything is."""
        try:
            async with asyncio.timeout(MAX_PASS_S):
                outcome = await run_sync(await self._settings())
            await self._on_outcome(outcome)
        except CloudError as error:
            return error
        except (OSError, ValueError, msgspec.MsgspecError) as error:  # no process, no time, or words that are none
            return FetchError("internal", f"the sync pass failed: {str(error) or type(error).__name__}")
        open_still = [target.error for target in outcome.models if target.error and target.error.code in WORTH_A_RETRY]
        return FetchError(open_still[0].code, open_still[0].message) if open_still else None

    def _retry_s(self, failures: int) -> float:
        ceiling_s = min(MAX_RETRY_S, self._look_every_s, FIRST_RETRY_S * 2.0 ** min(failures, 20))
        return random.uniform(FIRST_RETRY_S, max(FIRST_RETRY_S, ceiling_s))  # noqa: S311 - jitter

    async def _pause(self, pause_s: float) -> None:
        try:
            async with asyncio.timeout(pause_s):
                await self._hinted.wait()
        except TimeoutError:
            return
        await asyncio.sleep(random.uniform(0, self._hint_spread_s))  # noqa: S311 - spreads a fleet's looks
