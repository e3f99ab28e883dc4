from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.mqtt import MAX_DEADLINE_MS, Wishes, parse_wishes
from cloud_sync.messages import Details
from models.channel import Ask, Piece
from models.errors import RequestError
from tests.fakes.cloud_door import MemoryCloud
from tests.fakes.worker import MemoryWorker, echo
from tests.support.box import turns
from tests.support.mqtt_box import INFER, REPLY, RESULTS, MqttBox, open_mqtt_box
from tests.support.virtual_time import virtual_time

CANCEL = "spillway/kitchen/cancel/digits/me"


def test_without_properties_an_asker_wishes_nothing_special() -> None:
    assert parse_wishes(()) == Wishes()
    assert parse_wishes(()).priority == 5


def test_all_wishes_can_be_said_at_once_and_others_are_let_be() -> None:
    said = (
        ("deadline-ms", "250"),
        ("priority", "9"),
        ("privacy", "local-only"),
        ("stream", "true"),
        ("provisional", "true"),
        ("traceparent", "00-1"),
        ("traceparent", "00-2"),
    )
    assert parse_wishes(said) == Wishes(deadline_ms=250, priority=9, local_only=True, stream=True, provisional=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("deadline-ms", "0"),
        ("deadline-ms", "-1"),
        ("deadline-ms", "1e3"),
        ("deadline-ms", "٣"),
        ("deadline-ms", ""),
        ("deadline-ms", " 5"),
        ("deadline-ms", str(MAX_DEADLINE_MS + 1)),
        ("deadline-ms", "9" * 5000),
        ("priority", "10"),
        ("priority", "high"),
        ("privacy", "secret"),
        ("privacy", "LOCAL-ONLY"),
        ("stream", "yes"),
        ("provisional", "1"),
    ],
)
def test_a_wish_that_cannot_be_is_refused_by_its_name_and_what_is_right(name: str, value: str) -> None:
    with pytest.raises(RequestError, match=f"`{name}`") as caught:
        parse_wishes(((name, value),))
    assert caught.value.code == "bad_request"
    assert "right" in caught.value.message
    assert len(caught.value.message) < 200


def test_a_wish_said_twice_is_refused() -> None:
    with pytest.raises(RequestError, match="`priority` is there twice"):
        parse_wishes((("priority", "1"), ("priority", "1")))


@given(
    st.lists(st.tuples(st.sampled_from(["deadline-ms", "priority", "stream", "x"]), st.text(max_size=20)), max_size=4)
)
def test_any_properties_are_wishes_or_a_bad_request(user: list[tuple[str, str]]) -> None:
    try:
        wishes = parse_wishes(tuple(user))
    except RequestError as error:
        assert error.code == "bad_request"  # noqa: PT017 - either end is right
    else:
        assert 0 <= wishes.priority <= 9


@virtual_time
async def test_a_request_is_answered_on_its_client_s_topic_with_the_facts_in_body_and_properties(
    tmp_path: Path,
) -> None:
    async with open_mqtt_box(tmp_path) as mqtt:
        mqtt.box.serve(MemoryWorker(script=echo))
        await mqtt.ask(b"hello", correlation=b"7")
        (reply,) = await mqtt.answered()
        assert (reply.topic, reply.correlation, reply.qos) == (REPLY, b"7", 1)
        assert reply.content_type == "application/json"
        assert reply.json["outputs"] == "hello"
        facts = reply.json["spillway"]
        assert isinstance(facts, dict)
        assert {name: facts[name] for name in ("route", "reason", "model")} == {
            "route": "local",
            "reason": "fits",
            "model": "digits@1",
        }
        assert set(facts) == {"route", "reason", "model", "queued_ms", "compute_ms", "total_ms"}
        assert reply.facts == {
            "status": "ok",
            "final": "true",
            "route": "local",
            "reason": "fits",
            "model": "digits@1",
        }
        assert mqtt.unacknowledged == 0


