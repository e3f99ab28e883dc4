"""Bindings as a house has them: real sensors' topics on a real broker, the agent's own process, real models."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from tests.fakes.onnx_graph import graph_of, model_of, node, value_info
from tests.fakes.samples import INPUTS
from tests.support.agent_process import AgentProcess
from tests.support.asker import BASE, Asker
from tests.support.fleet import Fleet
from tests.support.mosquitto import Mosquitto
from tests.support.waiting import until

MONTHS = [24.64, 25.85, 27.08, 28.12, 28.82, 29.24, 28.45, 27.36, 25.19, 23.61, 22.27, 21.31]
BINDINGS = """
[[bindings]]
name = "sea"
topic = "buoy/+/month"
model = "sea-temperature"
take = "$.celsius"
window = {last = 12}
publish = "forecast/{1}/sea"
retain = true
qos = 1

[[bindings]]
name = "meter"
topic = "camera/#"
model = "digits"
take = "image"
publish = "meter/{1}"
on = "change"

[[bindings]]
name = "sure"
topic = "camera/porch/digit"
model = "digits"
take = "image"
publish = "sure/{model}"
on = "above"
threshold = 0.5
answer = "$.outputs[0]"

[[bindings]]
name = "tally"
topic = "count/+"
model = "tally"
take = "number"
tensor = {name = "x", shape = [1, 1]}
state = {h_in = {from = "h_out", shape = [1, 1]}}
publish = "tally/{1}"
"""


def tally(folder: Path) -> Path:
    """Write a recurrent model: its state is the sum of all that it was given."""
    folder.mkdir()
    graph = graph_of(
        [node("Add", ["x", "h_in"], ["h_out"]), node("Mul", ["h_out", "h_out"], ["y"])],
        [value_info("x", [1, 1]), value_info("h_in", [1, 1])],
        [value_info("y", [1, 1]), value_info("h_out", [1, 1])],
    )
    (folder / "model.onnx").write_bytes(model_of(graph))
    (folder / "spillway.toml").write_text('task = "tensors"\nformat = "onnx"\n')
    return folder


class House:
    """Sensors and a listener to everything, on MQTT 3.1.1 as most sensors speak it."""

    def __init__(self, port: int) -> None:
        self.heard: list[tuple[str, bytes, bool]] = []
        self._ready = threading.Event()
        self._client = paho.Client(CallbackAPIVersion.VERSION2, "house", protocol=MQTTProtocolVersion.MQTTv311)
        self._client.on_connect = lambda client, *_: client.subscribe([("#", 1)])
        self._client.on_subscribe = lambda *_: self._ready.set()
        self._client.on_message = lambda _c, _u, message: self.heard.append(
            (message.topic, bytes(message.payload), message.retain)
        )
        self._client.connect("127.0.0.1", port)

    def __enter__(self) -> Self:
        self._client.loop_start()
        assert self._ready.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def send(self, topic: str, *payloads: Any, retain: bool = False) -> None:
        for payload in payloads:
            raw = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
            self._client.publish(topic, raw, 1, retain)

    def on(self, topic: str) -> list[bytes]:
        return [payload for where, payload, _ in self.heard if where == topic]

    def wait(self, topic: str, number: int = 1) -> list[bytes]:
        until(lambda: len(self.on(topic)) >= number, told=lambda: str(self.heard[-5:]))
        return self.on(topic)


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path_factory.mktemp("broker")) as started:
        yield started


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory, broker: Mosquitto, fleet: Fleet) -> Iterator[AgentProcess]:
    folder = tmp_path_factory.mktemp("house")
    fleet.publish("tally", folder=tally(folder / "tally"))
    fleet.deploy("house", "tally=1", "digits=1", "sea-temperature=1")
    with House(broker.port) as house:
        house.send("camera/porch/digit", (INPUTS / "digit-7.png").read_bytes(), retain=True)
    with AgentProcess(folder / "agent", broker.port, fleet, BINDINGS, group="house") as started:
        with Asker(broker.port, "first") as first:
            first.await_serving("tally", "digits", "sea-temperature")
        yield started
        assert started.stop() == 0
        assert "Traceback" not in started.log.read_text()


@pytest.fixture
def house(broker: Mosquitto, agent: AgentProcess) -> Iterator[House]:
    with House(broker.port) as started:
        yield started


def test_a_sensors_months_become_a_forecast_also_over_a_restart(
    house: House, agent: AgentProcess, broker: Mosquitto
) -> None:
    with Asker(broker.port, "direct") as asker:
        direct = asker.answer("sea-temperature", json.dumps({"inputs": MONTHS}).encode()).json["outputs"]
    house.send("buoy/north/month", *({"celsius": value} for value in MONTHS[:8]))
    house.send("buoy/south/month", *({"celsius": value + 0.5} for value in MONTHS))
    house.wait("forecast/south/sea")
    house.send("buoy/north/month", {"celsius": "unavailable"})
    assert house.on("forecast/north/sea") == []
    assert agent.stop() == 0
    agent.start()
    with Asker(broker.port, "again") as again:
        again.await_serving("sea-temperature")
    house.send("buoy/north/month", *({"celsius": value} for value in MONTHS[8:]))
    (told,) = house.wait("forecast/north/sea")
    assert float(told) == pytest.approx(direct, abs=1e-4)


def test_pictures_on_a_topic_become_labels_once_for_each_change_and_never_twice(house: House) -> None:
    before = len(house.on("meter/porch/digit"))
    for digit in (3, 3, 5):
        house.send("camera/porch/digit", (INPUTS / f"digit-{digit}.png").read_bytes())
    assert house.wait("meter/porch/digit", before + 2)[before:] == [b"3", b"5"]
    (sure,) = house.wait("sure/digits")
    assert json.loads(sure)["label"] == "3"
    house.send("camera/porch/digit", b"no picture")
    house.send("camera/hall/digit", (INPUTS / "digit-8.png").read_bytes())
    assert house.wait("meter/hall/digit") == [b"8"]
    assert len(house.on("meter/porch/digit")) == before + 2


def test_a_recurrent_models_state_goes_on_from_message_to_message_each_sensor_its_own(house: House) -> None:
    house.send("count/a", 1, 2, 3)
    house.send("count/b", 10)
    assert [float(value) for value in house.wait("tally/a", 3)] == [1.0, 9.0, 36.0]
    assert [float(value) for value in house.wait("tally/b")] == [100.0]


def test_after_a_brokers_crash_the_window_goes_on_where_it_was(
    house: House, agent: AgentProcess, broker: Mosquitto
) -> None:
    house.send("buoy/east/month", *({"celsius": value} for value in MONTHS[:11]))
    house.wait("buoy/east/month", 11)
    broker.kill()
    broker.start()
    with Asker(broker.port, "after") as asker:
        asker.await_serving("sea-temperature")  # told anew on each connection, after the subscriptions

    def forecast() -> list[bytes]:
        if not house.on("forecast/east/sea"):
            house.send("buoy/east/month", {"celsius": MONTHS[11]})
            time.sleep(0.2)
        return house.on("forecast/east/sea")

    until(forecast, told=agent.log.read_text)


def test_what_became_of_the_messages_is_told_and_a_retained_one_was_left_alone(
    house: House, agent: AgentProcess
) -> None:
    house.send("count/a", "broken")
    told = json.loads(house.wait(f"{BASE}/bindings")[-1])
    assert told["meter"]["dropped"]["retained"] == 1
    assert b"7" not in house.on("meter/porch/digit")
    assert "not_a_number" in until(
        lambda: agent.log.read_text() if "binding tally" in agent.log.read_text() else "", told=agent.log.read_text
    )
