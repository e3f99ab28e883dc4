"""The agent as its askers see it: a real broker, real workers, clients that are not ours."""

from __future__ import annotations

import collections
import contextlib
import json
import shutil
import socket
import subprocess
import sys
import tomllib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from paho.mqtt.enums import MQTTProtocolVersion

from agent.cli import main
from tests.fakes.samples import INPUTS
from tests.support.agent_process import AgentProcess
from tests.support.asker import BASE, Asker
from tests.support.fleet import SAMPLES, Fleet
from tests.support.mosquitto import Mosquitto, free_port
from tests.support.waiting import until

SEA = (INPUTS / "sea.json").read_bytes()
GERMAN = "Guten Tag, wie geht es Ihnen heute?"


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    with Mosquitto(tmp_path_factory.mktemp("broker")) as started:
        yield started


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory, broker: Mosquitto, fleet: Fleet) -> Iterator[AgentProcess]:
    more = f"[http]\nport = {free_port()}\n[models.sea-temperature]\nmax_queue = 1000"
    with AgentProcess(tmp_path_factory.mktemp("agent"), broker.port, fleet, more) as started:
        with Asker(broker.port, "first") as first:
            first.await_serving(*SAMPLES)
        yield started
        assert started.stop() == 0
        assert "Traceback" not in started.log.read_text()


@pytest.fixture
def asker(broker: Mosquitto, agent: AgentProcess) -> Iterator[Asker]:
    with Asker(broker.port, f"asker-{uuid.uuid4().hex[:8]}") as started:
        yield started


