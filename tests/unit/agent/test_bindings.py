from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec

from agent.bindings import Bindings
from agent.mqtt import MqttDoor
from cloud_sync.messages import Details, Message
from models.channel import Ask, Piece
from tests.fakes.cloud_door import MemoryCloud
from tests.fakes.link import MemoryBroker
from tests.fakes.worker import MemoryWorker, version
from tests.support.box import Box, open_box, turns
from tests.support.virtual_time import virtual_time

SEA = """
[[bindings]]
name = "sea"
topic = "sensors/+/temperature"
model = "sea"
take = "number"
publish = "forecast/{1}"
"""


def total(ask: Ask) -> list[Piece]:
    """Answer a list of numbers with their sum."""
    inputs = msgspec.json.decode(ask.request.body)["inputs"]
    return [Piece(ticket=ask.ticket, body=msgspec.json.encode({"outputs": float(sum(inputs))}), compute_ms=5.0)]


class Home:
    """A box with bindings on a broker in memory, sensors, and everything that was published on other topics."""

    def __init__(self, box: Box, file: Path) -> None:
        self.box = box
        self.broker = MemoryBroker()
        self.door = MqttDoor(box.config, box.service, box.clock)
        self.bindings = Bindings(box.config, box.service, self.door, clock=box.clock, file=file)
        self.link = self.broker.link(self.bindings.receive)
        self.sensor = self.broker.link(self.hear, clean_start=True)
        self.heard: list[tuple[str, str]] = []

    def hear(self, message: Message) -> None:
        self.heard.append((message.topic, message.payload.decode()))

    async def open(self) -> Home:
        await self.bindings.load()
        for pattern in ("forecast/#", "alarm/#", "spillway/kitchen/reply/#"):
            self.sensor.subscribe(pattern, 1)
        self.sensor.connect()
        self.door.attach(self.link)  # type: ignore[arg-type]
        self.bindings.attach(self.link)  # type: ignore[arg-type]
        self.link.connect()
        return self

    async def send(self, topic: str, *payloads: object, retain: bool = False) -> None:
        for payload in payloads:
            self.sensor.publish(topic, str(payload).encode(), qos=1, retain=retain)
        await turns(30)

    def counts(self, name: str = "sea") -> dict[str, Any]:
        told: dict[str, Any] = msgspec.to_builtins(self.bindings.report()[name])
        return told


@contextlib.asynccontextmanager
async def home(
    folder: Path, addition: str = SEA, *, cloud: MemoryCloud | None = None, **worker: Any
) -> AsyncIterator[Home]:
    async with open_box(folder, addition, cloud=cloud) as box:
        box.serve(MemoryWorker(version("sea"), **({"script": total} | worker)))
        yield await Home(box, folder / "bindings.state").open()


@virtual_time
async def test_a_sensors_message_becomes_a_request_and_the_answer_a_message(tmp_path: Path) -> None:
    async with home(tmp_path) as one:
        await one.send("sensors/hall/temperature", 20, 21)
        assert one.heard == [("forecast/hall", "20.0"), ("forecast/hall", "21.0")]
        assert one.link._unacknowledged == []
        counts = one.counts()
        assert {name: counts[name] for name in ("received", "topics", "asked", "answered", "published")} == {
            "received": 2,
            "topics": 1,
            "asked": 2,
            "answered": 2,
            "published": 2,
        }


@virtual_time
async def test_requests_go_the_way_of_all_others_under_the_bindings_own_name(tmp_path: Path) -> None:
    async with home(tmp_path, SEA + "priority = 2\nlocal_only = true\ndeadline_ms = 700\n", script=None) as one:
        await one.send("sensors/hall/temperature", 20)
        (ticket,) = one.box.service.intake.tickets
        request = ticket.request
        assert (request.client, request.priority, request.local_only) == ("binding.sea", 2, True)
        assert ticket.deadline_at == ticket.received_at + 0.7
        await asyncio.sleep(1)
        assert one.counts()["failed"] == {"deadline_exceeded": 1}
        assert one.counts()["last_problem"] == "deadline_exceeded: no answer within 700 ms"


@virtual_time
async def test_what_the_box_cannot_answer_is_handed_off_unless_it_may_not_leave(tmp_path: Path) -> None:
    pool = '[models.large]\npool = "gpu"\n'
    far = SEA.replace('model = "sea"', 'model = "large"')
    cloud = MemoryCloud()
    async with home(tmp_path, far + pool, cloud=cloud) as one:
        await one.send("sensors/a/temperature", 21)
        assert one.heard == [("forecast/a", '{"inputs":[21.0]}')]
        assert cloud.sent[0].request.client == "binding.sea"
    async with home(tmp_path, far + "local_only = true\n" + pool, cloud=cloud) as one:
        await one.send("sensors/a/temperature", 21)
        assert one.counts()["failed"] == {"model_not_found": 1}
        assert len(cloud.sent) == 1