@virtual_time
async def test_an_asker_without_a_name_reads_the_results_topic(tmp_path: Path) -> None:
    async with open_mqtt_box(tmp_path) as mqtt:
        mqtt.box.serve(MemoryWorker(script=echo))
        await mqtt.ask(topic="spillway/kitchen/infer/digits", qos=0)
        (reply,) = await mqtt.answered()
        assert (reply.topic, reply.correlation, reply.qos) == (RESULTS, None, 0)


@virtual_time
async def test_an_asker_may_name_a_reply_topic_under_its_own(tmp_path: Path) -> None:
    async with open_mqtt_box(tmp_path) as mqtt:
        mqtt.box.serve(MemoryWorker(script=echo))
        await mqtt.ask(response_topic="spillway/kitchen/reply/me/inbox/3")
        (reply,) = await mqtt.answered()
        assert reply.topic == "spillway/kitchen/reply/me/inbox/3"


@virtual_time
async def test_the_configuration_may_allow_other_reply_topics(tmp_path: Path) -> None:
    async with open_mqtt_box(tmp_path) as mqtt:
        mqtt.box.serve(MemoryWorker(script=echo))
        mqtt.door._config = msgspec.structs.replace(mqtt.box.config, reply_prefixes=["elsewhere/"])
        await mqtt.ask(response_topic="elsewhere/kitchen")
        (reply,) = await mqtt.answered()
        assert reply.topic == "elsewhere/kitchen"


@pytest.mark.parametrize(
    "topic",
    [
        "spillway/kitchen/reply/other/x",
        "spillway/kitchen/reply/me",
        "spillway/kitchen/reply/me/",
        "spillway/kitchen/reply/me/+",
        "spillway/kitchen/reply/me/#",
        "spillway/kitchen/reply/me/\x07",
        "spillway/kitchen/infer/digits/me",
        "elsewhere/x",
        "$SYS/broker",
        "",
    ],
)
def test_c18_a_reply_topic_that_is_not_the_asker_s_own_is_forbidden_and_nothing_goes_there(
    tmp_path: Path, topic: str
) -> None:
    @virtual_time
    async def play() -> None:
        async with open_mqtt_box(tmp_path) as mqtt:
            worker = mqtt.box.serve(MemoryWorker(script=echo))
            mqtt.link.take(INFER, b"hello", 1, Details(response_topic=topic, correlation=b"c"), retain=False)
            (reply,) = await mqtt.answered()
            assert (reply.topic, reply.code, reply.correlation) == (REPLY, "forbidden", b"c")
            assert REPLY in str(reply.json["error"])
            assert worker.asks == []
            assert mqtt.unacknowledged == 0

    play()


@virtual_time
async def test_a_box_may_refuse_askers_without_a_name(tmp_path: Path) -> None:
    async with open_mqtt_box(tmp_path) as mqtt:
        mqtt.door._config = msgspec.structs.replace(mqtt.box.config, allow_any=False)
        await mqtt.ask(topic="spillway/kitchen/infer/digits")
        (reply,) = await mqtt.answered()
        assert (reply.topic, reply.code) == (RESULTS, "forbidden")


@pytest.mark.parametrize("size", [257, 60_000])
def test_c19_correlation_over_256_bytes_is_refused_where_the_asker_listens(tmp_path: Path, size: int) -> None:
    @virtual_time
    async def play() -> None:
        async with open_mqtt_box(tmp_path) as mqtt:
            mqtt.box.serve(MemoryWorker(script=echo))
            await mqtt.ask(correlation=b"x" * size, response_topic="spillway/kitchen/reply/me/inbox")
            (reply,) = await mqtt.answered()
            assert (reply.topic, reply.code, reply.correlation) == (
                "spillway/kitchen/reply/me/inbox",
                "bad_request",
                None,
            )

    play()


@virtual_time
async def test_c19_correlation_of_256_bytes_and_none_at_all_are_right(tmp_path: Path) -> None:
    async with open_mqtt_box(tmp_path) as mqtt:
        mqtt.box.serve(MemoryWorker(script=echo, capacity=2))
        await mqtt.ask(correlation=b"x" * 256)
        await mqtt.ask()
        replies = await mqtt.answered(2)
        assert [reply.correlation for reply in replies] == [b"x" * 256, None]
        assert [reply.facts["status"] for reply in replies] == ["ok", "ok"]


