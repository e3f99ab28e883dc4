"""What an asker wants generated, and what is refused by name."""

from __future__ import annotations

import json

import pytest

from models.body import parse_body
from models.errors import RequestError
from models.generation.options import MAX_SCHEMA_BYTES, Guide, Sampling, Wish, parse_wish
from models.request import Request

HELLO = {"messages": [{"role": "user", "content": "hello"}]}


def wish(body: dict[str, object]) -> Wish:
    parsed = parse_body("application/json", json.dumps(body).encode())
    return parse_wish(
        Request(
            model="m",
            content_type=parsed.content_type,
            body=parsed.body,
            dialect=parsed.dialect,
            stream=bool(parsed.stream),
        )
    )


def refusal(body: dict[str, object]) -> RequestError:
    with pytest.raises(RequestError) as caught:
        wish(body)
    assert caught.value.code == "bad_request"
    return caught.value


def test_openais_options_are_read() -> None:
    read = wish(HELLO | {"max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "seed": 7, "stop": "\n", "user": "me"})
    assert read.max_tokens == 9
    assert read.sampling == Sampling(temperature=0.5, top_p=0.9, seed=7)
    assert read.stops == ("\n",)


def test_the_length_goes_by_either_of_openais_names() -> None:
    assert wish(HELLO | {"max_completion_tokens": 5}).max_tokens == 5
    assert wish(HELLO | {"max_tokens": 5, "max_completion_tokens": 5}).max_tokens == 5


def test_hugging_faces_options_are_read() -> None:
    parameters = {"max_new_tokens": 9, "do_sample": True, "top_k": 5, "stop": ["a", "b"], "return_full_text": True}
    read = wish({"inputs": ["x", "y"], "parameters": parameters})
    assert (read.texts, read.many, read.max_tokens, read.full_text) == (["x", "y"], True, 9, True)
    assert read.sampling == Sampling(temperature=1.0, top_k=5)
    assert read.stops == ("a", "b")


def test_the_likeliest_token_is_taken_where_nothing_is_to_be_drawn() -> None:
    assert wish({"inputs": "x", "parameters": {"do_sample": False}}).sampling.temperature == 0.0


def test_wishes_go_over_the_models_own_settings() -> None:
    base = Sampling(temperature=0.7, top_k=20, seed=None)
    assert Sampling().over(base) == base
    assert Sampling(temperature=0.0, seed=5).over(base) == Sampling(temperature=0.0, top_k=20, seed=5)


def test_an_answers_form_is_read() -> None:
    assert wish(HELLO | {"response_format": {"type": "text"}}).guide is None
    assert wish(HELLO | {"response_format": {"type": "json_object"}}).guide == Guide()
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}}
    assert wish(HELLO | {"response_format": schema}).guide == Guide(b'{"type":"integer"}')
    assert wish({"inputs": "x", "parameters": {"response_format": schema}}).guide == Guide(b'{"type":"integer"}')


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"max_tokens": 9, "max_completion_tokens": 5}, "max_tokens: 9 contradicts max_completion_tokens 5"),
        ({"max_tokens": 3, "min_tokens": 5}, "min_tokens: 5 is over the 3 tokens"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, object], field: str) -> None:
    assert refusal(HELLO | options).message.startswith(field)


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_drawing_and_temperature_may_not_contradict_each_other(temperature: float) -> None:
    parameters = {"do_sample": temperature == 0, "temperature": temperature}
    assert refusal({"inputs": "x", "parameters": parameters}).message.startswith("parameters.do_sample:")


def test_options_that_ask_for_nothing_are_taken() -> None:
    neutral = {"n": 1, "logprobs": False, "presence_penalty": 0.0, "tools": [], "response_format": {"type": "text"}}
    assert wish(HELLO | neutral | {"frequency_penalty": None}).messages


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2),
        ("tools", [{"type": "function"}]),
        ("response_format", {"type": "xml"}),
        ("response_format", "json"),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {"title": "x" * MAX_SCHEMA_BYTES}}}),
        ("logprobs", True),
        ("presence_penalty", 2.5),
        ("min_tokens", -1),
        ("max_token", 5),
        ("max_tokens", 0),
        ("max_tokens", -5),
        ("max_tokens", 1 << 40),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", 3),
        ("temperature", "hot"),
        ("top_p", -0.1),
        ("top_k", 0),
        ("seed", -1),
        ("seed", 1 << 40),
        ("stop", [""]),
        ("stop", ["x"] * 17),
        ("stop", 5),
        ("stop", [["x"]]),
        ("stream_options", 5),
        ("stream_options", {"include_usage": "yes"}),
        ("messages", []),
    ],
)
def test_an_option_that_cannot_be_honoured_is_refused_by_name(name: str, value: object) -> None:
    assert refusal(HELLO | {name: value}).message.startswith(name)


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"max_length": 5}, "parameters.max_length:"),
        ({"num_beams": 4}, "parameters.num_beams:"),
        ({"do_sample": "yes"}, "parameters.do_sample:"),
        ({"do_sample": []}, "parameters.do_sample:"),
        ({"max_new_tokens": -1}, "parameters.max_new_tokens:"),
        ({"return_full_text": 1}, "parameters.return_full_text:"),
    ],
)
def test_a_parameter_that_cannot_be_honoured_is_refused_by_name(parameters: dict[str, object], field: str) -> None:
    assert refusal({"inputs": "x", "parameters": parameters}).message.startswith(field)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"inputs": ["x", 5]}, "inputs[1]:"),
        ({"inputs": {"text": "x"}}, "inputs:"),
        ({"inputs": ["x", "y"], "stream": True}, "inputs:"),
        ({"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [1]}]}, "inputs:"),
    ],
)
def test_what_is_no_text_is_refused(body: dict[str, object], field: str) -> None:
    assert refusal(body).message.startswith(field)
