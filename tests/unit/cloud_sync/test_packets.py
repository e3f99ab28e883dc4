"""The codec against paho's, which was written by others, and against bytes that are no MQTT."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from cloud_sync.messages import Details, LinkSettings, Will, is_text
from cloud_sync.packets import (
    CONNACK,
    PUBLISH,
    Connack,
    MalformedError,
    Splitter,
    UnreadableError,
    pack_connect,
    pack_details,
    pack_puback,
    pack_publish,
    pack_subscribe,
    pack_topic,
    pack_unsubscribe,
    parse_answer,
    parse_connack,
    parse_publish,
    parse_suback,
    reason_text,
)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60).filter(is_text)
topics = texts.filter(lambda text: text != "" and not set(text) & set("+#"))
details = st.builds(
    Details,
    response_topic=st.none() | topics,
    correlation=st.none() | st.binary(max_size=300),
    content_type=st.none() | texts,
    expiry_s=st.none() | st.integers(0, 2**32 - 1),
    user=st.lists(st.tuples(texts, texts), max_size=10).map(tuple),
)


def by_paho(told: Details) -> Properties:
    properties = Properties(PacketTypes.PUBLISH)
    if told.response_topic is not None:
        properties.ResponseTopic = told.response_topic
    if told.correlation is not None:
        properties.CorrelationData = told.correlation
    if told.content_type is not None:
        properties.ContentType = told.content_type
    if told.expiry_s is not None:
        properties.MessageExpiryInterval = told.expiry_s
    if told.user:
        properties.UserProperty = list(told.user)
    return properties


def one(data: bytes) -> tuple[int, bytes]:
    """Cut one packet out of its bytes."""
    ((head, body),) = Splitter(1 << 28).feed(data)
    return head, body


@given(details)
def test_what_is_packed_here_paho_reads_as_it_was_meant(told: Details) -> None:
    read = Properties(PacketTypes.PUBLISH)
    read.unpack(pack_details(told))
    assert getattr(read, "ResponseTopic", None) == told.response_topic
    assert getattr(read, "CorrelationData", None) == told.correlation
    assert getattr(read, "ContentType", None) == told.content_type
    assert getattr(read, "MessageExpiryInterval", None) == told.expiry_s
    assert tuple(getattr(read, "UserProperty", ())) == told.user


@given(topics, details, st.binary(max_size=300), st.integers(0, 65_535), st.booleans(), st.booleans())
@example("a" * 35, Details(), b"", 1, False, False)  # lengths that are `#` and `+` as bytes
@example("a" * 43, Details(), b"", 1, False, False)
@example("a" * 127, Details(), bytes(20_000), 65_535, True, True)
def test_what_paho_packs_is_read_as_it_was_meant(
    topic: str, told: Details, payload: bytes, mid: int, retain: bool, duplicate: bool
) -> None:
    sent = pack_publish(pack_topic(topic), by_paho(told).pack(), payload, mid=mid, retain=retain, duplicate=duplicate)
    message = parse_publish(*one(sent))
    assert (message.topic, message.details, message.payload) == (topic, told, payload)
    assert (message.mid, message.qos) == (mid, 1 if mid else 0)
    assert (message.retain, message.duplicate) == (retain, duplicate)


@given(st.lists(st.binary(max_size=400), max_size=6), st.data())
def test_packets_come_out_whole_however_the_stream_is_cut(payloads: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(pack_publish(b"\x00\x01a", b"\x00", payload) for payload in payloads)
    splitter, out = Splitter(1 << 20), []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        out += splitter.feed(stream[:size])
        stream = stream[size:]
    assert [parse_publish(head, body).payload for head, body in out] == payloads


def test_a_packet_over_the_limit_is_refused_before_it_is_here() -> None:
    with pytest.raises(MalformedError, match="limit of 1000"):
        Splitter(1000).feed(b"\x30\xe9\x07")


@given(st.binary(max_size=200), st.integers(0, 15))
def test_c17_bytes_that_are_no_packet_are_malformed_and_nothing_else(body: bytes, flags: int) -> None:
    for parse in (parse_answer, parse_connack, parse_suback):
        with contextlib.suppress(MalformedError):
            parse(body)
    with contextlib.suppress(MalformedError, UnreadableError):
        parse_publish(PUBLISH << 4 | flags, body)


@given(st.binary(max_size=300))
def test_c17_a_stream_that_is_no_mqtt_is_cut_or_malformed_and_nothing_else(stream: bytes) -> None:
    splitter = Splitter(100)
    with contextlib.suppress(MalformedError):
        for at in range(len(stream)):
            splitter.feed(stream[at : at + 1])


@pytest.mark.parametrize(
    "properties",
    [
        b"\x03\x09\x00\x05",  # longer than its packet
        b"\x02\x7f\x00",  # no such property
        b"\x04\x01\x01\x01\x01",  # twice
        b"\x03\x21\x00\x05",  # one of CONNACK's
        b"\x06\x26\x00\x01\xff\x00\x00",  # no UTF-8
        b"\x02\x02\x00\x00\x00\x00",  # says less than it has
        b"\xff\xff\xff\xff\xff",  # no end
    ],
)
def test_c17_properties_that_are_not_a_publishs_are_malformed(properties: bytes) -> None:
    with pytest.raises(MalformedError):
        parse_publish(0x30, b"\x00\x01a" + properties)


def test_a_topic_that_is_no_utf_8_is_told_apart_with_its_packet_identifier() -> None:
    with pytest.raises(UnreadableError) as told:
        parse_publish(0x32, b"\x00\x01\xff\x00\x07\x00x")
    assert told.value.mid == 7


def test_a_connack_tells_what_the_broker_wants() -> None:
    properties = Properties(PacketTypes.CONNACK)
    properties.ReceiveMaximum = 10
    properties.MaximumPacketSize = 1000
    properties.ServerKeepAlive = 30
    properties.AssignedClientIdentifier = "you"
    properties.UserProperty = [("a", "b"), ("a", "b")]
    assert parse_connack(b"\x01\x00" + properties.pack()) == Connack(
        reason=0, session=True, receive_maximum=10, max_packet_bytes=1000, keep_alive_s=30, client_id="you"
    )
    assert parse_connack(b"\x00\x87\x00").reason == 0x87
    assert reason_text(0x87) == "not authorized"
    assert reason_text(0xEE) == "reason 0xee"


def test_a_broker_of_an_older_mqtt_is_named_as_such() -> None:
    assert reason_text(parse_connack(b"\x00\x01").reason) == "it speaks no MQTT 5"


def test_a_connect_is_laid_out_as_section_3_1_has_it() -> None:
    settings = LinkSettings(username="me", session_expiry_s=1, receive_maximum=2, max_packet_bytes=3, clean_start=True)
    head, body = one(pack_connect(settings, client_id="box", keep_alive_s=45, password="p", will=Will("w", b"gone")))
    properties = Properties(PacketTypes.CONNECT)
    properties.SessionExpiryInterval, properties.ReceiveMaximum, properties.MaximumPacketSize = 1, 2, 3
    start = b"\x00\x04MQTT\x05\xee\x00\x2d"
    packed = body[len(start) : len(start) + len(properties.pack())]
    read = Properties(PacketTypes.CONNECT)
    read.unpack(packed)
    assert (head, body[: len(start)]) == (0x10, start)
    told = [getattr(read, name) for name in ("SessionExpiryInterval", "ReceiveMaximum", "MaximumPacketSize")]
    assert told == [1, 2, 3]
    assert body[len(start) + len(packed) :] == b"\x00\x03box\x00\x00\x01w\x00\x04gone\x00\x02me\x00\x01p"


def test_the_small_packets_are_laid_out_as_chapter_3_has_them() -> None:
    assert (
        pack_subscribe(258, [("a/+", 1, True), ("b", 0, False)]) == b"\x82\x0d\x01\x02\x00\x00\x03a/+\x09\x00\x01b\x00"
    )
    assert pack_unsubscribe(1, "a") == b"\xa2\x06\x00\x01\x00\x00\x01a"
    assert pack_puback(258) == b"\x40\x02\x01\x02"
    assert parse_answer(b"\x01\x02") == (258, 0)
    assert parse_answer(b"\x01\x02\x87\x00") == (258, 0x87)
    assert parse_suback(b"\x01\x02\x00\x01\x87") == (258, b"\x01\x87")
    assert one(b"\x20\x03\x00\x00\x00") == (CONNACK << 4, b"\x00\x00\x00")


@pytest.mark.parametrize("length", [0, 127, 128, 16_383, 16_384, 2_097_151, 2_097_152])
def test_lengths_are_whole_at_each_step_of_their_encoding(length: int) -> None:
    head, body = one(pack_publish(b"", b"", bytes(length)))
    assert (head, len(body)) == (0x30, length)


@pytest.mark.parametrize("topic", ["", "a/+", "#", "a\x00", "a" * 65_536])
def test_what_is_no_topic_is_refused(topic: str) -> None:
    with pytest.raises(ValueError, match="no "):
        pack_topic(topic)
