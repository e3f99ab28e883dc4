"""The gateway's way to an endpoint: dialects, streams, retries."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import httpx
import msgspec
import pytest

from cloud_sync.gateway.chat import to_chats, to_error
from cloud_sync.gateway.upstream import Piece, Upstream
from models.errors import RequestError
from models.request import Dialect, Request
from tests.support.virtual_time import virtual_time

TEXT = Request(model="assistant", content_type="text/plain", body=b"a prompt", dialect=Dialect.HUGGINGFACE)


def chat(**changes: object) -> Request:
    body: dict[str, object] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    return Request(
        model="assistant",
        content_type="application/json",
        body=msgspec.json.encode(body | changes),
        dialect=Dialect.OPENAI,
    )


def inputs(value: object = "hi", **parameters: object) -> Request:
    body = msgspec.json.encode({"inputs": value, "parameters": parameters})
    return Request(model="assistant", content_type="application/json", body=body, dialect=Dialect.HUGGINGFACE)


# Dialects.


def test_a_chat_passes_with_the_endpoints_name_of_the_model_and_all_else_unchanged() -> None:
    (body,) = to_chats(
        chat(temperature=0.5, tools=[{"a": 1}], stream=True, stream_options={"include_usage": True}), "big"
    )
    assert json.loads(body) == {
        "model": "big",
        "messages": [{"role": "user", "content": "hi"}],
        "temperature": 0.5,
        "tools": [{"a": 1}],
        "stream": False,
    }


def test_an_answers_form_goes_to_the_endpoint_too() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "integer"}}}
    assert json.loads(to_chats(inputs(response_format=form), "big")[0])["response_format"] == form
    plain = {"type": "json_object"}
    assert json.loads(to_chats(inputs(response_format=plain), "big")[0])["response_format"] == plain


def test_a_text_becomes_a_chat_of_one_message() -> None:
    assert json.loads(to_chats(TEXT, "big")[0]) == {
        "model": "big",
        "messages": [{"role": "user", "content": "a prompt"}],
        "stream": False,
    }


def test_hugging_face_parameters_become_openais() -> None:
    request = inputs(max_new_tokens=5, temperature=0.5, top_p=0.9, seed=1, stop=["x"], do_sample=True)
    assert json.loads(to_chats(request, "big")[0]) == {
        "model": "big",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": False,
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 1,
        "stop": ["x"],
    }


def test_a_list_of_texts_becomes_as_many_chats() -> None:
    assert len(to_chats(inputs(["a", "b"]), "big")) == 2


@pytest.mark.parametrize("request_", [inputs({"a": 1}), inputs(beams=4), inputs([])])
def test_what_cannot_be_asked_of_a_chat_endpoint_is_refused_by_name(request_: Request) -> None:
    with pytest.raises(RequestError) as caught:
        to_chats(request_, "big")
    assert caught.value.code == "bad_request"


@pytest.mark.parametrize(
    ("status", "body", "code", "said"),
    [
        (400, b'{"error": {"message": "no such field"}}', "bad_request", "no such field"),
        (400, b'{"message": "maximum context length is 2048"}', "too_large", "2048"),
        (401, b'{"error": {"message": "key sk-123"}}', "cloud_unavailable", "401"),
        (403, b"", "cloud_unavailable", "403"),
        (404, b'{"error": "model \\"big\\" not found"}', "model_not_found", "not found"),
        (413, b"", "too_large", "413"),
        (422, b'{"detail": "bad\\nline"}', "bad_request", "bad line"),
        (429, b"", "overloaded", "429"),
        (500, b'{"error": {"message": "secret trace"}}', "cloud_unavailable", "500"),
        (503, b"<html>", "overloaded", "503"),
        (504, b"", "deadline_exceeded", "504"),
        (302, b"", "cloud_unavailable", "302"),
        (400, b"[" * 5000, "bad_request", "400"),
    ],
)
def test_each_http_status_becomes_the_askers_error(status: int, body: bytes, code: str, said: str) -> None:
    error = to_error(status, body)
    assert error.code == code
    assert said in error.message
    assert "sk-123" not in error.message
    assert "secret" not in error.message


# Endpoint.


def upstream(handler: Callable[[httpx.Request], httpx.Response], **models: str) -> Upstream:
    return Upstream("http://endpoint/v1", models=models, api_key="key", transport=httpx.MockTransport(handler))


async def asked(endpoint: Upstream, request: Request, within_s: float = 30.0) -> list[Piece]:
    deadline_at = asyncio.get_running_loop().time() + within_s
    return [piece async for piece in endpoint.answer(request, deadline_at)]


def completion(text: str = "hello") -> bytes:
    return msgspec.json.encode(
        {
            "id": "c1",
            "object": "chat.completion",
            "model": "big-1",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
        }
    )


def events(*chunks: object, done: bool = True) -> bytes:
    lines = [b": ping\n\n"] + [b"data: " + msgspec.json.encode(chunk) + b"\n\n" for chunk in chunks]
    return b"".join(lines) + (b"data: [DONE]\n\n" if done else b"")


def chunk(text: str | None = None, finish: str | None = None) -> dict[str, object]:
    delta = {} if text is None else {"content": text}
    return {"model": "big-1", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


USAGE = {"model": "big-1", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}


@virtual_time
async def test_a_chats_answer_passes_byte_for_byte() -> None:
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, content=completion())

    (piece,) = await asked(upstream(handler, assistant="big"), chat())
    assert piece.content.body == completion()
    assert (piece.final, piece.content.model, piece.content.tokens_in, piece.content.tokens_out) == (
        True,
        "big-1",
        3,
        4,
    )
    assert seen[0].url == "http://endpoint/v1/chat/completions"
    assert seen[0].headers["Authorization"] == "Bearer key"
    assert json.loads(seen[0].content)["model"] == "big"


@virtual_time
async def test_a_texts_answer_comes_in_its_own_dialect() -> None:
    endpoint = upstream(lambda _: httpx.Response(200, content=completion()))
    assert [p.content.body for p in await asked(endpoint, TEXT)] == [b'{"outputs":{"generated_text":"hello"}}']
    (piece,) = await asked(endpoint, inputs(["a", "b"], return_full_text=True))
    assert json.loads(piece.content.body) == {"outputs": [{"generated_text": "ahello"}, {"generated_text": "bhello"}]}
    assert piece.content.tokens_in == 6


@virtual_time
async def test_a_streamed_chat_passes_chunk_by_chunk_and_ends_with_its_last() -> None:
    body = events(chunk(""), chunk("he"), chunk("llo"), chunk(None, "stop"), USAGE)
    endpoint = upstream(lambda _: httpx.Response(200, content=body))
    pieces = await asked(endpoint, msgspec.structs.replace(chat(), stream=True))
    assert [json.loads(p.content.body) for p in pieces] == [
        chunk(""),
        chunk("he"),
        chunk("llo"),
        chunk(None, "stop"),
        USAGE,
    ]
    assert [p.final for p in pieces] == [False] * 4 + [True]
    assert (pieces[-1].content.tokens_out, pieces[-1].content.model) == (4, "big-1")


@virtual_time
async def test_a_streamed_text_gives_its_pieces_and_their_sum_is_the_text() -> None:
    body = events(chunk(""), chunk("he"), chunk("llo"), chunk("!", "stop"), USAGE)
    endpoint = upstream(lambda _: httpx.Response(200, content=body))
    pieces = await asked(endpoint, msgspec.structs.replace(TEXT, stream=True))
    texts = [json.loads(p.content.body)["outputs"]["generated_text"] for p in pieces]
    assert texts == ["he", "llo", "!"]
    assert [p.final for p in pieces] == [False, False, True]


@pytest.mark.parametrize(
    "body",
    [
        events(chunk("he"), done=False),
        events(chunk("he")),
        events(chunk("he"), {"error": {"message": "boom"}}),
        b"data: nonsense\n\n",
        b"",
    ],
)
@virtual_time
async def test_a_stream_that_breaks_off_is_an_error_and_never_a_short_answer(body: bytes) -> None:
    endpoint = upstream(lambda _: httpx.Response(200, content=body))
    with pytest.raises(RequestError) as caught:
        await asked(endpoint, msgspec.structs.replace(TEXT, stream=True))
    assert caught.value.code == "cloud_unavailable"


@pytest.mark.parametrize("body", [b"", b"{}", b"<html>", b'{"choices": []}', b"[" * 9000])
@virtual_time
async def test_an_answer_that_is_no_completion_is_the_endpoints_fault(body: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        await asked(upstream(lambda _: httpx.Response(200, content=body)), chat())
    assert caught.value.code == "cloud_unavailable"


@virtual_time
async def test_an_answer_without_end_is_cut_off_at_the_limit() -> None:
    endless = httpx.Response(200, content=b"x" * (9 << 20))
    with pytest.raises(RequestError) as caught:
        await asked(upstream(lambda _: endless), chat())
    assert caught.value.code == "too_large"


@virtual_time
async def test_a_model_that_the_pool_does_not_offer_is_not_asked_for() -> None:
    with pytest.raises(RequestError) as caught:
        await asked(upstream(lambda _: httpx.Response(200), other="big"), chat())
    assert caught.value.code == "model_not_found"


@virtual_time
async def test_d6_a_busy_endpoint_is_asked_again_after_what_it_says_while_the_deadline_lasts() -> None:
    loop = asyncio.get_running_loop()
    times: list[float] = []

    def handler(_request: httpx.Request) -> httpx.Response:
        times.append(loop.time() - 1000)
        answers = [
            httpx.Response(429, headers={"Retry-After": "3"}),
            httpx.Response(503),
            httpx.Response(200, content=completion()),
        ]
        return answers[len(times) - 1]

    assert len(await asked(upstream(handler), chat())) == 1
    assert 3.0 <= times[1] <= 3.1
    assert 3.5 <= times[2] <= 4.1


@virtual_time
async def test_d6_a_busy_endpoint_that_asks_for_more_time_than_there_is_ends_in_overloaded_at_once() -> None:
    endpoint = upstream(lambda _: httpx.Response(429, headers={"Retry-After": "60"}))
    with pytest.raises(RequestError) as caught:
        await asked(endpoint, chat(), within_s=20)
    assert caught.value.code == "overloaded"
    assert asyncio.get_running_loop().time() < 1001


@virtual_time
async def test_an_endpoint_that_is_down_is_tried_five_times() -> None:
    tried = 0

    def handler(request: httpx.Request) -> httpx.Response:
        nonlocal tried
        tried += 1
        raise httpx.ConnectError("refused", request=request)

    with pytest.raises(RequestError) as caught:
        await asked(upstream(handler), chat())
    assert (caught.value.code, tried) == ("cloud_unavailable", 5)


@virtual_time
async def test_the_deadline_is_passed_on_to_the_endpoints_connection() -> None:
    timeouts: list[dict[str, float]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        timeouts.append(request.extensions["timeout"])
        raise httpx.ReadTimeout("slow", request=request)

    with pytest.raises(RequestError) as caught:
        await asked(upstream(handler), chat(), within_s=7)
    assert caught.value.code == "deadline_exceeded"
    assert timeouts == [{"connect": 5.0, "read": 7.0, "write": 7.0, "pool": 7.0}]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        ({"code": "deadline_exceeded", "message": "late"}, "deadline_exceeded", "broke"),
        ({"code": "too_large", "message": "only 2048 tokens"}, "too_large", "2048"),
        ({"code": "bad_request", "message": "no\nsuch field"}, "bad_request", "no such field"),
        ({"code": "overloaded", "message": "full"}, "overloaded", "broke"),
        ({"code": "internal", "message": "secret"}, "internal", "broke"),
        ({"code": 400, "message": "no such field"}, "bad_request", "no such field"),
        ({"code": "insufficient_quota"}, "cloud_unavailable", "broke"),
        ({"code": ["overloaded"]}, "cloud_unavailable", "broke"),
        ({"message": 1}, "cloud_unavailable", "broke"),
        ("boom", "cloud_unavailable", "broke"),
    ],
)
@virtual_time
async def test_an_error_in_mid_stream_becomes_the_askers_error_by_its_code(error: object, code: str, said: str) -> None:
    body = events(chunk(""), chunk("he"), {"error": error})
    endpoint = upstream(lambda _: httpx.Response(200, content=body))
    with pytest.raises(RequestError) as caught:
        await asked(endpoint, msgspec.structs.replace(chat(), stream=True))
    assert caught.value.code == code
    assert said in caught.value.message
    assert "secret" not in caught.value.message


@pytest.mark.parametrize("opening", [[], [chunk("")]])
@virtual_time
async def test_d6_a_stream_that_says_overloaded_before_any_text_is_asked_for_again(opening: list[object]) -> None:
    bodies = [events(*opening, {"error": {"code": "overloaded"}})] * 2
    bodies.append(events(chunk(""), chunk("hi"), chunk(None, "stop")))
    endpoint = upstream(lambda _: httpx.Response(200, content=bodies.pop(0)))
    pieces = await asked(endpoint, msgspec.structs.replace(chat(), stream=True))
    assert [json.loads(piece.content.body) for piece in pieces] == [chunk(""), chunk("hi"), chunk(None, "stop")]
    assert 1000.7 <= asyncio.get_running_loop().time() <= 1001.6


@virtual_time
async def test_d6_a_stream_that_says_overloaded_again_and_again_ends_in_overloaded() -> None:
    tried: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        tried.append(request)
        return httpx.Response(200, content=events({"error": {"code": "overloaded"}}))

    with pytest.raises(RequestError) as caught:
        await asked(upstream(handler), msgspec.structs.replace(TEXT, stream=True))
    assert (caught.value.code, len(tried)) == ("overloaded", 5)


@virtual_time
async def test_a_stream_that_says_overloaded_after_text_is_not_begun_anew() -> None:
    tried: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        tried.append(request)
        return httpx.Response(200, content=events(chunk("he"), {"error": {"code": "overloaded"}}))

    with pytest.raises(RequestError) as caught:
        await asked(upstream(handler), msgspec.structs.replace(TEXT, stream=True))
    assert (caught.value.code, len(tried)) == ("overloaded", 1)
