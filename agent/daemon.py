"""The daemon on one page: what is opened in which order, what runs, and how it ends (DESIGN 6)."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import gc
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from agent.activation import Activation
from agent.config import Config, StartError
from agent.health import Health
from agent.machine import box_facts
from agent.mqtt import MqttDoor
from agent.presence import Presence
from agent.recovery import recover, seed
from agent.reporting import Reporter
from agent.service import Service
from agent.sync import Looker
from agent.telemetry import Telemetry
from cloud_sync.database import Database
from cloud_sync.errors import CloudError, HandoffError
from cloud_sync.handoff import Handoffs
from cloud_sync.identity import load_identity
from cloud_sync.link import Link
from cloud_sync.messages import LinkSettings, Message, Will
from cloud_sync.notify import notify
from cloud_sync.outbox import Outbox
from cloud_sync.state import State
from cloud_sync.strict_toml import ConfigError
from cloud_sync.sync_settings import SyncOutcome, SyncSettings
from cloud_sync.wire import Topics

if TYPE_CHECKING:
    from agent.bindings import Bindings
    from agent.http import HttpDoor

log = logging.getLogger(__name__)

BEAT_S = 1.0
RECEIVE_HEADROOM = 64


class AlreadyRunningError(RuntimeError):
    """Another agent holds this state directory."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """What is opened before the first task runs."""

    outbox: Outbox
    service: Service
    activation: Activation
    looker: Looker
    door: MqttDoor
    presence: Presence
    handoffs: Handoffs | None
    local: Link
    http: HttpDoor | None
    bindings: Bindings | None


class Daemon:
    """Everything that lives as long as the agent."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.topics = Topics(config.device.prefix, config.device.name)
        self.health = Health()
        self.telemetry = Telemetry()
        self.cloud: Link | None = None
        self.stopping = asyncio.Event()
        self.hurry = asyncio.Event()
        self.reporter = Reporter(config.device.name)
        self._clock = asyncio.get_running_loop().time
        self._changed = asyncio.Event()
        self._looker: Looker | None = None
        self._handoffs: Handoffs | None = None

    async def run(self) -> None:
        """Open, serve until a signal comes, drain, close in reverse."""
        self._hear_signals()
        async with contextlib.AsyncExitStack() as stack:
            parts = await self._open(stack)
            await parts.activation.resume()
            await seed(parts.outbox, parts.service)
            async with asyncio.TaskGroup() as roots:
                await self._serve(parts, roots)
            await parts.activation.settle()

    async def _open(self, stack: contextlib.AsyncExitStack) -> Parts:
        """Open what outlives the tasks, in the order of DESIGN 6: lock, state, outbox, doors."""
        config = self.config
        folder = Path(config.state.directory)
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o750)  # noqa: ASYNC240 - nothing is served yet
        except OSError as error:
            raise StartError(f"`state.directory` = {str(folder)!r}: {error.strerror}") from error
        stack.enter_context(locked(folder))
        database = await Database.open(folder / "state.db")
        stack.push_async_callback(database.close)
        state = State(database)
        outbox = Outbox(database, config.limits.outbox_rows, config.limits.outbox_bytes)
        handoffs = await self._open_cloud(state)
        service = Service(config, outbox=outbox, cloud=handoffs, telemetry=self.telemetry, clock=self._clock)
        activation = Activation(
            config,
            state,
            service,
            self.health,
            box=await asyncio.to_thread(box_facts),
            clock=self._clock,
            on_change=lambda: self._changed.set(),  # noqa: PLW0108 - the event is presence's, made later
        )
        stack.push_async_callback(activation.stop)
        looker = self._open_looker(state, activation, handoffs)
        door = MqttDoor(config, service, self._clock)
        bindings = await self._open_bindings(service, door)
        local = self._open_local(door, bindings)
        if self.cloud is not None:
            self._listen_to_fleet(looker, handoffs)
        presence = Presence(self.topics, self.health, activation, local, self.cloud, self.reporter)
        self._changed = presence.changed
        http = self._open_http(service)
        return Parts(outbox, service, activation, looker, door, presence, handoffs, local, http, bindings)

    async def _serve(self, parts: Parts, roots: asyncio.TaskGroup) -> None:
        """Run the root tasks until a signal comes, then drain; the links live until the last word is said."""
        links = [roots.create_task(link.run(), name="link") for link in (parts.local, self.cloud) if link]
        tasks = [
            roots.create_task(parts.looker.run(), name="looker"),
            roots.create_task(parts.activation.run(), name="models"),
            roots.create_task(parts.presence.run(), name="presence"),
            roots.create_task(self._beat(), name="heartbeat"),
        ]
        if parts.handoffs is not None:
            tasks.append(roots.create_task(parts.handoffs.run(), name="hand-offs"))
        again = recover(parts.outbox, parts.service, parts.door, self._clock)
        recovery = roots.create_task(again, name="recovery")
        if parts.http is not None:
            roots.create_task(parts.http.run(), name="http door")
        if parts.bindings is not None:
            tasks.append(roots.create_task(parts.bindings.run(), name="bindings"))
        gc.freeze()  # what is here now stays: looking through it again and again would only hold requests up
        self.health.state = "online"
        self._changed.set()
        notify(f"READY=1\nSTATUS={self.health.status_line()}")
        log.info("%s is ready", self.config.device.name)
        await self.stopping.wait()
        recovery.cancel()
        await self._drain(parts.service, parts.door)
        if parts.bindings is not None:
            await parts.bindings.save()
        if parts.http is not None:
            parts.http.stop()
        for task in tasks:
            task.cancel()
        await parts.presence.leave()
        for task in links:
            task.cancel()

    def _open_looker(self, state: State, activation: Activation, handoffs: Handoffs | None) -> Looker:
        async def settings() -> SyncSettings:
            return await sync_settings(self.config, state, activation)

        async def apply(outcome: SyncOutcome) -> None:
            for problem in outcome.errors:
                log.warning("the repository: %s: %s", problem.code, problem.message)
            self.reporter.looked(outcome)
            await state.set_pools(outcome.pools)
            if handoffs is not None:
                handoffs.set_pools(outcome.pools)
            await activation.apply(outcome)

        return Looker(
            settings,
            look_every_s=self.config.repository.look_every_s,
            hint_spread_s=self.config.repository.hint_spread_s,
            on_outcome=apply,
            on_problem=self._sync_problem,
        )

    def _hear_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signal)

    def _signal(self) -> None:
        """Drain at the first signal; skip the wait at the second."""
        if self.stopping.is_set():
            self.hurry.set()
        self.stopping.set()

    async def _open_bindings(self, service: Service, door: MqttDoor) -> Bindings | None:
        """Open the bindings if there are any, or were; a box without them never imports them."""
        file = Path(self.config.state.directory) / "bindings.state"
        if not self.config.bindings and not file.exists():
            return None
        from agent.bindings import Bindings  # noqa: PLC0415 - what a box without bindings need not carry

        bindings = Bindings(self.config, service, door, clock=self._clock, file=file)
        await bindings.load()
        return bindings

    def _open_local(self, door: MqttDoor, bindings: Bindings | None) -> Link:
        settings = msgspec.structs.replace(
            self.config.local,
            client_id=self.config.local.client_id or f"spillway-{self.config.device.name}",
            receive_maximum=min(65535, self.config.limits.max_requests + RECEIVE_HEADROOM),
        )
        receive = bindings.receive if bindings is not None else door.receive
        link = self._link(settings, receive, lambda up: setattr(self.health, "local_up", up))
        door.attach(link)
        if bindings is not None:
            bindings.attach(link)
        return link

    async def _open_cloud(self, state: State) -> Handoffs | None:
        """Make the cloud link and what hands requests off over it; None where there is none."""
        config = self.config
        if config.cloud is None:
            return None
        device = config.device
        try:
            identity = await asyncio.to_thread(load_identity, Path(device.certificate), Path(device.key), device.name)
        except HandoffError as error:
            raise ConfigError(f"`device.certificate` or `device.key`: {error.message}") from error
        handoffs = Handoffs(
            publish=self._publish_handoff,
            identity=identity,
            topics=self.topics,
            clock=self._clock,
        )
        handoffs.set_pools(await state.pools())
        settings = msgspec.structs.replace(
            config.cloud, client_id=config.cloud.client_id or f"spillway-{config.device.name}-cloud"
        )

        def on_change(up: bool) -> None:  # noqa: FBT001 - a callback's one fact
            self.health.cloud_up = up
            handoffs.connected = up

        self.cloud = self._link(settings, self._from_cloud, on_change)
        return handoffs

    def _publish_handoff(self, topic: str, payload: bytes) -> asyncio.Future[None]:
        if self.cloud is None:
            raise ConnectionError("there is no cloud link")
        self.reporter.bytes.handed_off += len(payload)
        return self.cloud.publish(topic, payload, qos=1)

    def _link(
        self, settings: LinkSettings, on_message: Callable[[Message], None], on_change: Callable[[bool], None]
    ) -> Link:
        def changed(up: bool) -> None:  # noqa: FBT001 - a callback's one fact
            on_change(up)
            self._changed.set()

        will = Will(self.topics.status, b"offline")
        return Link(
            settings,
            on_message=on_message,
            will=will if on_message != self._from_cloud else None,
            on_up=lambda: changed(True),  # noqa: FBT003
            on_down=lambda: changed(False),  # noqa: FBT003
        )

    def _listen_to_fleet(self, looker: Looker, handoffs: Handoffs | None) -> None:
        if self.cloud is None:
            return
        self._looker, self._handoffs = looker, handoffs
        self.cloud.subscribe(self.topics.handoff_reply, 1)
        for group in self.config.device.groups:
            self.cloud.subscribe(self.topics.hint(group), 1)

    def _from_cloud(self, message: Message) -> None:
        if message.topic == self.topics.handoff_reply:
            self.reporter.bytes.answered += len(message.payload)
            if self._handoffs is not None:
                self._handoffs.on_reply(message.payload)
        elif self.topics.parse_hint(message.topic) is not None and self._looker is not None:
            self._looker.hint()
        if message.qos and self.cloud is not None:
            self.cloud.acknowledge(message)

    def _sync_problem(self, problem: CloudError) -> None:
        log.warning("the repository could not be read: %s: %s", problem.code, problem.message)
        self.reporter.could_not_look(problem)
        self._changed.set()

    def _open_http(self, service: Service) -> HttpDoor | None:
        """Open the HTTP door if there is to be one; a box without it never imports it."""
        if not self.config.http.port:
            return None
        from agent.http import HttpDoor  # noqa: PLC0415 - 12 MB that a box without this door need not carry

        return HttpDoor(self.config, service, self.health, self._clock)

    async def _drain(self, service: Service, door: MqttDoor) -> None:
        """Refuse new work, finish what was accepted."""
        notify("STOPPING=1\nSTATUS=draining")
        log.info("draining")
        self.health.state = "draining"
        door.draining = True
        self._changed.set()
        drained = asyncio.ensure_future(service.drain(self.config.limits.drain_timeout_s))
        hurried = asyncio.ensure_future(self.hurry.wait())
        await asyncio.wait((drained, hurried), return_when=asyncio.FIRST_COMPLETED)
        if not drained.done():
            drained.cancel()
            await service.drain(0)
        hurried.cancel()

    async def _beat(self) -> None:
        """Feed the watchdog while the loop turns and the link tasks live."""
        limit_s = float(os.environ.get("WATCHDOG_USEC", "0")) / 1e6
        while True:
            notify("WATCHDOG=1")
            await asyncio.sleep(min(BEAT_S, limit_s / 3) if limit_s else BEAT_S)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the state directory against a second agent; raises AlreadyRunningError."""
    descriptor = os.open(folder / "agent.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise AlreadyRunningError(f"another agent uses {folder}") from error
        yield
    finally:
        os.close(descriptor)


async def sync_settings(config: Config, state: State, activation: Activation) -> SyncSettings:
    """Return what one sync pass must know of this box now."""
    current, failed = await state.current(), await state.failed()
    keep = {digest for one in current.values() for digest in (one.digest, one.previous_digest) if digest}
    repository = config.repository
    return SyncSettings(
        device=config.device.name,
        groups=config.device.groups,
        state_dir=config.state.directory,
        repository=repository.url,
        root=repository.root,
        box=activation.box,
        endpoint=repository.endpoint,
        region=repository.region,
        credentials=repository.credentials,
        current={model: one.version for model, one in current.items()},
        keep=sorted(keep),
        failed=sorted(failed),
        decided={digest: failure.decision for digest, failure in failed.items() if failure.decision},
    )


async def run_daemon(config: Config) -> None:
    """Run the agent until it is told to stop."""
    started = time.monotonic()
    daemon = Daemon(config)
    await daemon.run()
    log.info("stopped after %.0f s", time.monotonic() - started)