@virtual_time
async def test_each_sensor_has_its_own_window(tmp_path: Path) -> None:
    async with home(tmp_path, SEA + "window = {last = 2}\n") as one:
        await one.send("sensors/a/temperature", 1)
        await one.send("sensors/b/temperature", 10)
        await one.send("sensors/a/temperature", 2)
        await one.send("sensors/b/temperature", 20)
        assert one.heard == [("forecast/a", "3.0"), ("forecast/b", "30.0")]


@virtual_time
async def test_over_its_number_of_topics_a_binding_forgets_the_one_that_was_silent_for_longest(tmp_path: Path) -> None:
    async with home(tmp_path, SEA + "window = {last = 2}\nmax_topics = 2\n") as one:
        for name in ("a", "b", "a", "c"):
            await one.send(f"sensors/{name}/temperature", 1)
        assert [source.parts for source in one.bindings._runners[0].sources.values()] == [("a",), ("c",)]
        assert one.counts()["dropped"] == {"forgotten": 1}


@virtual_time
async def test_a_burst_drops_the_oldest_of_the_longest_queue_and_counts_it(tmp_path: Path) -> None:
    async with home(tmp_path, SEA + "max_waiting = 3\n", script=None) as one:
        await one.send("sensors/b/temperature", 100, 200)
        await one.send("sensors/a/temperature", 1, 2, 3, 4, 5)
        assert one.counts()["dropped"] == {"burst": 2}
        worker = one.box.service.queues["sea"].worker
        assert isinstance(worker, MemoryWorker)
        worker.script = total
        for ask in list(worker.asks):
            (piece,) = total(ask)
            worker.answer(ask, piece.body)
        await turns(100)
        assert sorted(one.heard) == [
            ("forecast/a", "1.0"),
            ("forecast/a", "4.0"),
            ("forecast/a", "5.0"),
            ("forecast/b", "100.0"),
            ("forecast/b", "200.0"),
        ]


@virtual_time
async def test_one_sensors_answers_come_in_the_order_of_its_messages(tmp_path: Path) -> None:
    async with home(tmp_path, capacity=8) as one:
        await one.send("sensors/a/temperature", *range(20))
        await turns(200)
        assert one.heard == [("forecast/a", f"{number}.0") for number in range(20)]


@virtual_time
async def test_retained_messages_are_left_alone_or_used_once(tmp_path: Path) -> None:
    async with home(tmp_path) as one:
        one.link.take("sensors/a/temperature", b"1", 1, Details(), retain=True)
        await turns(30)
        assert one.heard == []
        assert one.counts()["dropped"] == {"retained": 1}
    async with home(tmp_path, SEA + 'retained = "use"\n') as one:
        for value in (b"1", b"2"):
            one.link.take("sensors/a/temperature", value, 1, Details(), retain=True)
            await turns(30)
        assert one.heard == [("forecast/a", "1.0")]


@virtual_time
async def test_what_cannot_be_read_or_is_over_the_bodys_bound_is_counted_and_acknowledged(tmp_path: Path) -> None:
    async with home(tmp_path, SEA + "[limits]\nmax_body_bytes = 10\n") as one:
        await one.send("sensors/a/temperature", "unknown", "1" * 11)
        assert one.counts()["dropped"] == {"not_a_number": 1, "too_large": 1}
        assert one.link._unacknowledged == []
        assert one.heard == []


@virtual_time
async def test_waiting_pictures_are_bounded_by_their_bytes_too(tmp_path: Path) -> None:
    camera = SEA.replace('"number"', '"image"') + "[limits]\nmax_request_bytes = 1000\n"
    async with home(tmp_path, camera, script=None) as one:
        picture = b"\x89PNG\r\n\x1a\n" + bytes(400)
        for _ in range(5):
            one.sensor.publish("sensors/a/temperature", picture, qos=1)
        await turns(30)
        assert one.counts()["dropped"] == {"burst": 2}


@virtual_time
async def test_a_message_that_comes_again_is_counted_once(tmp_path: Path) -> None:
    async with home(tmp_path, SEA + "window = {last = 2}\n") as one:

        def hear(payload: bytes, *, again: bool = False) -> None:
            message = Message(
                topic="sensors/a/temperature",
                payload=payload,
                qos=1,
                retain=False,
                duplicate=again,
                mid=7,
                connection=1,
                details=Details(),
            )
            one.bindings.receive(message)

        hear(b"1")
        hear(b"1", again=True)
        assert one.counts()["received"] == 1
        hear(b"2", again=True)
        hear(b"1")
        await turns(30)
        assert one.heard == [("forecast/a", "3.0"), ("forecast/a", "3.0")]
        assert one.counts()["received"] == 3


@virtual_time
async def test_a_model_that_is_not_there_is_an_error_that_is_counted_and_told(tmp_path: Path) -> None:
    async with home(tmp_path, SEA.replace('"sea"', '"other"', 2).replace('"other"', '"sea"', 1)) as one:
        await one.send("sensors/a/temperature", 1)
        assert one.counts()["failed"] == {"model_not_found": 1}
        assert one.counts()["last_problem"].startswith("model_not_found: ")


