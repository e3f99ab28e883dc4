"""A box and two gateways over a network that loses, doubles, delays and reorders, on virtual time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest

from cloud_sync.errors import HandoffError
from cloud_sync.exchange import Reply
from cloud_sync.gateway.desk import Desk
from cloud_sync.gateway.opener import Opener
from cloud_sync.gateway.upstream import Piece
from cloud_sync.handoff import Handoffs
from cloud_sync.messages import Message
from cloud_sync.sealing import Content
from cloud_sync.wire import Topics
from models.request import Dialect, Request
from tests.fakes.certificates import NOW, TestCA, TestPool
from tests.fakes.link import MemoryBroker, MemoryLink
from tests.support.virtual_time import virtual_time

CA = TestCA()
BOX = CA.identity("pi-7")
POOL = TestPool()
TOPICS = Topics("spillway", "pi-7")


class Sampler:
    """A large model that never says the same twice, as those in the cloud do."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice
        self.answers: dict[bytes, set[str]] = {}
        self.asked = 0

    async def answer(self, request: Request, deadline_at: float) -> AsyncGenerator[Piece, None]:
        del deadline_at
        self.asked += 1
        words = [f"{request.body.decode()}-{self.asked}-{n};" for n in range(self.dice.randrange(1, 6))]
        self.answers.setdefault(request.body, set()).add("".join(words))
        for number, word in enumerate(words, 1):
            await asyncio.sleep(self.dice.expovariate(0.5))
            yield Piece(Content(body=word.encode(), content_type="text/plain"), final=number == len(words))


class Network:
    """Carries what is published, badly: `loss` and `doubling` are probabilities, `delay_s` a mean."""

    def __init__(self, dice: random.Random, loss: float, doubling: float, delay_s: float) -> None:
        self.dice = dice
        self.loss = loss
        self.doubling = doubling
        self.delay_s = delay_s
        self.lost = 0

    def badly(self, deliver: Callable[[Message], None]) -> Callable[[Message], None]:
        def later(message: Message) -> None:
            if self.dice.random() < self.loss:
                self.lost += 1
                return
            for _ in range(2 if self.dice.random() < self.doubling else 1):
                asyncio.get_running_loop().call_later(self.dice.expovariate(1 / self.delay_s), deliver, message)

        return later


class World:
    """One box and its gateways, around an in-memory broker."""

    def __init__(self, dice: random.Random, network: Network) -> None:
        self.loop = asyncio.get_running_loop()
        self.dice = dice
        self.network = network
        self.broker = MemoryBroker()
        self.model = Sampler(dice)
        self.tasks: set[asyncio.Task[Any]] = set()
        self.link = self.broker.link(network.badly(lambda message: self.handoffs.on_reply(message.payload)))
        self.handoffs = Handoffs(publish=self.publish, identity=BOX, topics=TOPICS, clock=self.loop.time)
        self.handoffs.set_pools([POOL.pool])
        self.link.subscribe(TOPICS.handoff_reply)
        self.link.connect()
        self.handoffs.connected = True
        self.start(self.handoffs.run())
        for _ in range(2):
            self.add_gateway()

    def publish(self, topic: str, payload: bytes) -> asyncio.Future[None]:
        return self.link.publish(topic, payload, qos=1)

    def start(self, work: Any) -> None:
        task = self.loop.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def add_gateway(self) -> MemoryLink:
        opener = Opener(Topics(), {"default": {"k1": POOL.private}}, CA.authority())

        async def settle(message: Message) -> None:
            await desk.settle(opener.open(message.topic, message.payload, NOW))
            link.acknowledge(message)

        link = self.broker.link(self.network.badly(lambda message: self.start(settle(message))), clean_start=True)
        desk = Desk(
            {"default": (self.model, 4)},
            publish=lambda topic, payload: link.publish(topic, payload, qos=1),
            topics=Topics(),
            clock=self.loop.time,
        )
        link.subscribe(Topics().handoff_filter("default"))
        link.connect()
        return link

    async def ask(self, number: int) -> list[Reply] | str:
        body = b"q%d" % number
        request = Request(model="m", content_type="text/plain", body=body, dialect=Dialect.HUGGINGFACE, stream=True)
        await asyncio.sleep(self.dice.uniform(0, 20))
        deadline_at = self.loop.time() + self.dice.uniform(5, 200)
        replies = []
        try:
            async for reply in self.handoffs.send(f"{number:032x}", request, "default", deadline_at):
                replies.append(reply)  # noqa: PERF401 - what came before an error is looked at too
        except HandoffError as error:
            return error.code
        return replies

    async def stop(self) -> None:
        for task in list(self.tasks):
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


@pytest.mark.parametrize("seed", range(12))
@virtual_time
async def test_d2_d7_every_asker_gets_one_whole_answer_of_one_gateway_or_is_told_that_none_came(seed: int) -> None:
    dice = random.Random(seed)
    network = Network(dice, loss=dice.choice([0.0, 0.1, 0.4]), doubling=dice.choice([0.0, 0.3]), delay_s=0.3)
    world = World(dice, network)
    outcomes = await asyncio.gather(*(world.ask(number) for number in range(20)))
    answered = 0
    for number, outcome in enumerate(outcomes):
        if isinstance(outcome, str):
            assert outcome == "deadline_exceeded"
            continue
        assert [reply.final for reply in outcome] == [False] * (len(outcome) - 1) + [True]
        if outcome[-1].status == "error":
            assert outcome[-1].code == "overloaded"
            continue
        answered += 1
        assert b"".join(reply.body for reply in outcome).decode() in world.model.answers[b"q%d" % number]
    assert answered >= 10, network.loss
    assert world.handoffs.counters["forged"] == 0
    await world.stop()


@virtual_time
async def test_on_a_good_network_each_request_is_paid_for_once() -> None:
    dice = random.Random(1)
    world = World(dice, Network(dice, loss=0.0, doubling=0.0, delay_s=0.05))
    world.dice = random.Random(2)
    outcomes = await asyncio.gather(*(world.ask(number) for number in range(6)))
    assert world.model.asked == 6
    assert not any(isinstance(outcome, str) for outcome in outcomes)
    assert world.handoffs.counters["sent_again"] == 0
    await world.stop()
