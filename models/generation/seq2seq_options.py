"""What an asker of a translation or a summary wants. Pure: no I/O, no clock.

Options that cannot be honoured are refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from models.body import TEXT, parse_failure, type_errors
from models.errors import RequestError
from models.generation.seq2seq_rules import Rules
from models.request import Dialect, Request

MAX_LENGTH: Final = 1 << 24

_WHOLE: Final[Mapping[str, int]] = {
    "max_length": 2,
    "max_new_tokens": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
}
"""Whole numbers that can be asked for, and the least of each."""
_NUMBERS: Final = frozenset({"repetition_penalty"})
_TEXTS: Final = frozenset({"src_lang", "tgt_lang"})
_NEUTRAL: Final[Mapping[str, tuple[object, ...]]] = {
    "clean_up_tokenization_spaces": (None, False),
    "do_sample": (None, False),
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "return_text": (None, True),
    "truncation": (None, False, "do_not_truncate"),
}
"""What may be asked for as long as it changes nothing: answers are greedy, whole, and one a text."""


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """Texts that each want their own answer (`many`: given as a list); `source` and `target` name languages."""

    texts: list[str]
    many: bool = False
    source: str | None = None
    target: str | None = None
    settings: dict[str, int | float] = {}

    def over(self, rules: Rules) -> Rules:
        """Return the model's rules with what is asked for in their place."""
        settings: dict[str, int | float | None] = dict(self.settings)
        # New tokens go before lengths, so an asker's length must not meet new tokens of the folder's.
        for new, length in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length")):
            if length in settings:
                settings.setdefault(new, None)
        return msgspec.structs.replace(rules, **settings)


class _Question(msgspec.Struct):
    inputs: Any
    parameters: dict[str, Any] = {}


_question = msgspec.json.Decoder(_Question)


def parse_wish(request: Request) -> Wish:
    """Read a request; raises RequestError that names the field."""
    if request.dialect is not Dialect.HUGGINGFACE:
        raise RequestError("bad_request", "body: this model takes `inputs`, a text or a list of texts")
    if request.content_type == TEXT:
        return Wish(texts=[request.body.decode()])
    try:
        question = _question.decode(request.body)
    except type_errors as error:
        raise parse_failure("body", error) from None
    many = isinstance(question.inputs, list)
    texts = question.inputs if many else [question.inputs]
    for at, text in enumerate(texts):
        if not isinstance(text, str):
            raise RequestError("bad_request", f"{f'inputs[{at}]' if many else 'inputs'}: expected a text")
    if not texts:
        raise RequestError("bad_request", "inputs: is an empty list")
    if many and request.stream:
        raise RequestError("bad_request", "inputs: a list of texts cannot be streamed")
    return _wish(texts, question.parameters, many=many)


def _wish(texts: list[str], parameters: Mapping[str, Any], *, many: bool) -> Wish:
    for name, value in parameters.items():
        known = name in _WHOLE or name in _NUMBERS | _TEXTS
        if not known and not any(value is neutral or value == neutral for neutral in _NEUTRAL.get(name, ())):
            raise RequestError("bad_request", f"parameters.{name[:80]}: is not honoured by this model")
    settings: dict[str, int | float] = {}
    for name in _WHOLE.keys() | _NUMBERS:
        if parameters.get(name) is not None:
            settings[name] = _whole(parameters, name) if name in _WHOLE else _penalty(parameters, name)
    source, target = (_language(parameters, name) for name in ("src_lang", "tgt_lang"))
    return Wish(texts=texts, many=many, source=source, target=target, settings=settings)


def _whole(parameters: Mapping[str, Any], name: str) -> int:
    value = parameters[name]
    if isinstance(value, bool) or not isinstance(value, int) or not _WHOLE[name] <= value <= MAX_LENGTH:
        message = f"parameters.{name}: expected a whole number from {_WHOLE[name]} to {MAX_LENGTH}, got {value!r:.40}"
        raise RequestError("bad_request", message)
    return value


def _penalty(parameters: Mapping[str, Any], name: str) -> float:
    value = parameters[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.01 <= value <= 10:
        raise RequestError("bad_request", f"parameters.{name}: expected a number from 0.01 to 10, got {value!r:.40}")
    return float(value)


def _language(parameters: Mapping[str, Any], name: str) -> str | None:
    value = parameters.get(name)
    if value is not None and not isinstance(value, str):
        raise RequestError("bad_request", f"parameters.{name}: expected a language's code, got {value!r:.40}")
    return value
