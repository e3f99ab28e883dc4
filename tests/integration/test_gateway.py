"""A box, a real mosquitto, a real gateway process and a real HTTP endpoint."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cloud_sync.deployment import Pool, PoolKey
from cloud_sync.errors import HandoffError
from cloud_sync.exchange import Reply
from cloud_sync.handoff import Handoffs
from cloud_sync.identity import Identity
from cloud_sync.link import Link
from cloud_sync.messages import LinkSettings, Message
from cloud_sync.wire import Topics, parse_handoff
from models.request import Dialect, Request
from tests.fakes.certificates import TestCA, TestPool
from tests.support.endpoint import Endpoint, serving
from tests.support.mosquitto import Mosquitto

ROOT = Path(__file__).resolve().parents[2]
START_S = 20.0


class Gateway:
    """A gateway in a process of its own."""

    def __init__(self, folder: Path, broker: Mosquitto, endpoint: Endpoint, ca: TestCA, pool: TestPool) -> None:
        self.folder = folder
        self.log = folder / "gateway.log"
        self._notify = folder / "notify"
        self._told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._told.bind(str(self._notify))
        self._told.settimeout(START_S)
        self.process: subprocess.Popen[bytes] | None = None
        self.config = folder / "gateway.toml"
        (folder / "api.key").write_text("sk-test\n")
        ca.save(folder)
        pool.save(folder)
        self.config.write_text(f"""
ca = "ca.pem"
drain_timeout_s = 10
[cloud]
host = "127.0.0.1"
port = {broker.port}
max_backoff_s = 0.5
[pools.default]
keys = ["{pool.kid}.key"]
upstream = "{endpoint.url}"
models = {{ assistant = "big-1" }}
api_key_file = "api.key"
concurrency = 2
""")

    def start(self) -> None:
        environment = os.environ | {"NOTIFY_SOCKET": str(self._notify), "PYTHONPATH": str(ROOT)}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cloud_sync.gateway.cli", "--config", str(self.config)],
                stderr=log,
                env=environment,
            )
        assert self.told().startswith("READY=1")
        self.wait_for_log("is up")

    def wait_for_log(self, words: str) -> None:
        until = time.monotonic() + START_S
        while words not in self.log.read_text():
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.02)

    def told(self) -> str:
        """Return the next thing that systemd was told."""
        return self._told.recv(4096).decode()

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
            self.process = None
            self.log.write_text(self.log.read_text().replace("is up", "was up"))

    def close(self) -> None:
        self.kill()
        self._told.close()


class Box:
    """The box's cloud link and its hand-offs, in this process."""

    def __init__(self, broker: Mosquitto, identity: Identity, pool: Pool) -> None:
        self.topics = Topics("spillway", identity.device)
        loop = asyncio.get_running_loop()
        settings = LinkSettings(port=broker.port, client_id=identity.device, max_backoff_s=0.5)
        self.link = Link(settings, on_message=self._on_message, on_up=self._on_up, on_down=self._on_down)
        self.link.subscribe(self.topics.handoff_reply)
        self.handoffs = Handoffs(
            publish=lambda topic, payload: self.link.publish(topic, payload, qos=1),
            identity=identity,
            topics=self.topics,
            clock=loop.time,
        )
        self.handoffs.set_pools([pool])

    def _on_message(self, message: Message) -> None:
        self.handoffs.on_reply(message.payload)
        self.link.acknowledge(message)

    def _on_up(self) -> None:
        self.handoffs.connected = True

    def _on_down(self) -> None:
        self.handoffs.connected = False

    def ask(self, request: Request, *, within_s: float = 25.0) -> asyncio.Task[list[Reply]]:
        async def collect() -> list[Reply]:
            deadline_at = asyncio.get_running_loop().time() + within_s
            return [r async for r in self.handoffs.send(os.urandom(16).hex(), request, "default", deadline_at)]

        return asyncio.ensure_future(collect())


