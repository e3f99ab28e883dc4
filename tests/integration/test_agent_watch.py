"""What a box does about a version that passed its trial and does badly afterwards; real programs, a real broker."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.onnx_graph import graph_of, model_of, node, not_a_number, value_info
from tests.support.agent_process import AgentProcess
from tests.support.asker import BASE, Asker, Reply
from tests.support.fleet import Fleet
from tests.support.mosquitto import Mosquitto
from tests.support.waiting import until

GOLDEN = """
task = "tensors"
format = "onnx"
[[golden]]
content_type = "application/json"
tolerance = 0.001
json = {inputs = [{name = "x", shape = [1, 1], datatype = "FP32", data = [1.0]}]}
"""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    """Return a fleet whose `scale` takes absolute values in version 1, and logarithms in version 2."""
    folder = tmp_path_factory.mktemp("watch")
    row: list[int | str] = ["batch", 1]
    absolute = graph_of([node("Abs", ["x"], ["y"])], [value_info("x", row)], [value_info("y", row)])
    fleet = Fleet(folder)
    for version, model in (("1", model_of(absolute)), ("2", not_a_number())):
        (folder / version).mkdir()
        (folder / version / "model.onnx").write_bytes(model)
        (folder / version / "spillway.toml").write_text(GOLDEN)
        fleet.publish("scale", version, folder / version)
    fleet.deploy("watch", "scale=1")
    return fleet


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path / "broker") as started:
        yield started


@pytest.fixture
def asker(broker: Mosquitto) -> Iterator[Asker]:
    with Asker(broker.port) as started:
        yield started


@pytest.fixture
def agent(tmp_path: Path, broker: Mosquitto, asker: Asker, fleet: Fleet) -> Iterator[AgentProcess]:
    fleet.run("deploy", "watch", "scale=1")
    agent = AgentProcess(tmp_path / "agent", broker.port, fleet, group="watch")
    agent.config.write_text(agent.config.read_text().replace("root =", "look_every_s = 1\nroot ="))
    agent.start()
    asker.await_serving("scale")
    yield agent
    agent.kill()


def ask(asker: Asker, value: float) -> Reply:
    body = {"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [value]}]}
    return asker.answer("scale", json.dumps(body).encode())


def told(asker: Asker) -> dict[str, str]:
    """Return what the box tells of the model."""
    report: dict[str, str] = json.loads(asker.retained.get(f"{BASE}/models", b"{}")).get("scale", {})
    return report


def test_a25_a_version_that_fails_in_use_is_rolled_back_by_itself_and_tried_again_only_when_admins_say_so(
    agent: AgentProcess, asker: Asker, fleet: Fleet
) -> None:
    for _ in range(30):
        assert ask(asker, -2.0).facts["model"] == "scale@1"
    fleet.deploy("watch", "scale=2")
    until(lambda: told(asker).get("version") == "2", told=agent.log.read_text)
    replies = [ask(asker, -2.0) for _ in range(15)]
    assert str(replies[0].code).startswith("model_failed")
    until(lambda: told(asker).get("version") == "1", told=agent.log.read_text)
    assert (told(asker)["state"], told(asker)["target"], told(asker)["code"]) == ("serving", "2", "rolled_back")
    assert "answers failed; of the version before 0.0% of 30" in told(asker)["message"]
    assert ask(asker, -2.0).facts["model"] == "scale@1"
    fleet.deploy("watch", "scale=2")
    fleet.deploy("watch", "scale=1")
    until(lambda: "target" not in told(asker), told=agent.log.read_text)
    fleet.deploy("watch", "scale=2")
    until(lambda: told(asker).get("version") == "2", told=agent.log.read_text)
    assert agent.log.read_text().count("scale@2 serves") == 2


def test_a26_an_agent_that_dies_again_and_again_after_an_activation_goes_back_at_its_third_start(
    agent: AgentProcess, asker: Asker, fleet: Fleet
) -> None:
    fleet.deploy("watch", "scale=2")
    until(lambda: told(asker).get("version") == "2", told=agent.log.read_text)
    for _ in range(3):
        agent.kill()
        until(lambda: asker.retained[f"{BASE}/status"] == b"offline")
        agent.start()
    until(lambda: told(asker).get("version") == "1", told=agent.log.read_text)
    assert told(asker)["code"] == "rolled_back"
    assert told(asker)["message"].startswith("agent: it ended several times in a row")
    assert ask(asker, -2.0).facts["model"] == "scale@1"
