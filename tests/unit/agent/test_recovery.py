from __future__ import annotations

import asyncio
import time
from pathlib import Path

import msgspec
import pytest

from agent.recovery import recover, seed
from cloud_sync.exchange import Reply
from cloud_sync.outbox import Row
from models.request import Dialect, Request
from tests.fakes.cloud_door import MemoryCloud
from tests.fakes.worker import MemoryWorker, echo
from tests.support.box import turns
from tests.support.mqtt_box import REPLY, MqttBox, open_mqtt_box
from tests.support.virtual_time import virtual_time

POOL = '[models.digits]\npool = "gpu"\n'


def now_ms() -> int:
    return int(time.time() * 1e3)


def row(ident: str = "a" * 32, *, left_ms: int = 20_000, **facts: object) -> Row:
    at = now_ms()
    plain = Row(
        id=ident,
        place="local",
        model="digits",
        client="me",
        content_type="text/plain",
        dialect=Dialect.HUGGINGFACE,
        reply_topic=REPLY,
        stored_at_ms=at - 1000,
        deadline_at_ms=at + left_ms,
        body=b"before",
        correlation=b"c",
        key=ident.encode(),
    )
    return msgspec.structs.replace(plain, **facts)


async def taken_up(mqtt: MqttBox) -> None:
    await seed(mqtt.box.outbox, mqtt.box.service)
    await recover(mqtt.box.outbox, mqtt.box.service, mqtt.door, mqtt.box.clock)


async def left(mqtt: MqttBox) -> int:
    return len(await mqtt.box.outbox.rows())


@virtual_time
async def test_c2_what_was_stored_before_a_restart_is_answered_after_it(tmp_path: Path) -> None:
    async with open_mqtt_box(tmp_path) as mqtt:
        await mqtt.box.outbox.put(row())
        mqtt.box.serve(MemoryWorker(script=echo))
        await taken_up(mqtt)
        (reply,) = await mqtt.answered()
        assert (reply.topic, reply.correlation, reply.json["outputs"]) == (REPLY, b"c", "before")
        assert await left(mqtt) == 0


@virtual_time
async def test_c2_what_waited_for_its_model_still_waits_until_the_model_is_back(tmp_path: Path) -> None:
    async with open_mqtt_box(tmp_path) as mqtt:
        await mqtt.box.outbox.put(row())
        worker = mqtt.box.serve(MemoryWorker())
        worker.die()
        mqtt.box.service.queues["digits"].starting = True
        await taken_up(mqtt)
        await asyncio.sleep(3)
        assert mqtt.heard == []
        mqtt.box.serve(MemoryWorker(script=echo))
        await mqtt.answered()
        assert await left(mqtt) == 0


@virtual_time
async def test_d7_an_answer_that_was_decided_before_the_restart_is_sent_and_not_made_again(tmp_path: Path) -> None:
    async with open_mqtt_box(tmp_path) as mqtt:
        await mqtt.box.outbox.put(row())
        worker = mqtt.box.serve(MemoryWorker())
        await taken_up(mqtt)
        await turns(200)
        await asyncio.sleep(0.1)
        mqtt.link.drop()
        worker.answer(worker.asks[0], b'{"outputs":"the one answer"}')
        await asyncio.sleep(0.1)
    async with open_mqtt_box(tmp_path) as mqtt:
        worker = mqtt.box.serve(MemoryWorker(script=echo))
        await taken_up(mqtt)
        (reply,) = await mqtt.answered()
        assert reply.json["outputs"] == "the one answer"
        assert worker.asks == []
        assert await left(mqtt) == 0


@virtual_time
async def test_who_asks_again_after_a_restart_gets_the_answer_from_before_it(tmp_path: Path) -> None:
    async with open_mqtt_box(tmp_path) as mqtt:
        worker = mqtt.box.serve(MemoryWorker())
        await mqtt.ask(b"x", correlation=b"c")
        await asyncio.sleep(2)
        worker.answer(worker.asks[0], b'{"outputs":"before"}')
        (before,) = await mqtt.answered()
    async with open_mqtt_box(tmp_path) as mqtt:
        worker = mqtt.box.serve(MemoryWorker(script=echo))
        await taken_up(mqtt)
        await mqtt.ask(b"x", correlation=b"c")
        (again,) = await mqtt.answered()
        assert again == before
        assert worker.asks == []


