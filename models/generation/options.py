"""What an asker wants generated, from each dialect's own names. Pure: no I/O, no clock.

Options that cannot be honoured are refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from models.body import TEXT, parse_failure, type_errors
from models.errors import RequestError
from models.generation.chat import Message, parse_messages
from models.request import Dialect, Request

MAX_STOPS: Final = 16
MAX_STOP_LENGTH: Final = 256
MAX_SEED: Final = (1 << 31) - 1
MAX_LENGTH: Final = 1 << 24
MAX_SCHEMA_BYTES: Final = 64 << 10


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How tokens are drawn; None leaves it to the model's own settings. `temperature` 0 takes the likeliest."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None

    def over(self, base: Sampling) -> Sampling:
        """Return these wishes, and the base's where nothing is wished."""
        return msgspec.structs.replace(base, **msgspec.to_builtins(self))


class Guide(msgspec.Struct, frozen=True):
    """The form that an answer must have: `schema` is a JSON schema as JSON, empty for any JSON object."""

    schema: bytes = b""


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """A request to generate: `messages`, or `texts` that each want their own answer (`many`: given as a list)."""

    messages: list[Message] = []
    texts: list[str] = []
    many: bool = False
    max_tokens: int | None = None
    sampling: Sampling = Sampling()
    stops: tuple[str, ...] = ()
    guide: Guide | None = None
    include_usage: bool = False
    full_text: bool = False


_OPENAI: Final = frozenset({
    "frequency_penalty",
    "max_completion_tokens",
    "max_tokens",
    "messages",
    "min_p",
    "min_tokens",
    "model",
    "presence_penalty",
    "repetition_penalty",
    "response_format",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "temperature",
    "top_k",
    "top_p",
})  # fmt: skip
_NO_EFFECT: Final = frozenset({"metadata", "parallel_tool_calls", "service_tier", "store", "user"})
"""What OpenAI's clients may send that changes no answer."""

_NEUTRAL: Final[Mapping[str, tuple[object, ...]]] = {
    "n": (1,),
    "logprobs": (False,),
    "logit_bias": ({},),
    "tool_choice": ("none",),
    "tools": ([],),
}
"""What OpenAI's clients may send as long as it asks for nothing."""

_HUGGINGFACE: Final = frozenset({
    "do_sample",
    "frequency_penalty",
    "max_new_tokens",
    "min_new_tokens",
    "min_p",
    "presence_penalty",
    "repetition_penalty",
    "response_format",
    "return_full_text",
    "seed",
    "stop",
    "temperature",
    "top_k",
    "top_p",
})  # fmt: skip


class _Question(msgspec.Struct):
    inputs: Any
    parameters: dict[str, Any] = {}


_members = msgspec.json.Decoder(dict[str, Any])
_question = msgspec.json.Decoder(_Question)


def parse_wish(request: Request) -> Wish:
    """Read a request for a generating model; raises RequestError that names the field."""
    if request.dialect is Dialect.OPENAI:
        return _parse_openai(request.body)
    if request.dialect is not Dialect.HUGGINGFACE:
        raise RequestError("bad_request", "inputs: a generating model takes no tensors")
    if request.content_type == TEXT:
        return Wish(texts=[request.body.decode()])
    return _parse_huggingface(request)