@contextlib.asynccontextmanager
async def running(*links: Link | Box) -> AsyncIterator[None]:
    roots = []
    for each in links:
        link = each.link if isinstance(each, Box) else each
        roots.append(asyncio.ensure_future(link.run()))
        if isinstance(each, Box):
            roots.append(asyncio.ensure_future(each.handoffs.run()))
        async with asyncio.timeout(START_S):
            await link.wait_up()
    try:
        yield
    finally:
        for root in roots:
            root.cancel()
        await asyncio.gather(*roots, return_exceptions=True)
        for each in links:
            await (each.link if isinstance(each, Box) else each).close()


class Rig:
    """Everything, with one box and one gateway."""

    def __init__(self, folder: Path, broker: Mosquitto, endpoint: Endpoint) -> None:
        self.broker = broker
        self.endpoint = endpoint
        self.ca = TestCA()
        self.pool = TestPool()
        self.gateway = Gateway(folder, broker, endpoint, self.ca, self.pool)

    def box(self, *, identity: Identity | None = None, pool: Pool | None = None) -> Box:
        key = self.pool.pool if pool is None else pool
        return Box(self.broker, identity or self.ca.identity("pi-7", days=3650), key)

    def spy(self) -> tuple[Link, list[Message]]:
        """Return a link that sees what the broker's operator sees."""
        seen: list[Message] = []
        link = Link(LinkSettings(port=self.broker.port, client_id="operator"), on_message=seen.append)
        link.subscribe("#", 0)
        return link, seen


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    broker = Mosquitto(tmp_path)
    broker.start()
    with serving(Endpoint()) as endpoint:
        whole = Rig(tmp_path, broker, endpoint)
        whole.gateway.start()
        yield whole
        whole.gateway.close()
    broker.kill()


def text(prompt: str, **changes: Any) -> Request:
    fields = {"model": "assistant", "content_type": "text/plain", "body": prompt.encode()}
    return Request(**(fields | {"dialect": Dialect.HUGGINGFACE} | changes))


def chat(prompt: str, *, stream: bool = False) -> Request:
    body: dict[str, Any] = {"model": "assistant", "messages": [{"role": "user", "content": prompt}]}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return Request(
        model="assistant",
        content_type="application/json",
        body=msgspec.json.encode(body),
        dialect=Dialect.OPENAI,
        stream=stream,
    )


def only(replies: list[Reply]) -> Any:
    (reply,) = replies
    return json.loads(reply.body)


async def until(condition: Any, within_s: float = START_S) -> None:
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in another thread or process
            await asyncio.sleep(0.02)


