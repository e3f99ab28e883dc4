"""The surface of a request's body (PROTOCOL 2), and the traps of JSON."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.body import Envelope, parse_body, sniff
from models.errors import RequestError
from models.request import Dialect

TENSOR = b'{"name": "x", "shape": [1], "datatype": "FP32", "data": [1.5]}'


def refusal(content_type: str | None, body: bytes) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse_body(content_type, body)
    assert caught.value.code == "bad_request"
    return caught.value


@pytest.mark.parametrize(
    ("body", "dialect"),
    [
        (b'{"inputs": "a text"}', Dialect.HUGGINGFACE),
        (b'{"inputs": [1, 2, 3]}', Dialect.HUGGINGFACE),
        (b'{"inputs": {"a": 1}}', Dialect.HUGGINGFACE),
        (b'{"inputs": [{"a": 1}]}', Dialect.HUGGINGFACE),
        (b'{"inputs": [' + TENSOR + b"]}", Dialect.OPEN_INFERENCE),
        (b'{"inputs": [ \n ' + TENSOR + b', {"a": 1}]}', Dialect.HUGGINGFACE),
        (b'{"messages": [{"role": "user", "content": "hi"}]}', Dialect.OPENAI),
    ],
)
def test_the_dialect_is_told_by_the_bodys_own_fields(body: bytes, dialect: Dialect) -> None:
    parsed = parse_body("application/json", body)
    assert (parsed.dialect, parsed.content_type, parsed.body) == (dialect, "application/json", body)


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b'{"inputs": "x"}', "application/json"),
        (b' \n{"inputs": "x"}', "application/json"),
        (b'\xef\xbb\xbf{"inputs": "x"}', "application/json"),
        (b"\xff\xd8\xff\xe0rest", "image/jpeg"),
        (b"\x89PNG\r\n\x1a\nrest", "image/png"),
        (b"RIFF\x00\x00\x00\x00WAVEfmt ", "audio/wav"),
        (b"[1, 2]", "text/plain"),
        ("grüß dich".encode(), "text/plain"),
    ],
)
def test_a_body_without_a_content_type_is_told_by_its_beginning(body: bytes, content_type: str) -> None:
    assert sniff(body) == content_type
    assert parse_body(None, body).content_type == content_type


def test_a_content_types_parameters_and_case_do_not_matter() -> None:
    assert parse_body("Application/JSON; Charset=UTF-8", b'{"inputs": "x"}').content_type == "application/json"
    assert parse_body("image/jpg", b"\xff\xd8\xff").content_type == "image/jpeg"


def test_text_of_another_charset_is_refused() -> None:
    assert "iso-8859-1" in refusal("text/plain; charset=ISO-8859-1", b"text").message


@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", "video/mp4", ";", "x" * 5000])
def test_an_unknown_content_type_is_refused_by_its_name(content_type: str) -> None:
    assert refusal(content_type, b"x").message.startswith("content type: ")


@pytest.mark.parametrize("content_type", [None, "application/json", "text/plain", "image/png"])
def test_an_empty_body_is_refused(content_type: str | None) -> None:
    assert refusal(content_type, b"").message == "body: is empty"


def test_the_envelope_is_taken_out_of_the_body() -> None:
    envelope = {"id": "7", "deadline_ms": 500, "priority": 9, "privacy": "local-only", "stream": True}
    body = msgspec.json.encode({"inputs": [1.0, 2.5], "spillway": envelope, "parameters": {"top_k": 2}})
    parsed = parse_body(None, body)
    assert parsed.envelope == Envelope(id="7", deadline_ms=500, priority=9, privacy="local-only", stream=True)
    assert parsed.stream is True
    assert msgspec.json.decode(parsed.body) == {"inputs": [1.0, 2.5], "parameters": {"top_k": 2}}


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("deadline_ms", 0),
        ("deadline_ms", "500"),
        ("priority", 10),
        ("priority", -1),
        ("privacy", "secret"),
        ("stream", "true"),
        ("id", "x" * 257),
        ("deadline", 500),
    ],
)
def test_a_wrong_member_of_the_envelope_is_refused_by_its_name(member: str, value: object) -> None:
    body = msgspec.json.encode({"inputs": "x", "spillway": {member: value}})
    message = refusal(None, body).message
    assert message.startswith("spillway: ")
    assert member in message


def test_the_envelopes_stream_goes_before_the_bodys_own() -> None:
    assert parse_body(None, b'{"messages": [], "stream": true}').stream is True
    assert parse_body(None, b'{"messages": [], "stream": true, "spillway": {"stream": false}}').stream is False
    assert parse_body(None, b'{"messages": []}').stream is None
    assert refusal(None, b'{"messages": [], "stream": "yes"}').message.startswith("stream: ")


@pytest.mark.parametrize(
    "body", [b"{}", b'{"inputs": []}', b'{"inputs": [ \n]}', b'{"inputs": 5}', b'{"inputs": null}', b'{"inputs": true}']
)
def test_a_body_without_anything_to_answer_is_refused(body: bytes) -> None:
    assert "inputs" in refusal(None, body).message


def test_a_body_with_two_questions_is_refused() -> None:
    assert "both" in refusal(None, b'{"inputs": "x", "messages": []}').message


@pytest.mark.parametrize(
    "body",
    [
        b'{"inputs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"inputs":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"inputs": NaN}',
        b'{"inputs": [Infinity]}',
        b'{"inputs": "\xff"',
        b'{"\xff": 1}',
        b'{"inputs": "\\ud800"}',
        b'{"inputs": "a\nb"}',
        b'{"inputs": [1,]}',
        b'{"inputs": [01]}',
        b'{"inputs": "x"} {}',
        b'{"inputs": "x"',
        b"{",
        b"\xef\xbb\xbf{",
        b'{"inputs": "x", "spillway": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"inputs": "x", "spillway": {"deadline_ms": ' + b"9" * 1_000_000 + b"}}",
        b'{"inputs": "x", "spillway": {"deadline_ms": 1e400}}',
        b'{"inputs": "x", "spillway": {"deadline_ms": NaN}}',
        b'{"inputs": "x", "spillway": []}',
        b'{"inputs": "x", "spillway": "\\ud800"}',
        b"[1, 2]",
        b'"text"',
        b"null",
    ],
)
def test_e12_a_trap_in_json_is_one_kind_of_error(body: bytes) -> None:
    refusal("application/json", body)


def test_e12_of_a_member_that_is_there_twice_the_last_counts_for_everyone() -> None:
    parsed = parse_body(None, b'{"inputs": "x", "inputs": "y", "spillway": {"id": "1"}, "spillway": {"id": "2"}}')
    assert parsed.envelope == Envelope(id="2")
    assert parsed.body == b'{"inputs":"y"}'


def test_text_that_is_no_utf8_is_refused() -> None:
    refusal(None, b"\xfe\xfe\x00binary")


@given(st.binary(max_size=200), st.sampled_from([None, "application/json", "text/plain", "image/png"]))
def test_any_bytes_are_parsed_or_refused(body: bytes, content_type: str | None) -> None:
    try:
        parsed = parse_body(content_type, body)
    except RequestError as error:
        assert error.code == "bad_request"  # noqa: PT017 - either outcome is right, another exception is not
    else:
        assert parsed.body
