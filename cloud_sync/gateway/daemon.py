"""A gateway's life: open, answer until a signal comes, finish what was taken, close."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import signal
import socket
from collections import Counter
from pathlib import Path
from typing import Final

import msgspec

from cloud_sync.errors import HandoffError
from cloud_sync.gateway.authority import load_authority, now_utc
from cloud_sync.gateway.config import GatewaySettings, PoolSettings
from cloud_sync.gateway.desk import Bounds, Desk
from cloud_sync.gateway.opener import Opener, Question, Refusal
from cloud_sync.gateway.upstream import Upstream
from cloud_sync.link import Link
from cloud_sync.messages import LinkSettings, Message
from cloud_sync.notify import notify
from cloud_sync.sealing import load_pool_key
from cloud_sync.strict_toml import ConfigError
from cloud_sync.wire import Topics

log = logging.getLogger(__name__)

REFUSING_HEADROOM: Final = 256
"""Messages beyond those being answered that the broker may give us, so that they can be refused."""
TELL_EVERY_S: Final = 60.0


class Gateway:
    """One replica. `stopping` begins the drain."""

    def __init__(self, settings: GatewaySettings) -> None:
        """Read the files that the settings name; raises ConfigError."""
        self.settings = settings
        self.counters: Counter[str] = Counter()
        self.stopping = asyncio.Event()
        self.hurry = asyncio.Event()
        self._topics = Topics(settings.prefix)
        self._opener = _opener(settings, self._topics)
        self._upstreams = {name: _upstream(name, pool) for name, pool in settings.pools.items()}
        self.link = self._link()
        self.desk = Desk(
            {name: (self._upstreams[name], pool.concurrency) for name, pool in settings.pools.items()},
            publish=lambda topic, payload: self.link.publish(topic, payload, qos=1),
            topics=self._topics,
            clock=asyncio.get_running_loop().time,
            bounds=Bounds(answers=settings.answers, answer_bytes=settings.answer_bytes, ids=settings.ids),
        )
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve until `stopping`, then drain; the second signal skips the wait."""
        for pool in self.settings.pools:
            self.link.subscribe(self._topics.handoff_filter(pool), 1)
        async with contextlib.AsyncExitStack() as stack:
            for upstream in self._upstreams.values():
                stack.push_async_callback(upstream.close)
            async with asyncio.TaskGroup() as roots:
                tasks = [roots.create_task(self.link.run(), name="link"), roots.create_task(self._tell(), name="tell")]
                notify("READY=1\nSTATUS=serving")
                log.info("serving the pools %s", ", ".join(sorted(self.settings.pools)))
                await self.stopping.wait()
                await self._drain()
                await self.link.close()
                for task in tasks:
                    task.cancel()

    def _link(self) -> Link:
        try:
            return Link(_link_settings(self.settings), on_message=self._on_message)
        except OSError as error:
            raise ConfigError(f"`cloud`: one of its files cannot be used: {error}") from error

    def hear_signals(self) -> None:
        """Drain on SIGTERM and SIGINT."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._signal)

    def _signal(self) -> None:
        if self.stopping.is_set():
            self.hurry.set()
        self.stopping.set()

    def _on_message(self, message: Message) -> None:
        opened = None if message.retain else self._open(message)
        if opened is None:
            self.link.acknowledge(message)
            return
        task = asyncio.get_running_loop().create_task(self._settle(message, opened), name=f"hand-off {opened.asker.id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _open(self, message: Message) -> Question | Refusal | None:
        """Open a message; what cannot be answered is counted and told of, without anything that it holds."""
        try:
            return self._opener.open(message.topic, message.payload, now_utc())
        except HandoffError as error:
            self.counters[error.code] += 1
            log.warning("a hand-off of %d bytes was dropped: %s", len(message.payload), error.code)
            return None

    async def _settle(self, message: Message, opened: Question | Refusal) -> None:
        try:
            await self.desk.settle(opened)
        finally:
            self.link.acknowledge(message)

    async def _drain(self) -> None:
        """Take no more and finish what was taken, up to `drain_timeout_s`; what is left is told to ask elsewhere."""
        for pool in self.settings.pools:
            self.link.unsubscribe(self._topics.handoff_filter(pool))
        notify("STOPPING=1\nSTATUS=draining")
        log.info("draining %d hand-offs", len(self._tasks))
        self.desk.draining = True
        hurry = asyncio.ensure_future(self.hurry.wait())
        all_done = asyncio.ensure_future(self._all_done())
        try:
            timeout_s = self.settings.drain_timeout_s
            await asyncio.wait([hurry, all_done], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            hurry.cancel()
            all_done.cancel()
        left = list(self._tasks)
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=2.0)

    async def _all_done(self) -> None:
        while self._tasks:
            await asyncio.wait(list(self._tasks))

    async def _tell(self) -> None:
        """Log what was done, once a minute where anything was."""
        told: Counter[str] = Counter()
        while True:
            await asyncio.sleep(TELL_EVERY_S)
            counted = self.desk.counters + self.counters
            news = counted - told
            if news:
                log.info("in the last minute: %s", ", ".join(f"{name} {count}" for name, count in sorted(news.items())))
                notify(f"STATUS=serving; {', '.join(f'{name} {count}' for name, count in sorted(counted.items()))}")
            told = counted


async def serve(settings: GatewaySettings) -> None:
    """Run a gateway until it is told to stop; raises ConfigError."""
    gateway = Gateway(settings)
    gateway.hear_signals()
    await gateway.run()


def _link_settings(settings: GatewaySettings) -> LinkSettings:
    """Return the link's settings: nothing waits for a gateway that is gone, and each replica has a name of its own."""
    window = sum(pool.concurrency for pool in settings.pools.values()) + REFUSING_HEADROOM
    client_id = settings.cloud.client_id or f"spillway-gateway-{socket.gethostname()[:32]}-{secrets.token_hex(4)}"
    return msgspec.structs.replace(
        settings.cloud,
        client_id=client_id,
        clean_start=True,
        session_expiry_s=0,
        receive_maximum=min(65535, window),
    )


def _opener(settings: GatewaySettings, topics: Topics) -> Opener:
    try:
        authority = load_authority(Path(settings.ca))
        keys = {name: dict(load_pool_key(Path(file)) for file in pool.keys) for name, pool in settings.pools.items()}
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"`ca` = {settings.ca!r}: the certificates of the fleet's CA in PEM belong here: {error}"
        ) from error
    except HandoffError as error:
        raise ConfigError(f"`keys`: files that `spillway-fleet pool-key` wrote belong here: {error.message}") from error
    return Opener(topics, keys, authority)


def _upstream(name: str, pool: PoolSettings) -> Upstream:
    api_key = ""
    if pool.api_key_file:
        try:
            api_key = Path(pool.api_key_file).read_text("ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"`pools.{name}.api_key_file` = {pool.api_key_file!r}: cannot be read: {error}"
            ) from error
    return Upstream(pool.upstream, models=pool.models, api_key=api_key, concurrency=pool.concurrency)