@virtual_time
async def test_two_bindings_read_one_message_and_the_doors_own_topics_stay_the_doors(tmp_path: Path) -> None:
    alarm = SEA.replace('"sea"', '"alarm"', 1).replace("forecast/{1}", "alarm/{1}") + 'on = "above"\nthreshold = 5\n'
    async with home(tmp_path, SEA + alarm) as one:
        await one.send("sensors/a/temperature", 4, 6)
        assert one.heard == [("forecast/a", "4.0"), ("forecast/a", "6.0"), ("alarm/a", "6.0")]
        await one.send("spillway/kitchen/infer/sea/me", '{"inputs": [3]}')
        assert one.heard[-1][0] == "spillway/kitchen/reply/me/sea"


@virtual_time
async def test_what_an_earlier_configuration_subscribed_to_is_taken_back(tmp_path: Path) -> None:
    async with home(tmp_path) as one:
        await one.send("sensors/a/temperature", 1)
        await one.bindings.save()
    async with open_box(tmp_path) as box:
        after = Home(box, tmp_path / "bindings.state")
        after.link.filters["sensors/+/temperature"] = 1  # as the broker's session still has it
        await after.open()
        assert "sensors/+/temperature" not in after.link.filters
        await after.bindings.save()
        assert not (tmp_path / "bindings.state").exists()


@virtual_time
async def test_however_many_waiting_requests_cannot_be_made_the_last_one_is_asked(tmp_path: Path) -> None:
    wide = SEA.replace('"number"', '"$.v"') + 'tensor = {name = "x", shape = [2]}\nmax_waiting = 5000\n'
    async with home(tmp_path, wide, script=None) as one:
        await one.send("sensors/a/temperature", '{"v": [1, 2]}', *['{"v": [1]}'] * 3000, '{"v": [3, 4]}')
        worker = one.box.service.queues["sea"].worker
        assert isinstance(worker, MemoryWorker)
        worker.answer(worker.asks[0], b'{"outputs": [{"name": "y", "shape": [1], "datatype": "FP32", "data": [1.0]}]}')
        await turns(30)
        assert one.counts()["dropped"] == {"wrong_shape": 3000}
        assert one.counts()["asked"] == 2


@virtual_time
async def test_messages_that_waited_at_the_broker_are_as_old_as_they_say(tmp_path: Path) -> None:
    timed = SEA.replace('"number"', '"$.v"') + 'time = "$.t"\nwindow = {seconds = 30}\nmax_age_s = 100\n'
    async with home(tmp_path, timed) as one:
        one.bindings._wall = lambda: 1000.0

        def said(value: int, at: float) -> str:
            return f'{{"v": {value}, "t": {at}}}'

        await one.send("sensors/a/temperature", said(9, 800), said(9, 2000), '{"v": 1, "t": "soon"}', '{"v": 1}')
        assert one.counts()["dropped"] == {"stale": 1, "ahead": 1, "not_a_time": 1, "missing": 1}
        await one.send("sensors/a/temperature", said(1, 960), said(2, 975), said(7, 970), said(4, 990))
        assert one.heard == [("forecast/a", "6.0")]
        assert one.counts()["dropped"]["out_of_order"] == 1


@virtual_time
async def test_windows_go_on_after_a_restart(tmp_path: Path) -> None:
    async with home(tmp_path, SEA + "window = {last = 3}\n") as one:
        await one.send("sensors/a/temperature", 1, 2)
        await one.bindings.save()
    async with home(tmp_path, SEA + "window = {last = 3}\n") as one:
        await one.send("sensors/a/temperature", 3)
        assert one.heard == [("forecast/a", "6.0")]


@virtual_time
async def test_a_box_that_drains_takes_no_new_message_and_asks_nothing_more(tmp_path: Path) -> None:
    async with home(tmp_path, script=None) as one:
        await one.send("sensors/a/temperature", 1, 2)
        one.door.draining = True
        await one.send("sensors/a/temperature", 3)
        await one.box.service.drain(0)
        await turns(30)
        assert one.counts()["received"] == 2
        assert one.counts()["failed"] == {"overloaded": 1}
        assert one.counts()["dropped"] == {"stopping": 1}


@virtual_time
async def test_the_counts_are_published_and_the_windows_kept_now_and_then(tmp_path: Path) -> None:
    async with home(tmp_path) as one:
        task = asyncio.create_task(one.bindings.run())
        await one.send("sensors/a/temperature", 1)
        await asyncio.sleep(11)
        await one.send("sensors/a/temperature", 1)
        await asyncio.sleep(1200)
        task.cancel()
        told = msgspec.json.decode(one.broker.retained["spillway/kitchen/bindings"].payload)
        assert told["sea"]["published"] == 2
        assert (tmp_path / "bindings.state").exists()


@virtual_time
async def test_answers_that_no_broker_takes_are_counted(tmp_path: Path) -> None:
    async with home(tmp_path, script=None) as one:
        await one.send("sensors/a/temperature", 1)
        worker = one.box.service.queues["sea"].worker
        assert isinstance(worker, MemoryWorker)
        one.link.drop()
        worker.answer(worker.asks[0], b'{"outputs": 1.0}')
        await turns(30)
        assert one.counts()["dropped"] == {"unpublished": 1}