@virtual_time
async def test_c14_a_retained_request_is_acknowledged_and_never_begun(tmp_path: Path) -> None:
    async with open_mqtt_box(tmp_path) as mqtt:
        worker = mqtt.box.serve(MemoryWorker(script=echo))
        mqtt.link.take(INFER, b"again and again", 1, Details(), retain=True)
        await turns()
        assert worker.asks == []
        assert mqtt.unacknowledged == 0


@virtual_time
async def test_c22_a_message_that_has_expired_is_not_begun_and_its_asker_is_told(tmp_path: Path) -> None:
    async with open_mqtt_box(tmp_path) as mqtt:
        worker = mqtt.box.serve(MemoryWorker(script=echo))
        await mqtt.ask(expiry_s=0)
        (reply,) = await mqtt.answered()
        assert reply.code == "deadline_exceeded"
        assert worker.asks == []


@virtual_time
async def test_c22_the_message_s_expiry_bounds_the_deadline(tmp_path: Path) -> None:
    async with open_mqtt_box(tmp_path) as mqtt:
        mqtt.box.serve(MemoryWorker())
        started = mqtt.box.clock()
        await mqtt.ask(expiry_s=3, user=(("deadline-ms", "60000"),))
        (reply,) = await mqtt.answered()
        assert reply.code == "deadline_exceeded"
        assert mqtt.box.clock() - started == pytest.approx(3, abs=0.1)


@virtual_time
async def test_the_asker_s_deadline_counts_from_the_box_s_receipt(tmp_path: Path) -> None:
    async with open_mqtt_box(tmp_path) as mqtt:
        mqtt.box.serve(MemoryWorker())
        started = mqtt.box.clock()
        await mqtt.ask(user=(("deadline-ms", "700"),))
        (reply,) = await mqtt.answered()
        assert reply.code == "deadline_exceeded"
        assert mqtt.box.clock() - started == pytest.approx(0.7, abs=0.1)


@virtual_time
async def test_without_a_deadline_the_model_s_default_counts(tmp_path: Path) -> None:
    async with open_mqtt_box(tmp_path, "[models.digits]\ndeadline_ms = 1500") as mqtt:
        mqtt.box.serve(MemoryWorker())
        started = mqtt.box.clock()
        await mqtt.ask()
        await mqtt.answered()
        assert mqtt.box.clock() - started == pytest.approx(1.5, abs=0.1)


@pytest.mark.parametrize(
    ("body", "content_type", "words"),
    [
        (b'{"inputs": ', "application/json", "body"),
        (b"{}", None, "inputs"),
        (b"\xff\xfe", "text/plain", "body"),
        (b"hello", "text/plain; charset=utf-16", "content type"),
        (b"hello", "application/x-python", "content type"),
        (b"[" * 100_000, "application/json", "body"),
        (b'{"inputs": "x", "inputs": "y", "stream": 3}', None, "stream"),
        (b'{"inputs": "x", "spillway": {"deadline": 3}}', None, "spillway"),
        (b"", None, "body"),
    ],
)
def test_a_body_that_does_not_parse_is_a_bad_request_that_says_where(
    tmp_path: Path, body: bytes, content_type: str | None, words: str
) -> None:
    @virtual_time
    async def play() -> None:
        async with open_mqtt_box(tmp_path) as mqtt:
            mqtt.box.serve(MemoryWorker(script=echo))
            await mqtt.ask(body, content_type=content_type, correlation=b"c")
            (reply,) = await mqtt.answered()
            assert (reply.code, reply.correlation) == ("bad_request", b"c")
            assert words in str(reply.json["error"]).lower()
            assert mqtt.unacknowledged == 0

    play()


