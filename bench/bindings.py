"""What a sensor's message costs the event loop: read, joined, put into a window, and asked where it is due.

`make bench-bindings`: the agent's own `Bindings`, service and outbox in this process; the broker and the worker are the
tests' twins, so that nothing but the agent's share is measured. Microseconds of processor time for one message, the
median of several rounds that take turns.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import msgspec  # noqa: E402

from agent.bindings import Bindings  # noqa: E402
from agent.mqtt import MqttDoor  # noqa: E402
from cloud_sync.messages import Details, Message  # noqa: E402
from models.channel import Ask, Piece  # noqa: E402
from tests.fakes.link import MemoryBroker  # noqa: E402
from tests.fakes.worker import MemoryWorker, version  # noqa: E402
from tests.support.box import open_box  # noqa: E402

ROUNDS = 7
MESSAGES = 2000
BINDING = """
[[bindings]]
name = "{name}"
topic = "{topic}"
model = "sea"
publish = "out/{name}/{{1}}"
{more}
"""
PAYLOAD = b'{"temperature": 21.53, "humidity": 48.2, "battery": 100, "linkquality": 120, "voltage": 3000}'
CASES = {
    "a number into a window of 24, not due": ('take = "number"\nwindow = {last = 24, every = 1000000}', b"21.53", 1),
    "a path into a zigbee message, window": (
        'take = "$.temperature"\nwindow = {last = 24, every = 1000000}',
        PAYLOAD,
        1,
    ),
    "two columns, window of 60 s": (
        'columns = [{take = "$.temperature"}, {take = "$.humidity"}]\nwindow = {seconds = 60, every = 1000000}',
        PAYLOAD,
        1,
    ),
    "a number, 20 bindings that read other topics": (
        'take = "number"\nwindow = {last = 24, every = 1000000}',
        b"21.53",
        20,
    ),
    "a number that asks, is answered and published": ('take = "number"\nmax_waiting = 10000', b"21.53", 1),
}


def answer(ask: Ask) -> list[Piece]:
    return [Piece(ticket=ask.ticket, body=b'{"outputs":21.5}', compute_ms=0.1)]


async def measure(more: str, payload: bytes, others: int) -> float:
    """Return the microseconds of processor time that one message takes."""
    config = BINDING.format(name="one", topic="sensors/+/state", more=more)
    config += "".join(
        BINDING.format(name=f"b{at}", topic=f"other{at}/+", more='take = "number"') for at in range(others - 1)
    )
    with tempfile.TemporaryDirectory() as folder:
        async with open_box(Path(folder), config) as box:
            box.serve(MemoryWorker(version("sea"), script=answer))
            door = MqttDoor(box.config, box.service, box.clock)
            bindings = Bindings(box.config, box.service, door, clock=box.clock, file=Path(folder) / "b")
            link = MemoryBroker().link(bindings.receive)
            await bindings.load()
            bindings.attach(link)  # type: ignore[arg-type]
            link.connect()
            messages = [message(at, payload) for at in range(MESSAGES)]
            started = time.process_time()
            for at, one in enumerate(messages):
                bindings.receive(one)
                if at % 20 == 19:
                    await asyncio.sleep(0)
            counts = bindings.report()["one"]
            asking = "every" not in more
            while asking and counts.published < MESSAGES:  # noqa: ASYNC110 - the turns are what is measured
                await asyncio.sleep(0)
            spent = time.process_time() - started
            assert counts.received == MESSAGES, msgspec.to_builtins(counts)
            assert not counts.failed, counts
            return spent / MESSAGES * 1e6


def message(at: int, payload: bytes) -> Message:
    topic = f"sensors/room{at % 50}/state"
    return Message(
        topic=topic, payload=payload, qos=0, retain=False, duplicate=False, mid=0, connection=1, details=Details()
    )


def main() -> None:
    told: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(ROUNDS):
        for name, case in CASES.items():
            told[name].append(asyncio.run(measure(*case)))
    print("| a message | µs of the agent |\n|---|---|")
    for name, spent in told.items():
        print(f"| {name} | {statistics.median(spent):.0f} |")


if __name__ == "__main__":
    main()
