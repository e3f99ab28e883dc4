"""Between the askers' dialects and OpenAI's chat completions, both ways. Pure: no I/O, no clock."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from models.answer import render_outputs, render_text
from models.body import parse_failure, type_errors
from models.errors import HTTP_STATUS, RequestError
from models.generation.options import Guide, Wish, parse_wish
from models.request import Dialect, Request

MAX_MESSAGE: Final = 300
_BY_STATUS: Final[dict[object, str]] = {
    400: "bad_request",
    404: "model_not_found",
    408: "deadline_exceeded",
    413: "too_large",
    422: "bad_request",
    429: "overloaded",
    503: "overloaded",
    504: "deadline_exceeded",
}
_ASKERS_FAULT: Final = frozenset({"bad_request", "too_large", "model_not_found"})


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Text(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    message: _Text = msgspec.field(default_factory=_Text)
    delta: _Text = msgspec.field(default_factory=_Text)
    finish_reason: str | None = None


class Completion(msgspec.Struct):
    """What is read of an answer, or of one chunk of it; `error` is what some servers send in mid-stream."""

    model: str = ""
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw = msgspec.Raw()

    @property
    def text(self) -> str:
        """The text of an answer or a chunk."""
        return "".join(choice.message.content or choice.delta.content or "" for choice in self.choices[:1])

    @property
    def ends(self) -> bool:
        """Whether no text comes after this chunk."""
        return not self.choices or any(choice.finish_reason for choice in self.choices)


class _Failure(msgspec.Struct):
    error: Any = None
    message: Any = None
    detail: Any = None


class _Coded(msgspec.Struct):
    code: int | str | None = None
    message: Any = None


_members = msgspec.json.Decoder(dict[str, msgspec.Raw])
_completion = msgspec.json.Decoder(Completion)
_failure = msgspec.json.Decoder(_Failure)
_coded = msgspec.json.Decoder(_Coded)


def to_chats(request: Request, model: str) -> list[bytes]:
    """Return the bodies to ask an endpoint for, one for each text of a list; raises RequestError."""
    if request.dialect is Dialect.OPENAI:
        return [_pass_on(request, model)]
    wish = parse_wish(request)
    return [_chat(wish, text, model, stream=request.stream) for text in wish.texts]


def _pass_on(request: Request, model: str) -> bytes:
    """Return an asker's own chat, with the endpoint's name of the model and the box's word on streaming."""
    try:
        members = _members.decode(request.body)
    except type_errors as error:
        raise parse_failure("body", error) from None
    members["model"] = msgspec.Raw(msgspec.json.encode(model))
    members["stream"] = msgspec.Raw(b"true" if request.stream else b"false")
    if not request.stream:
        members.pop("stream_options", None)
    return msgspec.json.encode(members)


def _chat(wish: Wish, text: str, model: str, *, stream: bool) -> bytes:
    chat: dict[str, object] = {"model": model, "messages": [{"role": "user", "content": text}], "stream": stream}
    if stream:
        chat["stream_options"] = {"include_usage": True}
    if wish.max_tokens is not None:
        chat["max_tokens"] = wish.max_tokens
    if wish.stops:
        chat["stop"] = list(wish.stops)
    if wish.guide is not None:
        chat["response_format"] = _form(wish.guide)
    sampling = {name: value for name, value in msgspec.structs.asdict(wish.sampling).items() if value is not None}
    return msgspec.json.encode(chat | sampling)


def _form(guide: Guide) -> dict[str, object]:
    if not guide.schema:
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": msgspec.Raw(guide.schema)}}


def parse_completion(body: bytes) -> Completion:
    """Read an endpoint's answer or chunk; raises RequestError `cloud_unavailable`, since it is the endpoint's fault."""
    try:
        return _completion.decode(body)
    except type_errors as error:
        raise RequestError("cloud_unavailable", "the endpoint's answer is no chat completion") from error


def to_answer(request: Request, bodies: list[bytes], texts: list[str]) -> bytes:
    """Return a whole answer in the asker's dialect, from the endpoint's answers and their texts."""
    if request.dialect is Dialect.OPENAI:
        return bodies[0]
    wish = parse_wish(request)
    whole = [question + text if wish.full_text else text for question, text in zip(wish.texts, texts, strict=True)]
    return render_outputs([{"generated_text": text} for text in whole]) if wish.many else render_text(whole[0])


def to_piece(request: Request, chunk: bytes, text: str) -> bytes:
    """Return a piece of a streamed answer in the asker's dialect, from a chunk and its text."""
    return chunk if request.dialect is Dialect.OPENAI else render_text(text)


def to_last(request: Request, held: list[tuple[bytes, str]]) -> list[bytes]:
    """Return the last pieces of a streamed answer, from the chunks (and their texts) that end it."""
    if request.dialect is Dialect.OPENAI:
        return [chunk for chunk, _ in held]
    return [render_text("".join(text for _, text in held))]


def to_error(status: int, body: bytes) -> RequestError:
    """Return the asker's error for an endpoint's HTTP status; its words are passed on where it is the asker's fault."""
    return _told(_BY_STATUS.get(status, "cloud_unavailable"), _words(body), f"the endpoint answered {status}")


def to_failure(error: bytes) -> RequestError:
    """Return the asker's error for the `error` of a stream that an endpoint broke off: by its code, if we know that."""
    try:
        coded = _coded.decode(error)
    except type_errors:
        coded = _Coded()
    code = coded.code
    known = code if isinstance(code, str) and code in HTTP_STATUS else _BY_STATUS.get(code, "cloud_unavailable")
    words = _printable(coded.message)
    return _told(known, words, "the endpoint broke the answer off")


def _told(code: str, words: str, plainly: str) -> RequestError:
    if code == "bad_request" and "context" in words and "length" in words:
        code = "too_large"
    if code in _ASKERS_FAULT and words:
        return RequestError(code, f"the endpoint says: {words}")
    return RequestError(code, plainly)


def _words(body: bytes) -> str:
    """Return what a body of an error says, as one printable line."""
    try:
        failure = _failure.decode(body)
    except type_errors:
        return ""
    said = failure.error or failure.message or failure.detail
    if isinstance(said, dict):
        said = said.get("message")
    return _printable(said)


def _printable(said: object) -> str:
    text = said if isinstance(said, str) else ""
    return "".join(letter if letter.isprintable() else " " for letter in text[:MAX_MESSAGE])
