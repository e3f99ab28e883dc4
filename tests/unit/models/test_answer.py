"""Answers and errors in each dialect's shape."""

from __future__ import annotations

import json
from typing import Any

import pytest

from models.answer import render_chat, render_chunk, render_error, render_outputs, render_text, with_facts
from models.errors import HTTP_STATUS
from models.request import Dialect


def test_an_error_in_the_hugging_face_form_says_whether_to_ask_again() -> None:
    body = json.loads(render_error(Dialect.HUGGINGFACE, "overloaded", "no room"))
    assert body == {"error": {"code": "overloaded", "message": "no room", "retryable": True}}


def test_an_error_in_openais_form_has_a_type_its_clients_know() -> None:
    body = json.loads(render_error(Dialect.OPENAI, "too_large", "300 tokens"))
    expected = {"message": "300 tokens", "type": "invalid_request_error", "code": "too_large", "param": None}
    assert body == {"error": expected}


def test_an_error_in_the_open_inference_form_is_one_text() -> None:
    body = json.loads(render_error(Dialect.OPEN_INFERENCE, "bad_request", "inputs[0].shape: wrong"))
    assert body == {"error": "bad_request: inputs[0].shape: wrong"}


@pytest.mark.parametrize("dialect", list(Dialect))
@pytest.mark.parametrize("code", list(HTTP_STATUS))
def test_every_code_has_a_form_in_every_dialect(dialect: Dialect, code: str) -> None:
    assert "error" in json.loads(render_error(dialect, code, 'a "quoted"\nmessage\x00'))


@pytest.mark.parametrize("body", [b"{}", b'{"outputs":1}', b' {"outputs": {"a": "}"} } \n'])
def test_facts_are_added_to_an_object_without_touching_it(body: bytes) -> None:
    whole: dict[str, Any] = json.loads(with_facts(body, {"route": "local", "queued_ms": 1.5}))
    assert whole.pop("spillway") == {"route": "local", "queued_ms": 1.5}
    assert whole == json.loads(body)


@pytest.mark.parametrize("body", [b"[1]", b"", b'"text"', b"\x89PNG"])
def test_facts_have_no_place_in_another_body(body: bytes) -> None:
    with pytest.raises(ValueError, match="object"):
        with_facts(body, {})


def test_outputs_and_texts_have_the_hugging_face_form() -> None:
    assert render_outputs([1.5]) == b'{"outputs":[1.5]}'
    assert json.loads(render_text("grüß")) == {"outputs": {"generated_text": "grüß"}}


def test_a_whole_chat_answer_counts_its_tokens() -> None:
    body = json.loads(
        render_chat(
            ident="chatcmpl-1", created=7, model="m", text="hi", finish_reason="stop", tokens_in=3, tokens_out=2
        )
    )
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "hi", "refusal": None}
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def test_chunks_begin_with_the_role_and_end_with_usage_alone() -> None:
    first = json.loads(render_chunk(ident="c", created=7, model="m", text="a", first=True))
    last = json.loads(render_chunk(ident="c", created=7, model="m", finish_reason="length"))
    usage = json.loads(render_chunk(ident="c", created=7, model="m", usage=(3, 2)))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "a"}
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "length")
    assert (usage["choices"], usage["usage"]["total_tokens"]) == ([], 5)
