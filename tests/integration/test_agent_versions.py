"""From one signed version to the next on a running box: taken over, refused, kept through a restart, taken away."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fakes.samples import INPUTS, MODELS
from tests.support.agent_process import AgentProcess
from tests.support.asker import BASE, Asker
from tests.support.fleet import Fleet
from tests.support.mosquitto import Mosquitto
from tests.support.waiting import until

SEVEN = (INPUTS / "digit-7.png").read_bytes()

StartBox = Callable[[str], AgentProcess]


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    """Return a fleet with digits 1, a smaller digits 2, and a digits 3 that no box is quick enough for."""
    folder = tmp_path_factory.mktemp("versions")
    fleet = Fleet(folder)
    fleet.publish("digits", "1")
    fleet.publish("digits", "2", MODELS / "digits-small")
    hasty = shutil.copytree(MODELS / "digits", folder / "hasty")
    told = (hasty / "spillway.toml").read_text()
    (hasty / "spillway.toml").write_text(re.sub(r"p95_ms = \S+", "p95_ms = 0.0001", told))
    fleet.publish("digits", "3", hasty)
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
def start_box(tmp_path: Path, broker: Mosquitto, versions: Fleet, asker: Asker) -> Iterator[StartBox]:
    """Start a box of a group of its own that looks for news twice a second and serves digits 1."""
    made: list[AgentProcess] = []

    def start(group: str) -> AgentProcess:
        versions.deploy(group, "digits=1")
        agent = AgentProcess(tmp_path / "agent", broker.port, versions, group=group)
        agent.config.write_text(agent.config.read_text().replace("root =", "look_every_s = 1\nroot ="))
        made.append(agent)
        agent.start()
        asker.await_serving("digits")
        return agent

    yield start
    for agent in made:
        agent.kill()


def told(asker: Asker) -> dict[str, str]:
    """Return what the box tells of digits."""
    report: dict[str, str] = json.loads(asker.retained.get(f"{BASE}/models", b"{}")).get("digits", {})
    return report


def test_a_new_version_takes_over_under_load_and_no_asker_notices(
    start_box: StartBox, asker: Asker, versions: Fleet
) -> None:
    agent = start_box("takeover")
    versions.deploy("takeover", "digits=2")
    asked = []
    while not any(reply.facts["model"] == "digits@2" for replies in asker.replies.values() for reply in replies):
        asked.append(asker.ask("digits", SEVEN, user=(("deadline-ms", "5000"),)))
        time.sleep(0.005)
        assert len(asked) < 5000
    answers = [asker.final(correlation) for correlation in asked]
    assert {reply.json["outputs"][0]["label"] for reply in answers} == {"7"}
    models = [reply.facts["model"] for reply in answers]
    assert set(models) == {"digits@1", "digits@2"}
    assert models.count("digits@1") > 0
    assert told(asker)["version"] == "2"
    until(lambda: len(agent.workers()) == 1)


def test_a25_a_version_that_fails_its_trial_is_reported_and_the_old_one_serves_on_and_it_is_not_tried_again(
    start_box: StartBox, asker: Asker, versions: Fleet
) -> None:
    agent = start_box("hasty")
    versions.deploy("hasty", "digits=3")
    until(lambda: told(asker).get("code") == "trial_failed", told=agent.log.read_text)
    assert (told(asker)["state"], told(asker)["version"], told(asker)["target"]) == ("serving", "1", "3")
    assert asker.answer("digits", SEVEN).facts["model"] == "digits@1"
    assert agent.stop() == 0
    agent.start()
    until(lambda: told(asker).get("code") == "trial_failed")
    assert asker.answer("digits", SEVEN).facts["model"] == "digits@1"
    time.sleep(2.5)
    assert agent.log.read_text().count("failed its trial") == 1
    assert len(agent.workers()) == 1


def test_a_model_that_no_deployment_names_any_more_is_taken_away(
    start_box: StartBox, asker: Asker, versions: Fleet
) -> None:
    agent = start_box("leaving")
    versions.run("deploy", "leaving", "--remove", "digits")
    until(lambda: not told(asker), told=agent.log.read_text)
    assert asker.answer("digits", SEVEN).code == "model_not_found"
    until(lambda: not agent.workers())


def test_a_box_serves_its_version_again_after_a_restart_before_it_has_looked(
    start_box: StartBox, asker: Asker, versions: Fleet
) -> None:
    agent = start_box("restart")
    versions.deploy("restart", "digits=2")
    until(lambda: told(asker).get("version") == "2", told=agent.log.read_text)
    agent.kill()
    agent.config.write_text(agent.config.read_text().replace("file://", "file:///not-mounted"))
    agent.start()
    until(lambda: asker.retained[f"{BASE}/status"] == b"online")
    assert asker.answer("digits", SEVEN).facts["model"] == "digits@2"