@virtual_time
async def test_who_asks_again_before_its_row_is_taken_up_gets_one_answer(tmp_path: Path) -> None:
    async with open_mqtt_box(tmp_path) as mqtt:
        worker = mqtt.box.serve(MemoryWorker())
        await mqtt.ask(b"x", correlation=b"c")
        await asyncio.sleep(2)
        assert await left(mqtt) == 1
        worker.stopping = True
        mqtt.door.draining = True
        await mqtt.box.service.drain(0)
    async with open_mqtt_box(tmp_path) as mqtt:
        worker = mqtt.box.serve(MemoryWorker())
        await mqtt.ask(b"x", correlation=b"c")
        await taken_up(mqtt)
        await turns()
        worker.answer(worker.asks[0])
        await mqtt.answered(1)
        assert len(worker.asks) == 1
        assert await left(mqtt) == 0
        await asyncio.sleep(5)
        assert await left(mqtt) == 0


@virtual_time
async def test_a_request_whose_deadline_passed_while_the_box_was_off_gets_its_error(tmp_path: Path) -> None:
    async with open_mqtt_box(tmp_path) as mqtt:
        await mqtt.box.outbox.put(row(left_ms=-5))
        worker = mqtt.box.serve(MemoryWorker(script=echo))
        await taken_up(mqtt)
        (reply,) = await mqtt.answered()
        assert reply.code == "deadline_exceeded"
        assert worker.asks == []
        assert await left(mqtt) == 0


@virtual_time
async def test_b16_a_clock_that_went_back_stretches_no_deadline(tmp_path: Path) -> None:
    async with open_mqtt_box(tmp_path) as mqtt:
        future = now_ms() + 3_600_000
        await mqtt.box.outbox.put(row(stored_at_ms=future, deadline_at_ms=future + 4000))
        mqtt.box.serve(MemoryWorker())
        started = mqtt.box.clock()
        await taken_up(mqtt)
        (reply,) = await mqtt.answered()
        assert reply.code == "deadline_exceeded"
        assert mqtt.box.clock() - started == pytest.approx(4, abs=0.2)


@virtual_time
async def test_d7_a_hand_off_goes_on_under_its_id(tmp_path: Path) -> None:
    def answer(_request: Request) -> list[Reply]:
        return [Reply(status="ok", final=True, body=b'{"outputs":"from the cloud"}')]

    cloud = MemoryCloud(answer)
    async with open_mqtt_box(tmp_path, POOL, cloud=cloud) as mqtt:
        await mqtt.box.outbox.put(row(place="cloud", pool="gpu", reason="oversized"))
        worker = mqtt.box.serve(MemoryWorker(script=echo))
        await taken_up(mqtt)
        (reply,) = await mqtt.answered()
        assert [(sent.ident, sent.pool, sent.request.body) for sent in cloud.sent] == [("a" * 32, "gpu", b"before")]
        assert (reply.facts["route"], reply.facts["reason"]) == ("cloud", "oversized")
        assert worker.asks == []
        assert await left(mqtt) == 0


@virtual_time
async def test_b2_a_request_whose_body_the_disk_lost_gets_an_error(tmp_path: Path) -> None:
    async with open_mqtt_box(tmp_path) as mqtt:
        await mqtt.box.outbox.put(row())
        await mqtt.box.database.run(lambda connection: connection.execute("UPDATE outbox SET body = x'0000000001'"))
        mqtt.box.serve(MemoryWorker(script=echo))
        await taken_up(mqtt)
        (reply,) = await mqtt.answered()
        assert reply.code == "internal"
        assert await left(mqtt) == 0


@virtual_time
async def test_more_rows_than_the_box_may_hold_are_taken_up_as_room_comes(tmp_path: Path) -> None:
    async with open_mqtt_box(tmp_path, "[limits]\nmax_requests = 5") as mqtt:
        for number in range(30):
            await mqtt.box.outbox.put(row(f"{number:032x}"))
        mqtt.box.serve(MemoryWorker(script=echo))
        await taken_up(mqtt)
        replies = await mqtt.answered(30)
        assert {reply.facts["status"] for reply in replies} == {"ok"}
        assert await left(mqtt) == 0


@virtual_time
async def test_a_row_keeps_what_its_asker_wished(tmp_path: Path) -> None:
    async with open_mqtt_box(tmp_path, POOL, cloud=MemoryCloud()) as mqtt:
        wished = row(priority=9, local_only=True, stream=True, qos=0)
        await mqtt.box.outbox.put(msgspec.structs.replace(wished, enveloped=True, envelope_id="q-1", correlation=None))
        worker = mqtt.box.serve(MemoryWorker(script=echo))
        await taken_up(mqtt)
        (reply,) = await mqtt.answered()
        request = worker.asks[0].request
        assert (request.priority, request.local_only, request.stream) == (9, True, True)
        facts = reply.json["spillway"]
        assert isinstance(facts, dict)
        assert (facts["id"], reply.qos, reply.correlation) == ("q-1", 0, None)