@virtual_time
async def test_c15_a_body_over_the_limit_is_too_large_and_not_parsed(tmp_path: Path) -> None:
    async with open_mqtt_box(tmp_path, "[limits]\nmax_body_bytes = 1000") as mqtt:
        mqtt.box.serve(MemoryWorker(script=echo))
        await mqtt.ask(b'{"inputs": "' + b"x" * 2000)
        (reply,) = await mqtt.answered()
        assert reply.code == "too_large"


@virtual_time
async def test_errors_speak_the_dialect_of_the_body(tmp_path: Path) -> None:
    chat = b'{"messages": [{"role": "user", "content": "hi"}]}'
    tensors = b'{"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}]}'
    async with open_mqtt_box(tmp_path) as mqtt:
        for body in (chat, tensors):
            await mqtt.ask(body, topic="spillway/kitchen/infer/unheard-of/me")
        in_openai, in_tensors = await mqtt.answered(2)
        assert in_openai.json["error"] == {
            "message": "no such model",
            "type": "not_found_error",
            "code": "model_not_found",
            "param": None,
        }
        assert in_tensors.json == {"error": "model_not_found: no such model"}


@virtual_time
async def test_other_dialects_keep_their_shape_and_have_the_facts_in_the_properties(tmp_path: Path) -> None:
    def complete(ask: Ask) -> list[Piece]:
        return [Piece(ticket=ask.ticket, body=b'{"object":"chat.completion"}')]

    async with open_mqtt_box(tmp_path) as mqtt:
        mqtt.box.serve(MemoryWorker(script=complete))
        await mqtt.ask(b'{"messages": []}')
        (reply,) = await mqtt.answered()
        assert reply.body == b'{"object":"chat.completion"}'
        assert reply.facts["model"] == "digits@1"


@virtual_time
async def test_a_stream_s_pieces_are_numbered_and_the_last_says_so(tmp_path: Path) -> None:
    def three(ask: Ask) -> list[Piece]:
        return [Piece(ticket=ask.ticket, body=b'{"outputs":"a"}', final=number == 2) for number in range(3)]

    async with open_mqtt_box(tmp_path) as mqtt:
        mqtt.box.serve(MemoryWorker(script=three))
        await mqtt.ask(user=(("stream", "true"),))
        replies = await mqtt.answered(3)
        assert [reply.facts["sequence"] for reply in replies] == ["0", "1", "2"]
        assert [reply.facts["final"] for reply in replies] == ["false", "false", "true"]
        assert [reply.facts["status"] for reply in replies] == ["partial", "partial", "ok"]


@virtual_time
async def test_an_mqtt_3_asker_puts_its_wishes_into_the_body_and_finds_the_facts_there(tmp_path: Path) -> None:
    envelope = {"id": "q-1", "reply_to": "spillway/kitchen/reply/me/old", "deadline_ms": 900, "priority": 8}
    async with open_mqtt_box(tmp_path) as mqtt:
        worker = mqtt.box.serve(MemoryWorker(script=echo))
        await mqtt.ask(msgspec.json.encode({"inputs": "x", "spillway": envelope | {"privacy": "local-only"}}))
        (reply,) = await mqtt.answered()
        assert reply.topic == "spillway/kitchen/reply/me/old"
        facts = reply.json["spillway"]
        assert isinstance(facts, dict)
        assert {name: facts[name] for name in ("id", "status", "final", "sequence", "route", "reason", "model")} == {
            "id": "q-1",
            "status": "ok",
            "final": True,
            "sequence": 0,
            "route": "local",
            "reason": "fits",
            "model": "digits@1",
        }
        request = worker.asks[0].request
        assert (request.body, request.priority, request.local_only) == (b'{"inputs":"x"}', 8, True)
        assert request.deadline_ms == 900


@virtual_time
async def test_an_mqtt_3_asker_s_error_carries_its_id_too(tmp_path: Path) -> None:
    body = {"messages": [], "spillway": {"id": "q-2"}}
    async with open_mqtt_box(tmp_path) as mqtt:
        await mqtt.ask(msgspec.json.encode(body), topic="spillway/kitchen/infer/unheard-of/me")
        (reply,) = await mqtt.answered()
        assert reply.code == "model_not_found"
        facts = reply.json["spillway"]
        assert isinstance(facts, dict)
        assert (facts["id"], facts["status"], facts["final"]) == ("q-2", "error", True)


