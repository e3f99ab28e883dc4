"""What must hold when something ends without a goodbye: the agent, its worker, its broker, its network."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fakes.samples import INPUTS
from tests.support.agent_process import AgentProcess
from tests.support.asker import BASE, Asker
from tests.support.fleet import LONE, Fleet
from tests.support.mosquitto import Mosquitto
from tests.support.proxy import Proxy
from tests.support.waiting import until

SEVEN = (INPUTS / "digit-7.png").read_bytes()
DIGITS = [(INPUTS / f"digit-{digit}.png").read_bytes() for digit in range(10)]
ROOMY = "[models.digits]\nmax_queue = 2000\ndeadline_ms = 60000\n"

MakeAgent = Callable[..., AgentProcess]


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path / "broker") as started:
        yield started


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, fleet: Fleet) -> Path:
    """Return a state directory in which digits is installed and has served."""
    folder = tmp_path_factory.mktemp("installed")
    with (
        Mosquitto(folder / "broker") as broker,
        AgentProcess(folder / "agent", broker.port, fleet, group=LONE) as agent,
    ):
        with Asker(broker.port) as asker:
            asker.await_serving("digits")
        assert agent.stop() == 0
    return folder / "agent" / "state"


@pytest.fixture
def make_agent(tmp_path: Path, broker: Mosquitto, fleet: Fleet, installed: Path) -> Iterator[MakeAgent]:
    """Make agents that have digits installed already; none outlives the test."""
    made: list[AgentProcess] = []

    def make(more: str = ROOMY, *, fresh: bool = False, port: int = 0) -> AgentProcess:
        agent = AgentProcess(tmp_path / f"agent-{len(made)}", port or broker.port, fleet, more, group=LONE)
        if not fresh:
            shutil.copytree(installed, agent.folder / "state")
        made.append(agent)
        return agent

    yield make
    for agent in made:
        agent.kill()


@pytest.fixture
def asker(broker: Mosquitto) -> Iterator[Asker]:
    with Asker(broker.port) as started:
        yield started


def ask_all(asker: Asker, number: int, *, pause_s: float = 0.0, first: int = 0) -> dict[bytes, int]:
    """Ask about pictures one after the other; return which digit each correlation asked about."""
    asked = {}
    for index in range(first, first + number):
        correlation = b"q-%d" % index
        asker.ask("digits", DIGITS[index % 10], correlation=correlation)
        asked[correlation] = index % 10
        if pause_s:
            time.sleep(pause_s)
    return asked


def assert_each_answered_alike(asker: Asker, asked: dict[bytes, int], timeout_s: float = 40.0) -> None:
    """Every request has its right answer, and whoever saw two saw the same."""
    until(lambda: all(asker.replies.get(key) for key in asked), timeout_s, told=lambda: missing(asker, asked))
    for correlation, digit in asked.items():
        replies = asker.replies[correlation]
        assert {reply.code for reply in replies} == {None}, replies
        assert {reply.json["outputs"][0]["label"] for reply in replies} == {str(digit)}
        assert len({json.dumps(reply.json["outputs"]) for reply in replies}) == 1


def missing(asker: Asker, asked: dict[bytes, int]) -> str:
    """Say which requests have no answer."""
    return str([key for key in asked if not asker.replies.get(key)])


def serving(agent: AgentProcess, asker: Asker) -> AgentProcess:
    """Start an agent and wait until it serves."""
    agent.start()
    asker.await_serving("digits")
    return agent


def suspended_worker(agent: AgentProcess) -> int:
    """Stop the only worker as a hung model would, and return its process id."""
    (worker,) = agent.workers()
    worker.suspend()
    return worker.pid


def test_b21_sigterm_under_load_drains_and_exits_0_and_what_came_too_late_is_answered_by_the_next_start(
    make_agent: MakeAgent, asker: Asker
) -> None:
    agent = serving(make_agent(), asker)
    asked = ask_all(asker, 300)
    until(lambda: len(asker.replies) > 20)
    assert agent.process is not None
    agent.process.send_signal(signal.SIGTERM)
    asked |= ask_all(asker, 50, first=300)
    assert agent.wait() == 0
    # The agent has handed it to the broker; the asker hears of it a moment later.
    until(lambda: asker.retained[f"{BASE}/status"] == b"offline")
    assert agent.heard("STOPPING=1")
    agent.start()
    assert_each_answered_alike(asker, asked)
    assert agent.stop() == 0
    assert "Traceback" not in agent.log.read_text()


def test_b21_sigterm_with_a_model_that_hangs_ends_in_time_and_the_next_start_answers(
    make_agent: MakeAgent, asker: Asker
) -> None:
    agent = serving(make_agent(ROOMY + "[limits]\ndrain_timeout_s = 1\n"), asker)
    suspended_worker(agent)
    asked = ask_all(asker, 3)
    time.sleep(0.2)
    started = time.monotonic()
    assert agent.stop(15) == 0
    assert time.monotonic() - started < 10
    assert not any(asker.replies.values())
    agent.start()
    assert_each_answered_alike(asker, asked)


def test_b21_a_second_sigterm_skips_the_wait(make_agent: MakeAgent, asker: Asker) -> None:
    agent = serving(make_agent(), asker)
    suspended_worker(agent)
    ask_all(asker, 3)
    assert agent.process is not None
    agent.process.send_signal(signal.SIGTERM)
    until(lambda: agent.heard("STOPPING=1"))
    started = time.monotonic()
    assert agent.stop(15) == 0
    assert time.monotonic() - started < 10


def test_c2_five_kills_of_the_agent_in_five_hundred_requests_lose_none(make_agent: MakeAgent, asker: Asker) -> None:
    agent = serving(make_agent(), asker)
    asked: dict[bytes, int] = {}
    for _ in range(5):
        asked |= ask_all(asker, 50, pause_s=0.005, first=len(asked))
        agent.kill()
        asked |= ask_all(asker, 50, first=len(asked))
        agent.start()
    assert len(asked) == 500
    assert_each_answered_alike(asker, asked)
    assert agent.stop() == 0


def test_c2_a_request_that_was_stored_is_answered_after_a_kill(make_agent: MakeAgent, asker: Asker) -> None:
    agent = serving(make_agent(), asker)
    suspended_worker(agent)
    asked = ask_all(asker, 5)
    time.sleep(1.5)
    agent.kill()
    agent.start()
    assert_each_answered_alike(asker, asked)
    assert all(len(asker.replies[key]) == 1 for key in asked)


def test_c1_three_kills_of_the_broker_lose_nothing_of_who_asks_again(
    make_agent: MakeAgent, broker: Mosquitto, asker: Asker
) -> None:
    serving(make_agent(), asker)
    asked: dict[bytes, int] = {}
    for _ in range(3):
        asked |= ask_all(asker, 100, pause_s=0.002, first=len(asked))
        broker.kill()
        time.sleep(0.3)
        broker.start()

    def ask_again() -> bool:
        open_still = [key for key in asked if not asker.replies.get(key)]
        for key in open_still:
            asker.ask("digits", DIGITS[asked[key]], correlation=key)
        time.sleep(1)
        return not open_still

    until(ask_again, 40, told=lambda: missing(asker, asked))
    assert_each_answered_alike(asker, asked)


@pytest.mark.quiet_machine
@pytest.mark.parametrize("silent", [{"forth": True, "back": True}, {"forth": False, "back": True}])
def test_c4_c5_a_network_that_falls_silent_is_noticed_within_one_and_a_half_keepalives_and_nothing_is_lost(
    make_agent: MakeAgent, broker: Mosquitto, asker: Asker, silent: dict[str, bool]
) -> None:
    with Proxy(broker.port) as network:
        agent = make_agent(port=network.port)
        agent.config.write_text(agent.config.read_text().replace("max_backoff_s", "keepalive_s = 2\nmax_backoff_s"))
        serving(agent, asker)
        asked = ask_all(asker, 20)
        assert_each_answered_alike(asker, asked)
        suspended_worker(agent)
        asked = ask_all(asker, 10, first=20)
        time.sleep(0.2)
        network.hold(**silent)
        agent.workers()[0].resume()
        held_at = time.monotonic()
        until(lambda: "is down" in agent.log.read_text())
        assert time.monotonic() - held_at < 3.5
        asked |= ask_all(asker, 20, first=30)
        network.release()
        assert_each_answered_alike(asker, asked)
        assert agent.stop() == 0


@pytest.mark.quiet_machine
def test_c6_connections_that_are_reset_under_load_lose_no_request(
    make_agent: MakeAgent, broker: Mosquitto, asker: Asker
) -> None:
    with Proxy(broker.port) as network:
        serving(make_agent(port=network.port), asker)
        asked: dict[bytes, int] = {}
        for _ in range(3):
            asked |= ask_all(asker, 60, pause_s=0.003, first=len(asked))
            network.reset()
        assert_each_answered_alike(asker, asked)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_e16_a_worker_that_dies_with_fifty_requests_costs_none_of_them_and_is_back_within_two_seconds(
    make_agent: MakeAgent, asker: Asker, number: signal.Signals
) -> None:
    agent = serving(make_agent(), asker)
    (worker,) = agent.workers()
    worker.suspend()
    asked = ask_all(asker, 51)
    time.sleep(0.3)
    worker.send_signal(number)
    worker.resume() if number != signal.SIGKILL else None
    died_at = time.monotonic()
    assert_each_answered_alike(asker, asked)
    assert min(asker.replies[key][0].at for key in asked) - died_at < 2
    until(lambda: asker.state("digits") == "serving")
    assert agent.workers()[0].pid != worker.pid


def test_a_cancel_is_answered_at_once_though_the_model_hangs(make_agent: MakeAgent, asker: Asker) -> None:
    agent = serving(make_agent(), asker)
    suspended_worker(agent)
    asker.ask("digits", SEVEN, correlation=b"c")
    time.sleep(0.2)
    asker.ask("digits", b"", correlation=b"c", topic=f"{BASE}/cancel/digits/{asker.name}")
    assert asker.final(b"c", 2).code == "cancelled"


def test_a_deadline_is_kept_though_the_model_hangs(make_agent: MakeAgent, asker: Asker) -> None:
    agent = serving(make_agent(), asker)
    suspended_worker(agent)
    started = time.monotonic()
    reply = asker.answer("digits", SEVEN, user=(("deadline-ms", "700"),))
    assert reply.code == "deadline_exceeded"
    assert 0.6 < reply.at - started < 1.5


def test_e1_a_model_that_hangs_is_ended_and_started_again_and_the_others_are_answered(
    make_agent: MakeAgent, asker: Asker
) -> None:
    agent = serving(make_agent(), asker)
    hung = suspended_worker(agent)
    asker.ask("digits", SEVEN, correlation=b"over", user=(("deadline-ms", "300"),))
    asked = ask_all(asker, 20)
    assert asker.final(b"over", 2).code == "deadline_exceeded"
    assert_each_answered_alike(asker, asked)
    assert [worker.pid for worker in agent.workers()] != [hung]


@pytest.mark.quiet_machine
def test_c22_a_request_that_waited_at_the_broker_beyond_its_expiry_is_not_answered_as_if_it_were_fresh(
    make_agent: MakeAgent, asker: Asker
) -> None:
    agent = serving(make_agent(), asker)
    agent.kill()
    # What is written to a dead box's socket comes again without its expiry: the broker must have seen the end first.
    until(lambda: asker.retained[f"{BASE}/status"] == b"offline")
    asker.ask("digits", SEVEN, correlation=b"stale", MessageExpiryInterval=1)
    time.sleep(1.5)
    agent.start()
    assert asker.answer("digits", SEVEN).code is None
    assert not asker.replies[b"stale"]


def test_a_kill_is_told_by_the_last_will_and_a_new_start_takes_it_back(make_agent: MakeAgent, asker: Asker) -> None:
    agent = serving(make_agent(), asker)
    until(lambda: asker.retained[f"{BASE}/status"] == b"online")
    agent.kill()
    until(lambda: asker.retained[f"{BASE}/status"] == b"offline")
    agent.start()
    until(lambda: asker.retained[f"{BASE}/status"] == b"online")


def test_a24_a_second_agent_on_the_same_state_exits_75_and_the_first_goes_on(
    make_agent: MakeAgent, asker: Asker
) -> None:
    agent = serving(make_agent(), asker)
    command = [sys.executable, "-m", "agent.cli", "run", "--config", str(agent.config)]
    second = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    assert second.returncode == 75
    assert "another agent uses" in second.stderr
    assert asker.answer("digits", SEVEN).code is None


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (("port =", "prot ="), "local.prot"),
        (('name = "kitchen"', 'name = "Kitchen"'), "device.name"),
        (("[state]", "[state"), "TOML"),
        (("max_backoff_s = 0.2", 'ca = "/no/such/ca.pem"'), "local.ca"),
    ],
)
def test_a_configuration_that_cannot_be_meant_exits_78_and_says_why(
    make_agent: MakeAgent, change: tuple[str, str], word: str
) -> None:
    agent = make_agent()
    agent.config.write_text(agent.config.read_text().replace(*change))
    command = [sys.executable, "-m", "agent.cli", "run", "--config", str(agent.config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    assert done.returncode == 78
    assert word in done.stderr
    assert "Traceback" not in done.stderr


def test_b14_without_network_and_repository_a_box_is_ready_and_serves_what_it_has_as_soon_as_a_broker_is_there(
    make_agent: MakeAgent, broker: Mosquitto, tmp_path: Path
) -> None:
    broker.kill()
    agent = make_agent(ROOMY)
    agent.config.write_text(agent.config.read_text().replace("/repository", "/nothing-here"))
    agent.start()
    assert agent.ready_after_s < 2
    broker.start()
    with Asker(broker.port) as asker:
        asker.await_serving("digits")
        assert asker.answer("digits", SEVEN).json["outputs"][0]["label"] == "7"
    assert agent.stop() == 0
    assert "Traceback" not in agent.log.read_text()


def test_a_box_without_any_model_yet_is_ready_and_says_that_it_knows_none(make_agent: MakeAgent, asker: Asker) -> None:
    agent = make_agent(fresh=True)
    agent.config.write_text(agent.config.read_text().replace("/repository", "/nothing-here"))
    agent.start()
    until(lambda: asker.retained.get(f"{BASE}/status") == b"online")
    assert asker.answer("digits", SEVEN).code == "model_not_found"
    assert agent.stop() == 0


def test_a_group_that_nobody_deploys_to_is_told_in_the_log(make_agent: MakeAgent, asker: Asker) -> None:
    agent = make_agent(fresh=True)
    agent.config.write_text(agent.config.read_text().replace(f'"{LONE}"', '"nobodys"'))
    agent.start()
    until(lambda: "nobodys" in agent.log.read_text())


def test_a30_a_state_database_that_is_garbage_is_set_aside_and_serving_begins_again(
    make_agent: MakeAgent, asker: Asker
) -> None:
    agent = make_agent()
    for path in (agent.folder / "state").glob("state.db*"):
        path.write_bytes(b"this is no database " * 500)
    agent.start()
    asker.await_serving("digits")
    assert asker.answer("digits", SEVEN).code is None
    assert list((agent.folder / "state").glob("state.db.corrupt-*"))
