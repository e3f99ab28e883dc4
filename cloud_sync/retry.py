"""Trying again: full jitter, doubled each time, and a bound."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

import msgspec

from cloud_sync.errors import FetchError

T = TypeVar("T")


class Retry(msgspec.Struct, frozen=True, kw_only=True):
    """How often and how patiently: full jitter between 0 and `base_s` doubled each time, up to `cap_s`."""

    attempts: int = 6
    base_s: float = 0.5
    cap_s: float = 30.0
    sleep: Callable[[float], object] = time.sleep
    random: Callable[[], float] = random.random

    def pause(self, failures: int) -> None:
        """Wait after the n-th failure in a row."""
        self.sleep(self.random() * min(self.cap_s, self.base_s * 2 ** min(failures - 1, 16)))

    def run(self, work: Callable[[], T]) -> T:
        """Return what `work` returns, tried again while its FetchError may pass."""
        failures = 0
        while True:
            try:
                return work()
            except FetchError as error:
                failures += 1
                if not error.retryable or failures >= self.attempts:
                    raise
                self.pause(failures)