def client(program: str, port: int, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Run one of mosquitto's own clients; output stays bytes."""
    path = shutil.which(program)
    assert path is not None
    return subprocess.run([path, "-p", str(port), *arguments], capture_output=True, check=False, timeout=30)


def test_a_box_is_ready_within_two_seconds_and_says_that_it_is_online(agent: AgentProcess, asker: Asker) -> None:
    assert agent.ready_after_s < 2
    until(lambda: asker.retained.get(f"{BASE}/status") == b"online")
    told = json.loads(until(lambda: asker.retained.get(f"{BASE}/models")) or b"{}")
    assert {name: (model["state"], model["version"]) for name, model in told.items()} == {
        "digits": ("serving", "1"),
        "language": ("serving", "1"),
        "sea-temperature": ("serving", "1"),
    }
    health = json.loads(until(lambda: asker.retained.get(f"{BASE}/health")) or b"{}")
    assert (health["ready"], health["local"], health["cloud"]) == (True, True, False)


def test_the_owner_sees_what_serves_by_the_agents_own_word(
    agent: AgentProcess, asker: Asker, capsys: pytest.CaptureFixture[str]
) -> None:
    asker.await_serving(*SAMPLES)
    assert main(["models", "--config", str(agent.config), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["agent"] is True
    lines = {line["name"]: line for line in told["models"]}
    assert sorted(lines) == sorted(SAMPLES)
    for line in lines.values():
        assert (line["state"], line["version"], line["variant"]) == ("serving", "1", "default")
        assert line["disk_mb"] > 0


@pytest.mark.parametrize("digit", range(10))
def test_a_picture_of_a_digit_is_named(asker: Asker, digit: int) -> None:
    reply = asker.answer("digits", (INPUTS / f"digit-{digit}.png").read_bytes(), ContentType="image/png")
    assert reply.json["outputs"][0]["label"] == str(digit)
    assert reply.facts == {
        "status": "ok",
        "final": "true",
        "route": "local",
        "reason": "fits",
        "model": "digits@1",
    }
    assert (reply.topic, reply.qos, reply.retain) == (f"{BASE}/reply/{asker.name}/digits", 1, False)


def test_a_text_is_classified_with_and_without_its_content_type(asker: Asker) -> None:
    plain = asker.answer("language", GERMAN.encode())
    typed = asker.answer("language", GERMAN.encode(), ContentType="text/plain; charset=UTF-8")
    as_json = asker.answer("language", json.dumps({"inputs": GERMAN}).encode())
    labels = [reply.json["outputs"][0]["label"] for reply in (plain, typed, as_json)]
    assert labels == ["de", "de", "de"]


def test_a_list_of_inputs_gives_a_list_of_outputs(asker: Asker) -> None:
    body = json.dumps({"inputs": [GERMAN, "The weather is fine today."], "parameters": {"top_k": 1}}).encode()
    outputs = asker.answer("language", body).json["outputs"]
    assert [len(output) for output in outputs] == [1, 1]
    assert [output[0]["label"] for output in outputs] == ["de", "en"]


def test_a_row_of_numbers_gives_a_number(asker: Asker) -> None:
    reply = asker.answer("sea-temperature", SEA, ContentType="application/json")
    outputs = reply.json["outputs"]
    numbers = outputs if isinstance(outputs, list) else [outputs]
    assert all(15 < number < 32 for number in numbers)
    facts = reply.json["spillway"]
    assert (facts["route"], facts["reason"], facts["model"]) == ("local", "fits", "sea-temperature@1")
    assert 0 <= facts["compute_ms"] <= facts["total_ms"] < 5000


def test_a_request_at_qos_0_is_answered_at_qos_0(asker: Asker) -> None:
    assert asker.answer("language", b"hello", qos=0).qos == 0


def test_a_thousand_requests_of_a_crowd_each_get_their_own_answer(broker: Mosquitto, agent: AgentProcess) -> None:
    with contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(Asker(broker.port, f"crowd-{number}")) for number in range(5)]
        asked = [
            (one, number % 10, one.ask("sea-temperature", sea_row(last=20 + number % 10)))
            for number in range(200)
            for one in crowd
        ]
        answers: dict[int, set[str]] = collections.defaultdict(set)
        for one, kind, correlation in asked:
            reply = one.final(correlation, 60)
            assert reply.code is None
            answers[kind].add(str(reply.json["outputs"]))
        assert [len(different) for different in answers.values()] == [1] * 10
        assert len(set.union(*answers.values())) == 10
        assert all(len(finals) == 1 for one in crowd for finals in one.finals().values())


def sea_row(*, last: float) -> bytes:
    """Return a question about one row of temperatures."""
    return json.dumps({"inputs": [24.6, 25.8, 27.1, 28.1, 28.8, 29.2, 28.5, 27.4, 25.2, 23.6, 22.3, last]}).encode()


def test_mosquitto_rr_gets_its_answer(broker: Mosquitto, agent: AgentProcess) -> None:
    topic = ("-t", f"{BASE}/infer/language/rr", "-e", f"{BASE}/reply/rr/answer")
    done = client("mosquitto_rr", broker.port, "-V", "5", *topic, "-q", "1", "-m", GERMAN, "-W", "20")
    assert json.loads(done.stdout)["outputs"][0]["label"] == "de"


def test_mosquitto_pub_and_sub_speak_mqtt_3_through_the_envelope(broker: Mosquitto, agent: AgentProcess) -> None:
    session = ("-V", "311", "-q", "1", "-c", "-i", "old-ear", "-t", f"{BASE}/reply/old/#", "-v")
    assert client("mosquitto_sub", broker.port, *session, "-E").returncode == 0
    envelope = {"id": "q-17", "reply_to": f"{BASE}/reply/old/inbox", "deadline_ms": 9000, "priority": 7}
    body = json.dumps({"inputs": GERMAN, "spillway": envelope})
    client("mosquitto_pub", broker.port, "-V", "311", "-q", "1", "-t", f"{BASE}/infer/language/old", "-m", body)
    heard = client("mosquitto_sub", broker.port, *session, "-C", "1", "-W", "20").stdout
    topic, _, payload = heard.decode().partition(" ")
    reply = json.loads(payload)
    assert topic == f"{BASE}/reply/old/inbox"
    assert reply["outputs"][0]["label"] == "de"
    facts = reply["spillway"]
    assert {name: facts[name] for name in ("id", "status", "final", "sequence", "route", "reason", "model")} == {
        "id": "q-17",
        "status": "ok",
        "final": True,
        "sequence": 0,
        "route": "local",
        "reason": "fits",
        "model": "language@1",
    }


def test_a_raw_picture_over_mqtt_3_is_answered_on_the_client_s_own_topic(
    broker: Mosquitto, agent: AgentProcess
) -> None:
    with Asker(broker.port, "camera", version=MQTTProtocolVersion.MQTTv311) as camera:
        camera.ask("digits", (INPUTS / "digit-7.png").read_bytes())
        until(lambda: camera.replies[None])
        reply = camera.replies[None][0]
        assert reply.topic == f"{BASE}/reply/camera/digits"
        assert reply.json["outputs"][0]["label"] == "7"


def test_an_mqtt_3_asker_s_error_carries_its_id(broker: Mosquitto, agent: AgentProcess) -> None:
    with Asker(broker.port, "camera", version=MQTTProtocolVersion.MQTTv311) as camera:
        camera.ask("unheard-of", json.dumps({"inputs": "x", "spillway": {"id": "q-1"}}).encode())
        until(lambda: camera.replies[None])
        reply = camera.replies[None][0].json
        assert reply["error"]["code"] == "model_not_found"
        assert (reply["spillway"]["id"], reply["spillway"]["status"], reply["spillway"]["final"]) == (
            "q-1",
            "error",
            True,
        )


def test_who_names_neither_client_nor_topic_reads_the_results_topic(asker: Asker) -> None:
    correlation = asker.ask("language", GERMAN.encode(), topic=f"{BASE}/infer/language")
    assert asker.final(correlation).topic == f"{BASE}/results/language"


BAD: list[tuple[str, bytes, dict[str, Any], str, str]] = [
    ("language", b'{"inputs": ', {}, "bad_request", "body"),
    ("language", b'{"inputs": {"a": [[[[1]]]]}}', {}, "bad_request", "inputs"),
    ("language", b"[" * 200_000, {"ContentType": "application/json"}, "bad_request", "body"),
    ("language", b'{"inputs": "x", "parameters": {"top_k": "all"}}', {}, "bad_request", "top_k"),
    ("language", b"\xff\xfe\xfd", {"ContentType": "text/plain"}, "bad_request", "body"),
    ("digits", b"\x89PNG\r\n\x1a\nand then nothing of the kind", {}, "bad_request", ""),
    ("digits", b'{"inputs": "bm8gcGljdHVyZQ=="}', {}, "bad_request", "inputs"),
    ("sea-temperature", b'{"inputs": [1, 2, 3]}', {}, "bad_request", "inputs"),
    ("sea-temperature", b'{"inputs": ["warm"]}', {}, "bad_request", "inputs"),
    ("sea-temperature", b'{"inputs": [1e999]}', {}, "bad_request", "inputs"),
    ("unheard-of", b"hello", {}, "model_not_found", "model"),
    ("language", b"hello", {"ResponseTopic": "elsewhere/x"}, "forbidden", "reply"),
    ("language", b"hello", {"ResponseTopic": f"{BASE}/reply/other/x"}, "forbidden", "reply"),
    ("language", b"hello", {"user": (("priority", "11"),)}, "bad_request", "priority"),
    ("language", b"hello", {"user": (("privacy", "none"),)}, "bad_request", "privacy"),
    ("language", b"hello", {"user": (("deadline-ms", "soon"),)}, "bad_request", "deadline-ms"),
    ("language", b"hello", {"user": (("stream", "true"), ("stream", "true"))}, "bad_request", "stream"),
    ("language", b'{"messages": [{"role": "user", "content": "hi"}]}', {}, "bad_request", ""),
]


@pytest.mark.parametrize(("model", "body", "more", "code", "words"), BAD)
def test_a_bad_request_gets_the_error_that_names_what_is_wrong(
    asker: Asker, model: str, body: bytes, more: dict[str, Any], code: str, words: str
) -> None:
    reply = asker.answer(model, body, **more)
    assert reply.code == code, reply.json
    assert words in str(reply.json["error"])
    assert reply.facts["status"] == "error"
    assert reply.topic == f"{BASE}/reply/{asker.name}/{model}"


def test_all_bad_requests_at_once_cost_the_good_ones_nothing(asker: Asker) -> None:
    good = []
    bad = []
    for model, body, more, code, _ in BAD:
        bad.append((asker.ask(model, body, **more), code))
        good.append(asker.ask("language", GERMAN.encode()))
    assert [asker.final(correlation).code for correlation, _ in bad] == [code for _, code in bad]
    assert {asker.final(correlation).json["outputs"][0]["label"] for correlation in good} == {"de"}


def test_c18_nothing_is_published_on_a_forbidden_reply_topic(asker: Asker, broker: Mosquitto) -> None:
    with Asker(broker.port, "victim") as victim:
        reply = asker.answer("language", b"hello", ResponseTopic=f"{BASE}/reply/victim/inbox")
        assert reply.code == "forbidden"
        assert asker.answer("language", GERMAN.encode()).code is None
        assert not victim.replies


@pytest.mark.parametrize("size", [257, 60_000])
def test_c19_correlation_over_256_bytes_is_refused_at_the_reply_topic_that_was_named(asker: Asker, size: int) -> None:
    inbox = f"{BASE}/reply/{asker.name}/inbox"
    asker.ask("language", b"hello", correlation=b"c" * size, ResponseTopic=inbox)
    until(lambda: asker.replies[None])
    reply = asker.replies[None][0]
    assert (reply.topic, reply.code, reply.correlation) == (inbox, "bad_request", None)


def test_c14_a_retained_request_is_never_answered(broker: Mosquitto, agent: AgentProcess, asker: Asker) -> None:
    correlation = asker.ask("language", b"hello", retain=True)
    assert asker.answer("language", GERMAN.encode()).code is None
    assert not asker.replies[correlation]
    asker.ask("language", b"", retain=True)


def test_c15_ten_megabytes_of_garbage_are_too_large_and_hold_nobody_up(asker: Asker) -> None:
    large = asker.ask("language", b"\x00" * (10 << 20), ContentType="text/plain")
    quick = asker.ask("language", GERMAN.encode())
    assert asker.final(quick).code is None
    assert asker.final(large).code == "too_large"


def test_c15_seven_megabytes_of_text_are_read_or_refused_in_time(asker: Asker) -> None:
    reply = asker.answer("language", b"words and words " * 450_000, user=(("deadline-ms", "9000"),), timeout_s=30)
    assert reply.code in {None, "too_large", "deadline_exceeded"}


def test_asking_the_same_again_gives_the_same_answer(asker: Asker) -> None:
    first = asker.answer("language", GERMAN.encode(), correlation=b"same")
    for copies in range(3):
        asker.ask("language", GERMAN.encode(), correlation=b"same")
        until(lambda least=copies + 2: len(asker.replies[b"same"]) >= least)  # type: ignore[misc]
    assert {reply.body for reply in asker.replies[b"same"]} == {first.body}


def test_the_same_correlation_with_another_question_is_another_request(asker: Asker) -> None:
    asker.ask("language", GERMAN.encode(), correlation=b"both")
    asker.ask("language", b"The weather is fine today.", correlation=b"both")
    until(lambda: len(asker.replies[b"both"]) == 2)
    labels = {reply.json["outputs"][0]["label"] for reply in asker.replies[b"both"]}
    assert labels == {"de", "en"}


def test_spillway_ask_prints_the_answer_and_where_it_came_from(agent: AgentProcess, broker: Mosquitto) -> None:
    command = [sys.executable, "-m", "agent.cli", "ask", "language", GERMAN, "--config", str(agent.config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0
    assert '"label":"de"' in done.stdout
    assert "route local, reason fits, model language@1" in done.stderr


def test_spillway_ask_says_what_went_wrong_and_fails(agent: AgentProcess) -> None:
    command = [sys.executable, "-m", "agent.cli", "ask", "unheard-of", "hello", "--config", str(agent.config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 1
    assert "model_not_found: no such model" in done.stderr


@pytest.fixture(scope="module")
def http(agent: AgentProcess) -> Iterator[httpx.Client]:
    """Return a client of the agent's HTTP door."""
    port = tomllib.loads(agent.config.read_text())["http"]["port"]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
        yield client


def test_the_http_door_answers_as_the_other_does(http: httpx.Client) -> None:
    seven = (INPUTS / "digit-7.png").read_bytes()
    answer = http.post("/models/digits", content=seven, headers={"Content-Type": "image/png"})
    assert answer.json()["outputs"][0]["label"] == "7"
    assert (answer.headers["spillway-route"], answer.headers["spillway-model"]) == ("local", "digits@1")
    assert http.post("/models/language", json={"inputs": GERMAN}).json()["outputs"][0]["label"] == "de"


def test_the_http_door_tells_health_models_and_numbers(http: httpx.Client) -> None:
    assert http.get("/healthz").text == "ok\n"
    assert http.get("/readyz").json()["models"] == dict.fromkeys(SAMPLES, "serving")
    assert [model["id"] for model in http.get("/v1/models").json()["data"]] == sorted(SAMPLES)
    assert "# TYPE spillway_answers_total counter" in http.get("/metrics").text


def test_f8_the_http_door_refuses_what_is_no_request_and_serves_on(http: httpx.Client) -> None:
    port = http.base_url.port
    assert port is not None
    for garbage in (b"\x00" * 1000, b"GET / HTTP/9.9\r\n\r\n", b"POST /models/x HTTP/1.1\r\nX: " + b"y" * (1 << 20)):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as raw, contextlib.suppress(OSError):
            raw.sendall(garbage)
            assert b" 200 " not in raw.recv(4096)
    assert http.get("/healthz").status_code == 200
    assert http.post("/models/unheard-of", content=b"x").status_code == 404


def test_f3_neither_the_log_nor_the_state_shows_what_was_asked(agent: AgentProcess, asker: Asker) -> None:
    secret = f"my secret is {uuid.uuid4().hex}"
    assert asker.answer("language", secret.encode()).code is None
    asker.answer("language", b'{"inputs": "' + secret.encode() + b'", "parameters": {"top_k": "x"}}')
    assert secret not in agent.log.read_text()
    held = [path for path in Path(agent.folder / "state").rglob("*") if path.is_file()]
    assert not any(secret.encode() in path.read_bytes() for path in held)