@virtual_time
async def test_c18_an_mqtt_3_asker_s_reply_topic_is_checked_alike_and_the_error_carries_its_id(tmp_path: Path) -> None:
    body = {"inputs": "x", "spillway": {"id": "q-3", "reply_to": "spillway/kitchen/reply/other/x"}}
    async with open_mqtt_box(tmp_path) as mqtt:
        await mqtt.ask(msgspec.json.encode(body))
        (reply,) = await mqtt.answered()
        assert (reply.topic, reply.code) == (REPLY, "forbidden")
        facts = reply.json["spillway"]
        assert isinstance(facts, dict)
        assert facts["id"] == "q-3"


@virtual_time
async def test_the_stricter_of_envelope_and_properties_keeps_a_request_here(tmp_path: Path) -> None:
    async with open_mqtt_box(tmp_path, '[models.digits]\npool = "gpu"', cloud=MemoryCloud()) as mqtt:
        body = b'{"inputs": "x", "spillway": {"privacy": "any"}}'
        await mqtt.ask(body, user=(("privacy", "local-only"),))
        (reply,) = await mqtt.answered()
        assert reply.code == "model_not_found"


@virtual_time
async def test_the_same_request_again_joins_the_one_in_flight(tmp_path: Path) -> None:
    async with open_mqtt_box(tmp_path) as mqtt:
        worker = mqtt.box.serve(MemoryWorker())
        await mqtt.ask(b"x", correlation=b"c")
        await mqtt.ask(b"x", correlation=b"c")
        assert (len(worker.asks), mqtt.unacknowledged) == (1, 2)
        worker.answer(worker.asks[0])
        await mqtt.answered(1)
        assert mqtt.unacknowledged == 0


@virtual_time
async def test_the_same_request_later_gets_the_same_answer(tmp_path: Path) -> None:
    async with open_mqtt_box(tmp_path) as mqtt:
        worker = mqtt.box.serve(MemoryWorker(script=echo))
        await mqtt.ask(b"x", correlation=b"c")
        (first,) = await mqtt.answered(1)
        await mqtt.ask(b"x", correlation=b"c")
        _, second = await mqtt.answered(2)
        assert second == first
        assert len(worker.asks) == 1


@virtual_time
async def test_c20_the_same_correlation_from_another_client_is_another_request(tmp_path: Path) -> None:
    async with open_mqtt_box(tmp_path) as mqtt:
        worker = mqtt.box.serve(MemoryWorker(script=echo, capacity=2))
        await mqtt.ask(b"x", correlation=b"c")
        await mqtt.ask(b"x", topic="spillway/kitchen/infer/digits/other", correlation=b"c")
        await mqtt.answered(2)
        assert len(worker.asks) == 2


@virtual_time
async def test_without_correlation_every_request_is_new(tmp_path: Path) -> None:
    async with open_mqtt_box(tmp_path) as mqtt:
        worker = mqtt.box.serve(MemoryWorker(script=echo, capacity=2))
        await mqtt.ask(b"x")
        await mqtt.ask(b"x")
        await mqtt.answered(2)
        assert len(worker.asks) == 2


@virtual_time
async def test_an_mqtt_3_asker_s_id_makes_its_copies_the_same_request(tmp_path: Path) -> None:
    body = b'{"inputs": "x", "spillway": {"id": "q-1"}}'
    async with open_mqtt_box(tmp_path) as mqtt:
        worker = mqtt.box.serve(MemoryWorker(script=echo))
        await mqtt.ask(body)
        await mqtt.ask(body)
        replies = await mqtt.answered(len(mqtt.heard) or 1)
        assert len({reply.body for reply in replies}) == 1
        assert len(worker.asks) == 1


