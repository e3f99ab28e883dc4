"""Names, topics and the heads of the hand-off messages."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_sync import wire
from cloud_sync.errors import HandoffError
from cloud_sync.wire import Asked, HandoffHeader, ReplyHeader, Topics
from models.manifest import is_name

HEADER = HandoffHeader(
    kid="2026-11",
    id="00112233445566778899aabbccddeeff",
    device="pi-7",
    pool="default",
    model="assistant",
    ttl_ms=30_000,
    content_type="application/json",
    stream=False,
)
REPLY = ReplyHeader(id=HEADER.id, sequence=0, final=True, status="ok")


@pytest.mark.parametrize("name", ["a", "0", "pi-7", "a.b_c-d", "a" * 64])
def test_good_names_are_names(name: str) -> None:
    assert is_name(name)


@pytest.mark.parametrize("name", ["", "-a", ".a", "A", "a/b", "a+", "a#", "a b", "a\n", "é", "a" * 65, "\u0661"])
def test_other_names_are_not(name: str) -> None:
    assert not is_name(name)


@pytest.mark.parametrize("name", ["handoff", "fleet"])
def test_the_words_of_the_protocol_name_no_device(name: str) -> None:
    assert is_name(name)
    assert not wire.is_device(name)
    with pytest.raises(ValueError, match=name):
        Topics("spillway", name)


@pytest.mark.parametrize("prefix", ["", "/a", "a/", "a//b", "a/+", "#", "$share", "a/b/c/d/e", "a" * 65])
def test_a_prefix_that_would_break_the_topics_is_refused(prefix: str) -> None:
    with pytest.raises(ValueError, match="prefix"):
        Topics(prefix, "pi-7")


def test_topics_are_those_of_the_protocol() -> None:
    topics = Topics("spillway", "pi-7")
    assert topics.status == "spillway/pi-7/status"
    assert topics.models == "spillway/pi-7/models"
    assert topics.health == "spillway/pi-7/health"
    assert topics.report == "spillway/pi-7/report"
    assert topics.handoff_reply == "spillway/pi-7/handoff/reply" == Topics().handoff_reply_of("pi-7")
    assert topics.infer("digits") == "spillway/pi-7/infer/digits"
    assert topics.infer("digits", "cam") == "spillway/pi-7/infer/digits/cam"
    assert topics.cancel("digits", "cam") == "spillway/pi-7/cancel/digits/cam"
    assert topics.reply("cam", "digits") == "spillway/pi-7/reply/cam/digits"
    assert topics.reply("any", "digits") == "spillway/pi-7/results/digits"
    assert topics.handoff("default", "assistant") == "spillway/handoff/default/assistant"
    assert topics.handoff_filter("default") == "$share/gateway/spillway/handoff/default/+"
    assert topics.hint("default") == "spillway/fleet/default/hint"


def test_the_longest_cloud_topics_keep_to_the_strictest_broker() -> None:
    name = "n" * 64
    topics = Topics("a/b/c/" + "p" * 58, name)
    for topic in (topics.report, topics.handoff_reply, topics.handoff(name, name), topics.hint(name)):
        assert len(topic) <= 256
        assert topic.count("/") <= 7


def test_infer_topics_are_read_back() -> None:
    topics = Topics("spillway", "pi-7")
    assert topics.parse_infer("spillway/pi-7/infer/digits") == Asked("digits", "any")
    assert topics.parse_infer("spillway/pi-7/infer/digits/cam") == Asked("digits", "cam")
    assert topics.parse_cancel("spillway/pi-7/cancel/digits/cam") == Asked("digits", "cam")
    assert topics.parse_handoff("spillway/handoff/default/assistant") == ("default", "assistant")
    assert topics.parse_hint("spillway/fleet/default/hint") == "default"


@pytest.mark.parametrize(
    "topic",
    [
        "spillway/pi-7/infer/",
        "spillway/pi-7/infer/digits/",
        "spillway/pi-7/infer/digits/cam/more",
        "spillway/pi-7/infer/Digits",
        "spillway/pi-8/infer/digits",
        "spillway/pi-7/cancel/digits",
        "other/pi-7/infer/digits",
        "spillway/pi-7/infer/digits\n",
    ],
)
def test_other_topics_are_no_infer_topics(topic: str) -> None:
    assert Topics("spillway", "pi-7").parse_infer(topic) is None


@given(st.text(max_size=80))
def test_any_topic_is_read_or_refused_without_an_exception(topic: str) -> None:
    topics = Topics("spillway", "pi-7")
    for text in (topic, "spillway/pi-7/infer/" + topic, "spillway/handoff/" + topic, "spillway/fleet/" + topic):
        topics.parse_infer(text)
        topics.parse_handoff(text)
        topics.parse_hint(text)


@pytest.mark.parametrize(
    "topic",
    [
        "spillway/pi-7/reply/cam/",
        "spillway/pi-7/reply/other/x",
        "spillway/pi-7/reply/cam/+",
        "spillway/pi-7/reply/cam/#",
        "spillway/pi-7/reply/cam/\x00",
        "spillway/pi-7/reply/cam/\ud800",
        "spillway/pi-7/reply/cam/\ufffe",
        "spillway/pi-7/reply/cam/\uffff",
        "spillway/pi-7/reply/cam/\ufdd0",
        "spillway/pi-7/reply/cam/\U0010ffff",
        "$SYS/x",
        "",
        "spillway/pi-7/reply/cam/" + "x" * 1024,
    ],
)
def test_c18_a_reply_topic_elsewhere_or_with_a_wildcard_is_refused(topic: str) -> None:
    assert not Topics("spillway", "pi-7").reply_allowed(topic, "cam")


def test_c18_a_reply_topic_below_the_clients_own_or_a_configured_prefix_is_allowed() -> None:
    topics = Topics("spillway", "pi-7")
    assert topics.reply_allowed("spillway/pi-7/reply/cam/a/b", "cam")
    assert topics.reply_allowed("plant/line/3/answers", "cam", ("plant/line/",))


def test_a_handoff_head_is_read_back() -> None:
    head = wire.pack_handoff_head(HEADER)
    message = wire.parse_handoff(head + b"sealed")
    assert (message.header, message.head, message.sealed) == (HEADER, head, b"sealed")


def test_a_reply_head_is_read_back() -> None:
    head = wire.pack_reply_head(REPLY)
    message = wire.parse_reply(head + b"sealed")
    assert (message.header, message.head, message.sealed) == (REPLY, head, b"sealed")


WRONG: list[dict[str, object]] = [
    {"v": 2},
    {"kid": ""},
    {"id": "00112233445566778899AABBCCDDEEFF"},
    {"id": "00"},
    {"device": "fleet"},
    {"device": "a/b"},
    {"pool": "+"},
    {"model": "#"},
    {"ttl_ms": 0},
    {"ttl_ms": -1},
    {"ttl_ms": 1 << 62},
    {"ttl_ms": 1.5},
    {"content_type": "text/plain\r\nx"},
    {"content_type": "text"},
    {"stream": 1},
    {"more": 1},
]


@pytest.mark.parametrize("change", WRONG)
def test_a_handoff_header_with_a_wrong_field_is_refused(change: dict[str, object]) -> None:
    values = json.loads(wire.pack_handoff_head(HEADER)[6:]) | change
    raw = json.dumps(values).encode()
    with pytest.raises(HandoffError) as caught:
        wire.parse_handoff(b"SPW1" + len(raw).to_bytes(2, "big") + raw)
    assert caught.value.code == "bad_header"


@pytest.mark.parametrize(
    "change",
    [{"v": 2}, {"sequence": -1}, {"sequence": 1 << 63}, {"status": "fine"}, {"final": False}, {"status": "partial"}],
)
def test_a_reply_header_with_a_wrong_field_is_refused(change: dict[str, object]) -> None:
    values = json.loads(wire.pack_reply_head(REPLY)[6:]) | change
    raw = json.dumps(values).encode()
    with pytest.raises(HandoffError) as caught:
        wire.parse_reply(b"SPR1" + len(raw).to_bytes(2, "big") + raw)
    assert caught.value.code == "bad_header"


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"SPW1",
        b"SPW1\x00",
        b"SPW1\x00\x02{",
        b"SPW1\xff\xff" + b"x" * 70_000,
        b"SPW2\x00\x02{}",
        b"SPW1\x08\x00" + b"[" * 2048,
        b"SPW1\x00\x02\xff\xfe",
    ],
)
def test_garbage_is_refused_with_one_error(payload: bytes) -> None:
    with pytest.raises(HandoffError) as caught:
        wire.parse_handoff(payload)
    assert caught.value.code == "bad_header"


def test_a_message_over_the_brokers_limit_is_not_read() -> None:
    with pytest.raises(HandoffError) as caught:
        wire.parse_reply(b"SPR1" + bytes(wire.MAX_MESSAGE_BYTES))
    assert caught.value.code == "too_large"


@given(st.binary(max_size=200))
def test_any_bytes_end_in_the_one_error_or_are_read(payload: bytes) -> None:
    for parse, magic in ((wire.parse_handoff, b"SPW1"), (wire.parse_reply, b"SPR1")):
        for data in (payload, magic + payload, magic + len(payload).to_bytes(2, "big") + payload):
            with pytest.raises(HandoffError):
                parse(data)
