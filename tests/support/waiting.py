"""Waiting for something outside this process to become true."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

STEP_S = 0.01


def until(what: Callable[[], T], timeout_s: float = 20.0, *, told: Callable[[], str] = str) -> T:
    """Return what `what` returns once that is true; after `timeout_s` fail with what `told` says."""
    ends_at = time.monotonic() + timeout_s
    while not (value := what()):
        if time.monotonic() >= ends_at:
            raise TimeoutError(f"not within {timeout_s} s {told()}")
        time.sleep(STEP_S)
    return value
