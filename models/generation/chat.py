"""Messages into a prompt, by the model's own chat template in a sandbox."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final, NoReturn

import jinja2
import msgspec
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from models.artifact import Artifact
from models.errors import ModelError, RequestError

MAX_TEMPLATE_BYTES: Final = 1 << 20
_ROLES: Final = ("assistant", "developer", "system", "tool", "user")
_TOKEN_NAMES: Final = ("bos_token", "eos_token", "pad_token", "unk_token")


class Message(msgspec.Struct, frozen=True):
    """One turn of a conversation, as text."""

    role: str
    content: str


class ChatTemplate:
    """A Jinja template of Hugging Face's form. Rendering raises RequestError where the template refuses."""

    def __init__(self, source: str, tokens: dict[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source, globals=dict(tokens))
        except jinja2.TemplateError as error:
            raise ModelError(f"the chat template is no Jinja: {error}") from error

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt that asks for the next answer of the assistant."""
        values = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._template.render(messages=values, add_generation_prompt=True)
        except RequestError:
            raise
        except Exception as error:  # a template may fail in any way that Python can
            raise RequestError("bad_request", f"messages: the model's template refuses them: {error}"[:300]) from error


def load_template(artifact: Artifact) -> ChatTemplate | None:
    """Return the model's chat template, or None for a model that only continues texts; raises ModelError."""
    config = artifact.read_json("tokenizer_config.json")
    source = _source(artifact, config)
    if source is None:
        return None
    return ChatTemplate(source, {name: _token(config.get(name)) for name in _TOKEN_NAMES})


def _source(artifact: Artifact, config: dict[str, object]) -> str | None:
    if "chat_template.jinja" in artifact.files:
        try:
            return artifact.read("chat_template.jinja", MAX_TEMPLATE_BYTES).decode()
        except UnicodeDecodeError as error:
            raise ModelError("chat_template.jinja is not UTF-8") from error
    given = config.get("chat_template")
    if isinstance(given, list):
        named = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)}
        given = named.get("default")
    return given if isinstance(given, str) else None


def _token(value: object) -> str:
    """Return a special token, which a tokenizer's configuration gives as a text or as an object."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def parse_messages(values: object) -> list[Message]:
    """Return OpenAI's `messages` as plain turns; raises RequestError that names the field."""
    if not isinstance(values, list) or not values:
        raise RequestError("bad_request", "messages: expected a non-empty list")
    return [_message(value, f"messages[{at}]") for at, value in enumerate(values)]


def _message(value: Any, field: str) -> Message:
    if not isinstance(value, dict):
        raise RequestError("bad_request", f"{field}: expected an object with role and content")
    role = value.get("role")
    if role not in _ROLES:
        raise RequestError("bad_request", f"{field}.role: expected one of {', '.join(_ROLES)}")
    if value.get("tool_calls"):
        raise RequestError("bad_request", f"{field}.tool_calls: is not honoured by this model")
    return Message("system" if role == "developer" else role, _content(value.get("content"), f"{field}.content"))


def _content(value: object, field: str) -> str:
    """Return a message's text, given whole or in parts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise RequestError("bad_request", f"{field}: expected a text or a list of text parts")
    texts = []
    for at, part in enumerate(value):
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise RequestError("bad_request", f"{field}[{at}]: this model takes text parts only")
        texts.append(part["text"])
    return "".join(texts)


def _to_json(value: Any, indent: int | None = None) -> str:
    """Say a value in JSON without HTML's escapes, which a prompt does not want."""
    encoded = msgspec.json.encode(value)
    return (msgspec.json.format(encoded, indent=indent) if indent else encoded).decode()


def _raise(message: object) -> NoReturn:
    raise RequestError("bad_request", f"messages: {message}"[:300])


def _strftime_now(layout: str) -> str:
    return datetime.now(UTC).strftime(layout)