async def test_d9_each_dialect_gets_its_answer_and_the_brokers_operator_sees_none_of_it(rig: Rig) -> None:
    box = rig.box()
    spy, seen = rig.spy()
    async with running(box, spy):
        assert only(await box.ask(text("my doctor said"))) == {"outputs": {"generated_text": "MY DOCTOR SAID"}}
        whole = only(await box.ask(chat("my doctor said")))
        assert whole["choices"][0]["message"]["content"] == "MY DOCTOR SAID"
        pieces = await box.ask(chat("my doctor said", stream=True))
        chunks = [json.loads(piece.body) for piece in pieces]
        said = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])
        assert said == "MY DOCTOR SAID"
        assert chunks[-1]["usage"]["total_tokens"] == 6
        assert [piece.final for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        parts = [json.loads(piece.body) for piece in await box.ask(text("my doctor said", stream=True))]
        assert "".join(part["outputs"]["generated_text"] for part in parts) == "MY DOCTOR SAID"
    assert {chat["model"] for chat in rig.endpoint.asked} == {"big-1"}
    assert {headers["authorization"] for headers in rig.endpoint.headers} == {"Bearer sk-test"}
    assert len(seen) > 10
    for message in seen:
        carried = message.topic.encode() + message.payload
        assert b"doctor" not in carried.lower()
        assert b"pi-7's" not in carried
    assert "doctor" not in rig.gateway.log.read_text().lower()


async def test_d7_the_broker_is_killed_between_hand_off_and_answer_and_the_answer_still_comes(rig: Rig) -> None:
    box = rig.box()
    async with running(box):
        task = box.ask(text("slow 2 and lost"))
        await until(lambda: rig.endpoint.asked)
        rig.broker.kill()
        await asyncio.sleep(0.5)
        rig.broker.start()
        assert only(await task) == {"outputs": {"generated_text": "SLOW 2 AND LOST"}}
    assert rig.endpoint.prompts() == ["slow 2 and lost"]


async def test_d7_the_broker_loses_the_hand_off_itself_and_it_is_sent_again(rig: Rig) -> None:
    box = rig.box()
    rig.gateway.kill()
    async with running(box):
        task = box.ask(text("hello"))
        await asyncio.sleep(0.5)
        rig.broker.kill()
        rig.broker.start()
        rig.gateway.start()
        assert only(await task) == {"outputs": {"generated_text": "HELLO"}}
        assert box.handoffs.counters["sent_again"] >= 1


async def test_d7_the_gateway_is_killed_at_work_and_the_next_one_answers_the_same_request(rig: Rig) -> None:
    box = rig.box()
    async with running(box):
        task = box.ask(text("slow 1 and killed"))
        await until(lambda: rig.endpoint.asked)
        rig.gateway.kill()
        rig.gateway.start()
        assert only(await task) == {"outputs": {"generated_text": "SLOW 1 AND KILLED"}}
    assert rig.endpoint.prompts() == ["slow 1 and killed"] * 2


async def test_d7_c6_a_slow_answer_is_asked_for_once_though_the_box_asks_again_after_its_own_restart(rig: Rig) -> None:
    first = rig.box()
    request, ident = text("slow 3 and steady"), "00" * 16
    deadline_at = asyncio.get_running_loop().time() + 20

    async def ask(box: Box) -> list[Reply]:
        return [reply async for reply in box.handoffs.send(ident, request, "default", deadline_at)]

    async with running(first):
        lost = asyncio.ensure_future(ask(first))
        await until(lambda: rig.endpoint.asked)
        lost.cancel()
    second = rig.box()
    async with running(second):
        assert only(await ask(second)) == {"outputs": {"generated_text": "SLOW 3 AND STEADY"}}
    assert rig.endpoint.prompts() == ["slow 3 and steady"]


async def test_d11_a_recorded_hand_off_is_paid_for_once(rig: Rig) -> None:
    box = rig.box()
    spy, seen = rig.spy()
    async with running(box, spy):
        task = box.ask(text("once only"), within_s=3)
        await task
        (recorded,) = [message for message in seen if message.topic == "spillway/handoff/default/assistant"]
        for _ in range(3):
            await spy.publish(recorded.topic, recorded.payload, qos=1)
        await until(lambda: box.handoffs.counters["late"] >= 3)
        await asyncio.sleep(3)
        for _ in range(3):
            await spy.publish(recorded.topic, recorded.payload, qos=1)
        rig.gateway.wait_for_log("is over; it came again")
    assert rig.endpoint.prompts() == ["once only"]


async def test_d10_a_hand_off_for_another_key_is_dropped_and_the_box_told_by_its_deadline(rig: Rig) -> None:
    other = TestPool()
    box = rig.box(pool=Pool("default", "spillway/handoff/default", [PoolKey("k1", other.public.hex())]))
    unknown = rig.box(
        identity=rig.ca.identity("pi-8", days=3650),
        pool=Pool("default", "spillway/handoff/default", [PoolKey("k9", rig.pool.public.hex())]),
    )
    async with running(box, unknown):
        for each in (box, unknown):
            with pytest.raises(HandoffError) as caught:
                await each.ask(text("secret"), within_s=1.5)
            assert caught.value.code == "deadline_exceeded"
    assert rig.endpoint.asked == []
    rig.gateway.wait_for_log("does_not_open")
    rig.gateway.wait_for_log("unknown_key")


async def test_a_box_of_a_foreign_fleet_is_told_forbidden_and_nothing_is_paid(rig: Rig) -> None:
    box = rig.box(identity=TestCA().identity("pi-7", days=3650))
    async with running(box):
        (reply,) = await box.ask(text("hello"))
    assert reply.code == "forbidden"
    assert rig.endpoint.asked == []


async def test_d6_a_busy_endpoint_is_asked_again_and_a_full_gateway_too(rig: Rig) -> None:
    box = rig.box()
    async with running(box):
        started = time.monotonic()
        assert only(await box.ask(text("busy bee"))) == {"outputs": {"generated_text": "BUSY BEE"}}
        assert time.monotonic() - started >= 1.0
        tasks = [box.ask(text(f"slow 1 number {n}")) for n in range(3)]
        answers = [only(replies)["outputs"]["generated_text"] for replies in await asyncio.gather(*tasks)]
    assert answers == [f"SLOW 1 NUMBER {n}" for n in range(3)]
    assert box.handoffs.counters["refused"] >= 1


async def test_d2_d3_an_answer_that_would_be_late_is_not_sent_and_the_gateway_goes_on(rig: Rig) -> None:
    box = rig.box()
    async with running(box):
        with pytest.raises(HandoffError):
            await box.ask(text("slow 3 too late"), within_s=1.0)
        assert only(await box.ask(text("next"))) == {"outputs": {"generated_text": "NEXT"}}
        await asyncio.sleep(2.5)
        assert box.handoffs.counters == {"taken": 1}


async def test_two_gateways_share_the_work(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    second = Gateway(tmp_path / "second", rig.broker, rig.endpoint, rig.ca, rig.pool)
    second.start()
    box = rig.box()
    async with running(box):
        for start in range(0, 12, 4):
            tasks = [box.ask(text(f"slow 0.3 {start + n}")) for n in range(4)]
            await asyncio.gather(*tasks)
        assert box.handoffs.counters["refused"] == 0
    second.close()
    assert len(rig.endpoint.asked) == 12


async def test_b21_a_gateway_that_is_told_to_stop_finishes_and_leaves_with_0(rig: Rig) -> None:
    box = rig.box()
    async with running(box):
        task = box.ask(text("slow 2 before the end"))
        await until(lambda: rig.endpoint.asked)
        assert rig.gateway.process is not None
        rig.gateway.process.send_signal(signal.SIGTERM)
        assert only(await task) == {"outputs": {"generated_text": "SLOW 2 BEFORE THE END"}}
        assert await asyncio.to_thread(rig.gateway.process.wait, 10) == 0
    assert rig.gateway.told().startswith("STOPPING=1")


async def test_b21_a_draining_gateway_leaves_new_work_to_the_others_and_says_goodbye(rig: Rig, tmp_path: Path) -> None:
    box = rig.box()
    async with running(box):
        task = box.ask(text("slow 3 before the end"))
        await until(lambda: rig.endpoint.asked)
        (tmp_path / "second").mkdir()
        second = Gateway(tmp_path / "second", rig.broker, rig.endpoint, rig.ca, rig.pool)
        await asyncio.to_thread(second.start)
        assert rig.gateway.process is not None
        rig.gateway.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(rig.gateway.told)
        await asyncio.sleep(0.2)
        for number in range(6):
            assert only(await box.ask(text(f"next {number}"))) == {"outputs": {"generated_text": f"NEXT {number}"}}
        assert not task.done()
        assert only(await task) == {"outputs": {"generated_text": "SLOW 3 BEFORE THE END"}}
        assert await asyncio.to_thread(rig.gateway.process.wait, 10) == 0
        assert box.handoffs.counters["refused"] == 0
    second.close()
    told = (tmp_path / "log").read_text()
    assert re.search(r"Client spillway-gateway-\S+ disconnected\.", told), told


async def test_messages_that_are_no_hand_offs_are_dropped_and_the_gateway_goes_on(rig: Rig) -> None:
    box = rig.box()
    spy, seen = rig.spy()
    async with running(box, spy):
        for payload in (b"", b"garbage", b"SPW1\xff\xff", os.urandom(100_000), b"SPW1" + os.urandom(200_000)):
            await spy.publish("spillway/handoff/default/assistant", payload, qos=1)
            await spy.publish("spillway/handoff/default/Assistant", payload, qos=0)
        assert only(await box.ask(text("next"))) == {"outputs": {"generated_text": "NEXT"}}
        sent = next(m for m in seen if m.payload[:4] == b"SPW1" and len(m.payload) < 5000 and len(m.payload) > 6)
        assert parse_handoff(sent.payload).header.device == "pi-7"
