"""What all models of a box share, and what is told of each."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec

from agent.admission import Memory
from agent.config import Config
from agent.health import Health
from agent.memory import read_memory
from agent.records import Records
from agent.rooms import Rooms
from agent.versions import Installed, Versions
from agent.workers import Version, Worker
from cloud_sync.state import Current, State

MAX_BACKOFF_S = 30.0


class Edges(msgspec.Struct, frozen=True):
    """Where a box's models meet the machine: how a worker is made, and how memory is read (in a thread)."""

    new_worker: Callable[[Version], Worker] = Worker
    memory: Callable[[], Memory] = read_memory


class House(msgspec.Struct, frozen=True):
    """What all models of a box share. `clock` gives seconds, `start` starts a worker as the configuration says.

    `on_fault` is told of what ended a supervisor, which nothing should.
    """

    config: Config
    state: State
    records: Records
    versions: Versions
    rooms: Rooms
    health: Health
    clock: Callable[[], float]
    on_change: Callable[[], None]
    new_worker: Callable[[Version], Worker]
    start: Callable[[Worker], Awaitable[None]]
    on_fault: Callable[[BaseException], None]


def pointer(version: Installed, previous: Installed | None) -> Current:
    """Return what is noted of a version that is to be current."""
    if previous is None:
        return Current(version.version.version, version.digest)
    return Current(version.version.version, version.digest, previous.version.version, previous.digest)


def backoff_s(times: int) -> float:
    """Return how long to wait after something went wrong so many times."""
    return min(MAX_BACKOFF_S, 0.1 * 4.0 ** min(times - 1, 10))


async def ended(task: asyncio.Task[None] | None) -> None:
    """Cancel a task and wait until it has let go; its own is left alone."""
    if task is not None and task is not asyncio.current_task():
        task.cancel()
        await asyncio.wait((task,))
