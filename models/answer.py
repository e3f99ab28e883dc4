"""Answers and errors in each dialect's own shape (PROTOCOL 2 and 3). Pure: no I/O, no clock."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from models.errors import HTTP_STATUS, RETRYABLE
from models.request import Dialect

DONE: Final = b"[DONE]"
"""What ends a stream of OpenAI's chunks over HTTP."""

_encoder = msgspec.json.Encoder()
_OPENAI_TYPES: Final = {
    "quota_exceeded": "rate_limit_error",
    "forbidden": "permission_error",
    "model_not_found": "not_found_error",
}


def render_error(dialect: Dialect, code: str, message: str) -> bytes:
    """Return the JSON body of an error in the asker's dialect; `code` is one of PROTOCOL 3."""
    if dialect is Dialect.OPEN_INFERENCE:
        return _encoder.encode({"error": f"{code}: {message}"})
    if dialect is Dialect.OPENAI:
        error = {"message": message, "type": _openai_type(code), "code": code, "param": None}
        return _encoder.encode({"error": error})
    return _encoder.encode({"error": {"code": code, "message": message, "retryable": code in RETRYABLE}})


def _openai_type(code: str) -> str:
    default = "server_error" if HTTP_STATUS[code] >= 500 else "invalid_request_error"
    return _OPENAI_TYPES.get(code, default)


def with_facts(body: bytes, facts: Mapping[str, object]) -> bytes:
    """Return a JSON object's bytes with `spillway` as one more member; raises ValueError for any other body."""
    trimmed = body.strip()
    if not (trimmed.startswith(b"{") and trimmed.endswith(b"}")):
        raise ValueError("facts go into a JSON object only")
    head = trimmed[:-1].rstrip()
    comma = b"" if head == b"{" else b","
    return b"".join((head, comma, b'"spillway":', _encoder.encode(facts), b"}"))


def render_outputs(outputs: object) -> bytes:
    """Return `{"outputs": ...}`, the Hugging Face form of an answer."""
    return _encoder.encode({"outputs": outputs})


def render_text(text: str) -> bytes:
    """Return a generated text, or a piece of a streamed one, in the Hugging Face form."""
    return render_outputs({"generated_text": text})


def render_chat(
    *, ident: str, created: int, model: str, text: str, finish_reason: str, tokens_in: int, tokens_out: int
) -> bytes:
    """Return a whole `chat.completion`; `created` is in seconds since 1970, usage in tokens."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": None,
        "finish_reason": finish_reason,
    }
    answer = _chat_head("chat.completion", ident, created, model)
    return _encoder.encode(answer | {"choices": [choice], "usage": _usage(tokens_in, tokens_out)})


def render_chunk(
    *,
    ident: str,
    created: int,
    model: str,
    text: str = "",
    first: bool = False,
    finish_reason: str | None = None,
    usage: tuple[int, int] | None = None,
) -> bytes:
    """Return one `chat.completion.chunk`; with `usage`, (tokens in, tokens out), it is the one that only tells usage.

    OpenAI gives usage in a last chunk of its own, without choices, where `stream_options.include_usage` asks for it.
    """
    answer = _chat_head("chat.completion.chunk", ident, created, model)
    if usage is not None:
        return _encoder.encode(answer | {"choices": [], "usage": _usage(*usage)})
    delta = {"role": "assistant"} if first else {}
    if text:
        delta["content"] = text
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    return _encoder.encode(answer | {"choices": [choice]})


def _chat_head(kind: str, ident: str, created: int, model: str) -> dict[str, object]:
    return {"id": ident, "object": kind, "created": created, "model": model}


def _usage(tokens_in: int, tokens_out: int) -> dict[str, int]:
    return {"prompt_tokens": tokens_in, "completion_tokens": tokens_out, "total_tokens": tokens_in + tokens_out}
