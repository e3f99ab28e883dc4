"""Messages into a prompt, by the model's own chat template in a sandbox."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Final, NoReturn

import jinja2
import msgspec
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from models.artifact import Artifact
from models.errors import ModelError, RequestError

MAX_TEMPLATE_BYTES: Final = 1 << 20
MAX_RENDER_S: Final = 2.0
MAX_OPERAND: Final = 1 << 16
MAX_EXPONENT: Final = 64
_TICK: Final = "_watch_tick"
_ROLES: Final = ("assistant", "developer", "system", "tool", "user")
_TOKEN_NAMES: Final = ("bos_token", "eos_token", "pad_token", "unk_token")


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """One turn of a conversation, as text; `tool_calls`, `tool_call_id` and `name` go to the template as they came."""

    role: str
    content: str
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[Any] | None = None

    def mapped(self, change: Callable[[str], str]) -> Message:
        """Return the message with every text that its asker wrote changed."""
        members = {name: _mapped(value, change) for name, value in msgspec.structs.asdict(self).items()}
        return Message(**members | {"role": self.role})


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with products and powers bounded too."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute a product or power of moderate size; raises SecurityError."""
        sizes = [len(value) if hasattr(value, "__len__") else abs(value) for value in (left, right)]
        if max(sizes) > MAX_OPERAND or (operator == "**" and sizes[1] > MAX_EXPONENT):
            raise SecurityError(f"{operator} of values that large")
        return super().call_binop(context, operator, left, right)


class _Watch:
    """Ends a rendering that takes too long; `deadline` is on the monotonic clock, in seconds."""

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline

    def tick(self) -> str:
        """Raise RequestError where the time is over."""
        if time.monotonic() > self._deadline:
            raise RequestError("bad_request", "messages: the model's template takes too long over them")
        return ""


def _watched(template: nodes.Template) -> nodes.Template:
    """Let every loop and macro look at the clock each time round: only these can make a template long."""
    turning: list[nodes.For | nodes.Macro] = [*template.find_all(nodes.For), *template.find_all(nodes.Macro)]
    for node in turning:
        node.body.insert(0, nodes.ExprStmt(nodes.Call(nodes.Name(_TICK, "load"), [], [], None, None)))
    return template


class ChatTemplate:
    """A Jinja template of Hugging Face's form. Rendering raises RequestError where the template refuses."""

    def __init__(self, source: str, tokens: dict[str, str]) -> None:
        environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _strftime_now
        try:
            code = environment.compile(_watched(environment.parse(source)))
            self._template = environment.template_class.from_code(environment, code, {**environment.globals, **tokens})
        except (jinja2.TemplateError, RecursionError) as error:
            raise ModelError(f"the chat template is no Jinja: {error}") from error

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt that asks for the next answer of the assistant."""
        values = [msgspec.to_builtins(message) for message in messages]
        watch = _Watch(time.monotonic() + MAX_RENDER_S)
        try:
            return self._template.render({"messages": values, "add_generation_prompt": True, _TICK: watch.tick})
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
    calls = _tool_calls(value.get("tool_calls"), f"{field}.tool_calls")
    given = value.get("content")
    return Message(
        "system" if role == "developer" else role,
        "" if given is None and calls else _content(given, f"{field}.content"),
        name=_text(value.get("name"), f"{field}.name"),
        tool_call_id=_text(value.get("tool_call_id"), f"{field}.tool_call_id"),
        tool_calls=calls,
    )


def _text(value: object, field: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise RequestError("bad_request", f"{field}: expected a text")
    return value


def _tool_calls(value: object, field: str) -> list[Any] | None:
    """Return an assistant's calls as templates expect them: with arguments as an object, not as its JSON."""
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise RequestError("bad_request", f"{field}: expected a list")
    return [_tool_call(call, f"{field}[{at}]") for at, call in enumerate(value)]


def _tool_call(value: Any, field: str) -> dict[str, Any]:
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RequestError("bad_request", f"{field}.function: expected an object with name and arguments")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments)
        except (msgspec.DecodeError, RecursionError):
            raise RequestError("bad_request", f"{field}.function.arguments: expected JSON") from None
    return {**value, "function": {**function, "arguments": arguments}}


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """Return a value with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_mapped(item, change) for item in value]
    if isinstance(value, dict):
        return {change(name): _mapped(item, change) for name, item in value.items()}
    return value


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