@pytest.mark.parametrize("body", [b"plain", b'{"inputs": "x", "spillway": {}}'])
def test_c1_a_broker_s_copy_of_a_request_in_flight_is_the_same_request_though_it_has_no_correlation(
    tmp_path: Path, body: bytes
) -> None:
    @virtual_time
    async def play() -> None:
        async with open_mqtt_box(tmp_path) as mqtt:
            worker = mqtt.box.serve(MemoryWorker())
            await mqtt.ask(body)
            mqtt.link.drop()
            mqtt.link._numbers = iter(range(1, 99))  # type: ignore[assignment]
            mqtt.link.connect()
            await turns()
            assert len(worker.asks) == 1
            worker.answer(worker.asks[0])
            await mqtt.answered(1)
            assert mqtt.unacknowledged == 0

    play()


@virtual_time
async def test_a_request_is_acknowledged_once_its_answer_is(tmp_path: Path) -> None:
    async with open_mqtt_box(tmp_path) as mqtt:
        worker = mqtt.box.serve(MemoryWorker())
        await mqtt.ask()
        assert mqtt.unacknowledged == 1
        worker.answer(worker.asks[0])
        await mqtt.answered()
        assert mqtt.unacknowledged == 0


@virtual_time
async def test_one_slow_request_holds_nobody_up(tmp_path: Path) -> None:
    async with open_mqtt_box(tmp_path) as mqtt:
        worker = mqtt.box.serve(MemoryWorker(capacity=3))
        for body in (b"slow", b"fast", b"fast too"):
            await mqtt.ask(body)
        for ask in worker.asks[1:]:
            worker.answer(ask)
        await turns()
        assert len(mqtt.heard) == 2
        assert mqtt.unacknowledged == 3  # PUBACKs leave in the order of arrival
        await asyncio.sleep(1.1)
        assert mqtt.unacknowledged == 0  # the slow one is stored
        worker.answer(worker.asks[0])
        await mqtt.answered(3)


@virtual_time
async def test_an_empty_message_on_the_cancel_topic_takes_a_request_back(tmp_path: Path) -> None:
    async with open_mqtt_box(tmp_path) as mqtt:
        worker = mqtt.box.serve(MemoryWorker())
        await mqtt.ask(correlation=b"c")
        await mqtt.ask(b"", CANCEL, correlation=b"c")
        (reply,) = await mqtt.answered()
        assert (reply.code, reply.correlation) == ("cancelled", b"c")
        assert worker.cancels == [worker.asks[0].ticket]
        assert mqtt.unacknowledged == 0


@virtual_time
async def test_a_cancel_right_behind_its_request_finds_it(tmp_path: Path) -> None:
    async with open_mqtt_box(tmp_path) as mqtt:
        mqtt.box.serve(MemoryWorker(script=echo))
        mqtt.link.take(INFER, b"x", 1, Details(correlation=b"c"), retain=False)
        mqtt.link.take(CANCEL, b"", 1, Details(correlation=b"c"), retain=False)
        (reply,) = await mqtt.answered()
        assert reply.code == "cancelled"
        assert mqtt.unacknowledged == 0


@virtual_time
async def test_nobody_cancels_another_s_request(tmp_path: Path) -> None:
    async with open_mqtt_box(tmp_path) as mqtt:
        worker = mqtt.box.serve(MemoryWorker())
        await mqtt.ask(correlation=b"c")
        for topic in (
            "spillway/kitchen/cancel/digits/other",
            "spillway/kitchen/cancel/digits",
            "spillway/kitchen/cancel/else/me",
        ):
            await mqtt.ask(b"", topic, correlation=b"c")
        await mqtt.ask(b"", CANCEL, correlation=b"d")
        await mqtt.ask(b"", CANCEL)
        assert worker.cancels == []
        worker.answer(worker.asks[0])
        (reply,) = await mqtt.answered()
        assert reply.facts["status"] == "ok"
        assert mqtt.unacknowledged == 0


