"""An event loop on jumping time, for code that also works in threads: the clock stands while one of them is busy."""

from __future__ import annotations

import asyncio
import functools
import selectors
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, ParamSpec, TypeVar, TypeVarTuple, Unpack

P = ParamSpec("P")
T = TypeVar("T")
Ts = TypeVarTuple("Ts")

PATIENCE_S = 20.0
LOOK_S = 0.02
"""How often a thread that may have ended without a word is looked at."""


class _Jumping(selectors.DefaultSelector):
    """Waits for threads in real time and for timers in none."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.threads: list[Callable[[], bool]] = []

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        ends_at = time.monotonic() + PATIENCE_S
        while timeout is None or any(busy() for busy in self.threads):
            ready = super().select(LOOK_S)
            if ready:
                return ready
            if time.monotonic() > ends_at:
                raise RuntimeError("every task waits for something that neither a timer nor a thread will bring")
        self.now += timeout
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """`watch` names a thread's work, which takes no time on this clock."""

    def __init__(self) -> None:
        self._jumping = _Jumping()
        self._in_executor = 0
        super().__init__(self._jumping)
        self._clock_resolution = 1e-6  # after a year a float tells no smaller times apart
        self.watch(lambda: self._in_executor > 0)

    def time(self) -> float:
        return self._jumping.now

    def watch(self, busy: Callable[[], bool]) -> None:
        """Let the clock stand while `busy` says so."""
        self._jumping.threads.append(busy)

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[Unpack[Ts]], T], *args: *Ts
    ) -> asyncio.Future[T]:
        future = super().run_in_executor(executor, func, *args)
        self._in_executor += 1
        future.add_done_callback(self._executed)
        return future

    def _executed(self, _future: asyncio.Future[Any]) -> None:
        self._in_executor -= 1


def virtual_time(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run an async test on a loop whose clock jumps."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            runner.run(test(*args, **kwargs))

    return run
