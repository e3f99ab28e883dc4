"""Streams through the whole box: broker, agent, worker."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator

import pytest

from tests.fakes.samples import MODELS
from tests.support.agent_process import AgentProcess
from tests.support.asker import Asker
from tests.support.fleet import Fleet
from tests.support.mosquitto import Mosquitto
from tests.support.waiting import until

GROUP = "writers"


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[AgentProcess, int]]:
    """Run an agent with a chat model that knows no end; return it and its broker's port."""
    folder = tmp_path_factory.mktemp("writers")
    endless = folder / "endless"
    shutil.copytree(MODELS / "assistant", endless)
    config = json.loads((endless / "genai_config.json").read_text())
    config["model"]["eos_token_id"] = 0
    (endless / "genai_config.json").write_text(json.dumps(config))
    fleet = Fleet(folder)
    fleet.publish("endless", folder=endless)
    fleet.deploy(GROUP, "endless=1")
    with (
        Mosquitto(folder / "broker") as broker,
        AgentProcess(folder / "agent", broker.port, fleet, group=GROUP) as agent,
    ):
        yield agent, broker.port


def chat(**options: object) -> bytes:
    body = {"messages": [{"role": "user", "content": "What does ls do?"}], "temperature": 0, **options}
    return json.dumps(body).encode()


def test_a_vanished_asker_and_sixteen_others_each_get_their_own_whole_stream(box: tuple[AgentProcess, int]) -> None:
    _, port = box
    with Asker(port) as asker:
        asker.await_serving("endless")
        with Asker(port, "gone") as gone:
            gone.ask("endless", chat(max_tokens=200, stream=True))
        keys = [asker.ask("endless", chat(max_tokens=20 + at, stream=True)) for at in range(16)]
        for key in keys:
            final = asker.final(key)
            replies = asker.replies[key]
            assert [int(reply.facts["sequence"]) for reply in replies] == list(range(len(replies)))
            assert final.facts["status"] != "error", final.body
            assert final.json["choices"][0]["finish_reason"] == "length"


def test_a_worker_killed_in_the_middle_of_a_stream_is_an_error_and_the_next_asker_is_answered(
    box: tuple[AgentProcess, int],
) -> None:
    agent, port = box
    with Asker(port) as asker:
        asker.await_serving("endless")
        (worker,) = agent.workers()
        key = asker.ask("endless", chat(max_tokens=200, stream=True))
        until(lambda: len(asker.replies[key]) >= 60)
        worker.kill()
        final = asker.final(key)
        told = asker.replies[key]
        assert [int(reply.facts["sequence"]) for reply in told] == list(range(len(told)))
        if final.facts["status"] == "error":  # else the kill came too late for this machine's speed
            assert final.json["error"]["code"] == "model_failed"
            assert "worker ended" in final.json["error"]["message"]
        until(lambda: asker.state("endless") == "serving")
        answer = asker.answer("endless", chat(max_tokens=3))
        assert answer.json["usage"]["completion_tokens"] == 3
        assert [process.pid for process in agent.workers()] != [worker.pid]