def _decode(decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
    try:
        return decoder.decode(body)
    except type_errors as error:
        raise parse_failure("body", error) from None


def _parse_openai(body: bytes) -> Wish:
    members: dict[str, Any] = _decode(_members, body)
    for name, value in members.items():
        neutral = value is None or value in _NEUTRAL.get(name, ())
        if name not in _OPENAI | _NO_EFFECT and not neutral:
            raise RequestError("bad_request", f"{name[:80]}: is not honoured by this model")
    usage = members.get("stream_options") or {}
    if not isinstance(usage, dict) or not isinstance(usage.get("include_usage", False), bool):
        raise RequestError("bad_request", "stream_options: expected an object with include_usage")
    max_tokens = _agreed(members, ("max_completion_tokens", "max_tokens"))
    sampling = _sampling(members, "", "min_tokens")
    _check_lengths(sampling.min_tokens, max_tokens, "min_tokens")
    return Wish(
        messages=parse_messages(members["messages"]),
        max_tokens=max_tokens,
        sampling=sampling,
        stops=_stops(members.get("stop"), "stop"),
        guide=_guide(members.get("response_format"), "response_format"),
        include_usage=bool(usage.get("include_usage")),
    )


def _parse_huggingface(request: Request) -> Wish:
    question: _Question = _decode(_question, request.body)
    parameters = question.parameters
    for name in parameters.keys() - _HUGGINGFACE:
        raise RequestError("bad_request", f"parameters.{name[:80]}: is not honoured by this model")
    if question.inputs == []:
        raise RequestError("bad_request", "inputs: is an empty list")
    many = isinstance(question.inputs, list)
    texts = question.inputs if many else [question.inputs]
    for at, text in enumerate(texts):
        if not isinstance(text, str):
            raise RequestError("bad_request", f"{f'inputs[{at}]' if many else 'inputs'}: expected a text")
    if many and request.stream:
        raise RequestError("bad_request", "inputs: a list of texts cannot be streamed")
    full_text = parameters.get("return_full_text", False)
    if not isinstance(full_text, bool):
        raise RequestError("bad_request", "parameters.return_full_text: expected true or false")
    max_tokens = _whole(parameters, "max_new_tokens", 1, MAX_LENGTH, "parameters.")
    sampling = _sampling(parameters, "parameters.", "min_new_tokens")
    _check_lengths(sampling.min_tokens, max_tokens, "parameters.min_new_tokens")
    return Wish(
        texts=texts,
        many=many,
        max_tokens=max_tokens,
        sampling=sampling,
        stops=_stops(parameters.get("stop"), "parameters.stop"),
        guide=_guide(parameters.get("response_format"), "parameters.response_format"),
        full_text=full_text,
    )


def _agreed(options: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    """Return a length that goes by several names; two that differ are refused."""
    given = {name: value for name in names if (value := _whole(options, name, 1, MAX_LENGTH)) is not None}
    if len(set(given.values())) > 1:
        raise RequestError("bad_request", f"{names[1]}: {given[names[1]]} contradicts {names[0]} {given[names[0]]}")
    return next(iter(given.values()), None)


def _check_lengths(least: int | None, most: int | None, field: str) -> None:
    if least and most and least > most:
        raise RequestError("bad_request", f"{field}: {least} is over the {most} tokens at most that are asked for")


def _sampling(options: Mapping[str, Any], prefix: str, least: str) -> Sampling:
    temperature = _number(options, "temperature", 0.0, 2.0, prefix)
    sample = options.get("do_sample")
    if sample is not None and not isinstance(sample, bool):
        raise RequestError("bad_request", f"{prefix}do_sample: expected true or false")
    if sample is False:
        if temperature:
            raise RequestError("bad_request", f"{prefix}do_sample: false contradicts temperature {temperature:g}")
        temperature = 0.0
    elif sample is True and temperature == 0:
        raise RequestError("bad_request", f"{prefix}do_sample: true contradicts temperature 0")
    elif sample is True and temperature is None:
        temperature = 1.0
    return Sampling(
        temperature=temperature,
        top_k=_whole(options, "top_k", 1, 1 << 24, prefix),
        top_p=_number(options, "top_p", 0.0, 1.0, prefix),
        min_p=_number(options, "min_p", 0.0, 1.0, prefix),
        min_tokens=_whole(options, least, 0, MAX_LENGTH, prefix),
        repetition_penalty=_number(options, "repetition_penalty", 0.01, 10.0, prefix),
        frequency_penalty=_number(options, "frequency_penalty", -2.0, 2.0, prefix),
        presence_penalty=_number(options, "presence_penalty", -2.0, 2.0, prefix),
        seed=_whole(options, "seed", 0, MAX_SEED, prefix),
    )


def _whole(options: Mapping[str, Any], name: str, least: int, most: int, prefix: str = "") -> int | None:
    value = options.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise RequestError("bad_request", f"{prefix}{name}: expected a whole number from {least} to {most}")
    return value


def _number(options: Mapping[str, Any], name: str, least: float, most: float, prefix: str) -> float | None:
    value = options.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise RequestError("bad_request", f"{prefix}{name}: expected a number from {least:g} to {most:g}")
    return float(value)


def _stops(value: object, field: str) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise RequestError("bad_request", f"{field}: expected a text or a list of at most {MAX_STOPS} texts")
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP_LENGTH:
            raise RequestError("bad_request", f"{field}: expected texts of 1 to {MAX_STOP_LENGTH} letters")
    return tuple(stops)


def _guide(value: object, field: str) -> Guide | None:
    """Read OpenAI's `response_format`; the schema itself is judged where it is put to use."""
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(value, dict) or kind not in {"text", "json_object", "json_schema"}:
        raise RequestError("bad_request", f"{field}.type: expected text, json_object or json_schema")
    if kind != "json_schema":
        return Guide() if kind == "json_object" else None
    holder = value.get("json_schema")
    schema = holder.get("schema") if isinstance(holder, dict) else None
    if not isinstance(schema, dict):
        raise RequestError("bad_request", f"{field}.json_schema.schema: expected an object")
    encoded = msgspec.json.encode(schema)
    if len(encoded) > MAX_SCHEMA_BYTES:
        raise RequestError("bad_request", f"{field}.json_schema.schema: is over {MAX_SCHEMA_BYTES} bytes")
    return Guide(encoded)