@virtual_time
async def test_a_cancel_names_the_later_of_two_requests_with_one_correlation(tmp_path: Path) -> None:
    async with open_mqtt_box(tmp_path) as mqtt:
        worker = mqtt.box.serve(MemoryWorker(capacity=2))
        await mqtt.ask(b"first", correlation=b"c")
        await mqtt.ask(b"second", correlation=b"c")
        worker.answer(worker.asks[0])
        await turns()
        await mqtt.ask(b"", CANCEL, correlation=b"c")
        replies = await mqtt.answered(2)
        assert [reply.code for reply in replies] == [None, "cancelled"]


@virtual_time
async def test_while_draining_new_requests_stay_with_the_broker(tmp_path: Path) -> None:
    async with open_mqtt_box(tmp_path) as mqtt:
        worker = mqtt.box.serve(MemoryWorker(script=echo))
        mqtt.door.draining = True
        await mqtt.ask()
        assert (worker.asks, mqtt.heard, mqtt.unacknowledged) == ([], [], 1)


@virtual_time
async def test_answers_made_while_the_link_is_down_are_sent_when_it_is_back(tmp_path: Path) -> None:
    async with open_mqtt_box(tmp_path) as mqtt:
        worker = mqtt.box.serve(MemoryWorker())
        await mqtt.ask(correlation=b"c")
        mqtt.link.drop()
        worker.answer(worker.asks[0])
        await asyncio.sleep(10)
        assert mqtt.heard == []
        mqtt.link.connect()
        await mqtt.answered(1)
        assert mqtt.unacknowledged == 0
        assert len(worker.asks) == 1


@virtual_time
async def test_a_quick_answer_on_a_link_that_is_down_is_lost_at_qos_0_and_told_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_mqtt_box(tmp_path) as mqtt:
        worker = mqtt.box.serve(MemoryWorker())
        await mqtt.ask(qos=0)
        mqtt.link.drop()
        worker.answer(worker.asks[0])
        await turns()
        assert mqtt.box.service.intake.tickets == set()
        assert "was not delivered" in caplog.text


@virtual_time
async def test_e15_an_answer_that_is_no_json_object_is_still_an_answer(tmp_path: Path) -> None:
    def garbage(ask: Ask) -> list[Piece]:
        return [Piece(ticket=ask.ticket, body=b"\x00garbage")]

    async with open_mqtt_box(tmp_path) as mqtt:
        mqtt.box.serve(MemoryWorker(script=garbage))
        await mqtt.ask()
        (reply,) = await mqtt.answered()
        assert reply.code == "model_failed"
        assert mqtt.unacknowledged == 0


@virtual_time
async def test_c16_topics_that_name_nothing_are_dropped_and_acknowledged(tmp_path: Path) -> None:
    async with open_mqtt_box(tmp_path) as mqtt:
        worker = mqtt.box.serve(MemoryWorker(script=echo))
        for topic in (
            "spillway/kitchen/infer/Digits/me",
            "spillway/kitchen/infer/digits/ME",
            "spillway/kitchen/infer/+x",
        ):
            mqtt.link.take(topic, b"x", 1, Details(correlation=b"c"), retain=False)
        await turns()
        assert (worker.asks, mqtt.heard, mqtt.unacknowledged) == ([], [], 0)


@virtual_time
async def test_the_door_takes_a_flood_of_garbage_and_answers_all_of_it(tmp_path: Path) -> None:
    async with open_mqtt_box(tmp_path, "[limits]\nmax_requests = 10") as mqtt:
        mqtt.box.serve(MemoryWorker(script=echo, capacity=8))
        for number in range(300):
            mqtt.link.take(INFER, b"\xff" * (number + 1), 1, Details(correlation=b"%d" % number), retain=False)
        replies = await mqtt.answered(300)
        assert {reply.code for reply in replies} == {"bad_request"}
        assert mqtt.unacknowledged == 0
        assert _is_idle(mqtt)


def _is_idle(mqtt: MqttBox) -> bool:
    held = [ticket for _, ticket in mqtt.door._brought.values() if ticket is not None]
    return not (mqtt.box.service.intake.tickets or mqtt.door._named or held)
