"""Bindings at work: a sensor's messages become requests of the service, and the answers messages.

Reading costs the loop microseconds; questions of one sensor are asked one after the other, in its order, those of
different sensors side by side. Everything is bounded: what is over a bound is dropped, oldest first, and counted.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from agent import binding_rules as rules
from agent.binding_settings import Binding
from agent.binding_source import Answering, DropError, Reader, Source, advance, compose
from agent.binding_store import load_sources, save_sources
from agent.config import Config
from agent.intake import Ticket
from agent.mqtt import MqttDoor
from agent.service import Service
from cloud_sync.errors import StoreError
from cloud_sync.link import Link
from cloud_sync.messages import Message
from cloud_sync.wire import is_publishable
from models.request import Request, Response

log = logging.getLogger(__name__)

TELL_EVERY_S: Final = 10.0
SAVE_EVERY_S: Final = 600.0
COMPLAIN_EVERY_S: Final = 60.0
MAX_SEEN: Final = 2000
"""Packet identifiers whose messages are known again; more than a broker may have unacknowledged here."""


class Counts(msgspec.Struct, omit_defaults=True):
    """What became of a binding's messages, for the box's owner; counted from the start of the agent."""

    received: int = 0
    topics: int = 0
    asked: int = 0
    answered: int = 0
    published: int = 0
    dropped: dict[str, int] = {}
    failed: dict[str, int] = {}
    last_problem: str = ""


class _Waiting(msgspec.Struct, frozen=True):
    """Inputs of a request whose sensor has one under way."""

    topic: str
    inputs: Any
    at: float

    @property
    def size(self) -> int:
        """Bytes, where they count."""
        return len(self.inputs) if isinstance(self.inputs, bytes) else 0


class Runner:
    """One binding."""

    def __init__(self, binding: Binding, max_waiting_bytes: int) -> None:
        self.binding = binding
        self.counts = Counts()
        self.reader = Reader(binding)
        self.answering = Answering(binding)
        self.sources: collections.OrderedDict[tuple[str, ...], Source] = collections.OrderedDict()
        self.busy: set[tuple[str, ...]] = set()
        self.waiting: dict[tuple[str, ...], collections.deque[_Waiting]] = {}
        self.complained_at = float("-inf")
        self._max_waiting_bytes = max_waiting_bytes
        self._waiting_number = self._waiting_bytes = 0

    def source(self, parts: tuple[str, ...]) -> Source:
        """Return what is kept of a sensor; over `max_topics` the one that was silent for longest is forgotten."""
        source = self.sources.get(parts)
        if source is None:
            source = self.sources[parts] = Source(parts=parts)
            if len(self.sources) > self.binding.max_topics:
                self.sources.popitem(last=False)
                self.count(self.counts.dropped, "forgotten")
        self.sources.move_to_end(parts)
        return source

    def hold(self, parts: tuple[str, ...], item: _Waiting) -> None:
        """Let a request wait for the one before; over the bounds the oldest of the longest queue is dropped."""
        self.waiting.setdefault(parts, collections.deque()).append(item)
        self._waiting_number += 1
        self._waiting_bytes += item.size
        while self._waiting_number > self.binding.max_waiting or self._waiting_bytes > self._max_waiting_bytes:
            longest = max(self.waiting, key=lambda one: len(self.waiting[one]))
            self.release(longest)
            self.count(self.counts.dropped, "burst")

    def release(self, parts: tuple[str, ...]) -> _Waiting | None:
        """Return the request of a sensor that has waited longest, if one waits."""
        queue = self.waiting.get(parts)
        if not queue:
            return None
        item = queue.popleft()
        if not queue:
            del self.waiting[parts]
        self._waiting_number -= 1
        self._waiting_bytes -= item.size
        return item

    def count(self, counter: dict[str, int], word: str) -> None:
        """Count one more of `word`."""
        counter[word] = counter.get(word, 0) + 1


class Bindings:
    """All bindings of the box. `clock` gives the loop's seconds, `wall` those since 1970; `file` outlasts a restart."""

    def __init__(
        self,
        config: Config,
        service: Service,
        door: MqttDoor,
        *,
        clock: Callable[[], float],
        file: Path,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._service = service
        self._door = door
        self._clock = clock
        self._wall = wall
        self._file = file
        self._base = f"{config.device.prefix}/{config.device.name}/"
        share = config.limits.max_request_bytes // max(1, len(config.bindings))
        self._runners = [Runner(binding, share) for binding in config.bindings]
        self._link: Link | None = None
        self._stale_filters: list[str] = []
        self._told = b""
        self._heard = self._saved = 0
        self._stirred = asyncio.Event()
        self._seen: dict[int, int] = {}

    async def load(self) -> None:
        """Take up the windows from before a restart; a file that is damaged, or of other bindings, counts as none."""
        kept = await asyncio.to_thread(load_sources, self._file, self._config.bindings, self._clock())
        for runner in self._runners:
            for source in kept.sources.get(runner.binding.name, []):
                runner.sources[source.parts] = source
        self._stale_filters = kept.filters

    def attach(self, link: Link) -> None:
        """Subscribe on the local link, and take back what an earlier configuration asked its broker for."""
        self._link = link
        filters = rules.cover([pattern for runner in self._runners for pattern in runner.binding.filters])
        for pattern in set(self._stale_filters) - set(filters):
            link.unsubscribe(pattern)
        for pattern in filters:
            refused = functools.partial(self._refused, pattern)
            link.subscribe(pattern, 1, retain_as_published=False, on_refused=refused)

    def receive(self, message: Message) -> None:
        """Take one message of the local link: the box's own topics are the door's."""
        if message.topic.startswith(self._base):
            self._door.receive(message)
            return
        if not self._door.draining and not self._comes_again(message):
            for runner in self._runners:
                for pattern in runner.binding.filters:
                    parts = rules.match(pattern, message.topic)
                    if parts is not None:
                        self._take(runner, message, parts)
                        break
        if message.qos and self._link is not None:
            self._link.acknowledge(message)

    def _comes_again(self, message: Message) -> bool:
        """Whether this is a redelivery of what was read: its acknowledgement waited behind another, and was lost."""
        if not message.qos:
            return False
        mark = hash((message.topic, message.payload))
        if message.duplicate and self._seen.get(message.mid) == mark:
            return True
        self._seen.pop(message.mid, None)
        self._seen[message.mid] = mark
        if len(self._seen) > MAX_SEEN:
            del self._seen[next(iter(self._seen))]
        return False

    async def run(self) -> None:
        """Tell what became of the messages, and keep the windows; a root task."""
        saved_at = self._clock()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SAVE_EVERY_S):
                    await self._stirred.wait()
            self._stirred.clear()
            self._tell()
            if self._clock() - saved_at >= SAVE_EVERY_S:
                saved_at = self._clock()
                await self.save()
            await asyncio.sleep(TELL_EVERY_S)

    async def save(self) -> None:
        """Write the windows to the disk if messages came since the last time; without bindings nothing is kept."""
        if not self._runners:
            await asyncio.to_thread(self._file.unlink, missing_ok=True)
        if self._heard == self._saved:
            return
        self._saved = self._heard
        kept = {runner.binding.name: list(runner.sources.values()) for runner in self._runners}
        try:
            await asyncio.to_thread(save_sources, self._file, self._config.bindings, kept, self._clock())
        except (StoreError, OSError) as error:
            log.warning("the bindings' windows could not be kept: %s", error)

    def report(self) -> dict[str, Counts]:
        """Return the counts of each binding."""
        for runner in self._runners:
            runner.counts.topics = len(runner.sources)
        return {runner.binding.name: runner.counts for runner in self._runners}

    def _tell(self) -> None:
        told = msgspec.json.encode(self.report())
        if self._link is not None and self._link.connected and told != self._told:
            self._told = told
            self._link.publish(self._door.topics.bindings, told, qos=1, retain=True).add_done_callback(_look)

    def _refused(self, pattern: str, why: str) -> None:
        """Note that the broker lets this box not read a filter; everything else goes on."""
        for runner in self._runners:
            if any(rules.covers(pattern, mine) for mine in runner.binding.filters):
                self._complain(runner, f"the broker refuses {pattern}: {why}")
                self._stirred.set()

    def _take(self, runner: Runner, message: Message, parts: tuple[str, ...]) -> None:
        """Read a message; ask, or let it wait where its sensor's request before is under way."""
        runner.counts.received += 1
        self._heard += 1
        self._stirred.set()
        try:
            if message.retain and (runner.binding.retained == "ignore" or parts in runner.sources):
                raise DropError("retained", "it is from before the box listened")
            if len(message.payload) > self._config.limits.max_body_bytes:
                raise DropError("too_large", f"it has {len(message.payload)} bytes")
            found = runner.reader.read(message.topic, message.payload)
            made_at = self._clock() - runner.reader.age_s(message.payload, self._wall())
            inputs = advance(runner.binding, runner.source(parts), found, made_at)
        except DropError as drop:
            self._drop(runner, drop)
            return
        if inputs is None:
            return
        item = _Waiting(message.topic, inputs, self._clock())
        if parts in runner.busy:
            runner.hold(parts, item)
        else:
            self._ask(runner, runner.source(parts), item)

    def _ask(self, runner: Runner, source: Source, item: _Waiting) -> None:
        """Give a request to the service; its final reply ends in `_answered`."""
        binding = runner.binding
        try:
            body = compose(binding, source, item.inputs)
        except DropError as drop:
            self._drop(runner, drop)
            return
        deadline_ms = binding.deadline_ms or self._service.policy(binding.model).deadline_ms
        request = Request(
            model=binding.model,
            content_type=body.content_type,
            body=body.body,
            dialect=body.dialect,
            client=binding.client,
            deadline_ms=deadline_ms,
            priority=binding.priority,
            local_only=binding.local_only or bool(binding.state),
        )

        async def send(response: Response) -> None:
            if response.final:
                self._answered(runner, source, item, response)

        runner.busy.add(source.parts)
        runner.counts.asked += 1
        at = item.at
        deadline_at = at + deadline_ms / 1e3
        self._service.accept(Ticket(request, received_at=at, deadline_at=deadline_at, send=send, settle=_nothing))

    def _answered(self, runner: Runner, source: Source, item: _Waiting, response: Response) -> None:
        runner.busy.discard(source.parts)
        try:
            if response.code:
                runner.count(runner.counts.failed, response.code)
                # A model may quote its input in its error: that is for the owner's broker, not for the log.
                self._complain(runner, f"{response.code}: {_message(response)}", logged=response.code)
                return
            runner.counts.answered += 1
            payload = runner.answering.take(source, response.body, response.model)
            if payload is not None:
                self._publish(runner, source, item.topic, payload)
        except DropError as drop:
            self._drop(runner, drop)
        finally:
            self._next(runner, source)

    def _next(self, runner: Runner, source: Source) -> None:
        """Ask what waits for this sensor, until one is under way or nothing waits."""
        while source.parts not in runner.busy and (item := runner.release(source.parts)) is not None:
            if self._door.draining:
                runner.count(runner.counts.dropped, "stopping")
            else:
                self._ask(runner, source, item)

    def _publish(self, runner: Runner, source: Source, came_on: str, payload: bytes) -> None:
        binding = runner.binding
        topic = rules.fill(binding.publish, came_on, source.parts, binding.model)
        if self._link is None or not is_publishable(topic):
            raise DropError("no_topic", "the topic that `publish` becomes is none")
        done = self._link.publish(topic, payload, qos=binding.qos, retain=binding.retain)

        def sent(future: asyncio.Future[None]) -> None:
            if future.cancelled() or future.exception() is not None:
                runner.count(runner.counts.dropped, "unpublished")
            else:
                runner.counts.published += 1

        done.add_done_callback(sent)

    def _drop(self, runner: Runner, drop: DropError) -> None:
        runner.count(runner.counts.dropped, drop.reason)
        if drop.reason != "retained":
            self._complain(runner, f"{drop.reason}: {drop}")

    def _complain(self, runner: Runner, why: str, *, logged: str = "") -> None:
        """Tell the owner of a problem, and the log of no more than one in a minute for each binding."""
        runner.counts.last_problem = why
        if self._clock() - runner.complained_at >= COMPLAIN_EVERY_S:
            runner.complained_at = self._clock()
            log.warning("binding %s: %s", runner.binding.name, logged or why)


def _message(response: Response) -> str:
    """Return what an error's body says."""
    match msgspec.json.decode(response.body):
        case {"error": {"message": str(text)}}:
            return text
        case {"error": str(text)}:
            return text.partition(": ")[2]
    return ""


def _nothing() -> None:
    """Do nothing: a sensor's message is acknowledged when it is read."""


def _look(done: asyncio.Future[None]) -> None:
    if not done.cancelled() and done.exception() is not None:
        log.debug("the bindings' counts were not taken: %s", done.exception())
