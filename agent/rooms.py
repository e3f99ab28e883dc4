"""Who may be in memory: grants loads one at a time against what is free, and has idle models unloaded for others."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

from agent.admission import Held, Memory, plan_load

log = logging.getLogger(__name__)

PATIENCE_S = 180.0
"""How long a load waits for others that are under way before it is put off."""


class NoRoomError(Exception):
    """There is no memory for a load now; it may be tried again later."""


class Tenant(Protocol):
    """A model that may be loaded, as `Rooms` sees it."""

    name: str

    def held(self) -> Held | None:
        """Return what its worker holds; None where it has none."""

    async def unload(self) -> None:
        """End its worker if it is still idle; it is loaded again when it is asked."""


class Rooms:
    """The box's memory, shared among its models. `read` returns what is free, in a thread."""

    def __init__(self, read: Callable[[], Memory]) -> None:
        self.tenants: dict[str, Tenant] = {}
        self._read = read
        self._promised: dict[str, float] = {}
        self._door = asyncio.Lock()
        self._left = asyncio.Event()

    @contextlib.asynccontextmanager
    async def room(
        self, name: str, need_mb: float, *, evict: bool = True, leave: Callable[[], Awaitable[None]] | None = None
    ) -> AsyncIterator[None]:
        """Hold room for a load while it is under way; raises NoRoomError.

        With `evict` idle models make room. `leave` ends the model's own worker, which is done only where the new one
        fits in its place and not beside it.
        """
        async with self._door:
            await self._make_room(name, need_mb, evict=evict, leave=leave)
            self._promised[name] = need_mb
        try:
            yield
        finally:
            self._promised.pop(name, None)
            self._left.set()

    async def _make_room(
        self, name: str, need_mb: float, *, evict: bool, leave: Callable[[], Awaitable[None]] | None
    ) -> None:
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self._once_others_are_in(name, need_mb, evict=evict, leave=leave)
        except TimeoutError as error:
            raise NoRoomError("other models take too long to load") from error

    async def _once_others_are_in(
        self, name: str, need_mb: float, *, evict: bool, leave: Callable[[], Awaitable[None]] | None
    ) -> None:
        while True:
            self._left.clear()  # before anything is looked at, so that no load's end is missed
            memory = await asyncio.to_thread(self._read)
            promised_mb = sum(self._promised.values())
            others = self._held(name) if evict else []
            plan = plan_load(need_mb, memory, others, promised_mb=promised_mb)
            own = self.tenants[name].held() if leave is not None and name in self.tenants else None
            if plan.short_mb and own is not None and leave is not None and plan.short_mb <= own.mb:
                log.info("%s: two versions do not fit: the old one ends first", name)
                await leave()
                leave = None
            elif plan.short_mb and promised_mb:
                await self._left.wait()
            elif plan.short_mb:
                raise NoRoomError(f"no room in memory: {plan.why}")
            elif plan.unload:
                for other in plan.unload:
                    log.info("%s is unloaded to make room for %s", other, name)
                    await self.tenants[other].unload()
                evict = False  # what it gave must do; a second look sees what is really free
            else:
                return

    def _held(self, name: str) -> list[Held]:
        tenants = [tenant for tenant in self.tenants.values() if tenant.name != name]
        return [held for tenant in tenants if (held := tenant.held()) is not None]
