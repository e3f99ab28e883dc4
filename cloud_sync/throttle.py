"""The pace at which messages may leave for the strictest public broker. Pure: no I/O, no clock."""

from __future__ import annotations

import math
from typing import Final

MESSAGES_S: Final = 80.0
BYTES_S: Final = 400 * 1024.0
BURST: Final = 40.0
"""Under AWS IoT Core's 100 publishes and 512 KiB a second, so that reports and acknowledgements have room."""


class Throttle:
    """Two buckets, of messages and of bytes, that fill at those rates; a debt is waited out. Times in seconds."""

    def __init__(self, now: float) -> None:
        self._at = now
        self._messages = BURST
        self._bytes = BYTES_S

    def wait_s(self, now: float) -> float:
        """Return the seconds until a message may leave, in whole milliseconds."""
        self._fill(now)
        wait_s = max((1 - self._messages) / MESSAGES_S, -self._bytes / BYTES_S, 0.0)
        return math.ceil(wait_s * 1e3) / 1e3

    def spend(self, now: float, size: int) -> None:
        """Note a message of `size` bytes."""
        self._fill(now)
        self._messages -= 1
        self._bytes -= size

    def _fill(self, now: float) -> None:
        passed, self._at = now - self._at, now
        self._messages = min(BURST, self._messages + passed * MESSAGES_S)
        self._bytes = min(BYTES_S, self._bytes + passed * BYTES_S)
