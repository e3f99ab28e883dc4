"""How a text is put to a translating or summarising model: its prefix, or the tokens of its languages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from models.artifact import Artifact
from models.errors import ModelError, RequestError
from models.generation.seq2seq_rules import Rules, with_settings
from models.tokens import Tokenizer

MAX_SHOWN: Final = 20


class Worded(msgspec.Struct, frozen=True):
    """A text in tokens, and the rules for what is written about it."""

    tokens: list[int]
    rules: Rules


class _Tasks(msgspec.Struct, frozen=True):
    """What `task_specific_params` of a `config.json` hold, and the prefix of every text."""

    prefix: str
    settings: dict[str, dict[str, Any]]


class Wording:
    """A folder's way to put a text; raises ModelError for settings that are not honoured, RequestError for languages.

    Many-language models name the language of a text by a token before or behind it, and that of the answer by its
    first token; T5 names both in a prefix.
    """

    def __init__(self, artifact: Artifact, tokenizer: Tokenizer, rules: Rules, task: str) -> None:
        self._tokenizer = tokenizer
        self._task = task
        self._config = artifact.read_json("tokenizer_config.json")
        self._tasks = _load_tasks(artifact.read_json("config.json"))
        self._own = rules
        self._rules = {name: with_settings(rules, values) for name, values in self._tasks.settings.items()}
        self._kind = _kind(self._config)

    def put(self, text: str, source: str | None, target: str | None) -> Worded:
        """Return a text in tokens, with the rules for its answer."""
        if self._kind:
            return self._with_languages(text, source, target)
        task = self._task
        if source is not None or target is not None:
            task = self._pair(source, target)
        prefix = self._tasks.settings.get(task, {}).get("prefix", self._tasks.prefix)
        return Worded(self._tokenizer.encode(f"{prefix}{text}").ids, self._rules.get(task, self._own))

    def _pair(self, source: str | None, target: str | None) -> str:
        """Return the name of T5's task for two languages."""
        task = f"translation_{source}_to_{target}"
        if task not in self._rules:
            known = ", ".join(sorted(name for name in self._rules if name.startswith("translation_"))[:MAX_SHOWN])
            raise RequestError(
                "bad_request", f"parameters.src_lang, tgt_lang: the model knows {known or 'one pair only'}"
            )
        return task

    def _with_languages(self, text: str, source: str | None, target: str | None) -> Worded:
        own = self._tokenizer.encode(text, special=False).ids
        code = self._language("src_lang", source)
        end = self._end()
        before = self._kind == "before"
        tokens = [code, *own, end] if before else [*own, end, code]
        if target is None and self._own.forced_bos_token_id is not None and not self._config.get("tgt_lang"):
            return Worded(tokens, self._own)
        first = self._language("tgt_lang", target)
        return Worded(tokens, msgspec.structs.replace(self._own, forced_bos_token_id=first))

    def _language(self, name: str, asked: str | None) -> int:
        given = asked or self._config.get(name)
        if not isinstance(given, str):
            raise RequestError("bad_request", f"parameters.{name}: this model needs a language")
        number = self._tokenizer.number(given)
        number = self._tokenizer.number(f"__{given}__") if number is None else number
        if number is None:
            raise RequestError("bad_request", f"parameters.{name}: the model does not know {given[:40]!r}")
        return number

    def _end(self) -> int:
        token = self._config.get("eos_token", "</s>")
        token = token.get("content") if isinstance(token, dict) else token
        number = self._tokenizer.number(token) if isinstance(token, str) else None
        if number is None:
            raise ModelError("tokenizer_config.json: eos_token is not in the vocabulary")
        return number


def _kind(config: Mapping[str, object]) -> str:
    """Return where a text's language stands, `before` it or `behind` it; empty for a model of one pair."""
    name = str(config.get("tokenizer_class", "")).removesuffix("Fast")
    if name in {"MBart50Tokenizer", "M2M100Tokenizer"}:
        return "before"
    if name == "NllbTokenizer":
        return "behind" if config.get("legacy_behaviour") is True else "before"
    return "behind" if name == "MBartTokenizer" else ""


def _load_tasks(config: Mapping[str, object]) -> _Tasks:
    prefix = config.get("prefix")
    given = config.get("task_specific_params")
    tasks = given if isinstance(given, dict) else {}
    # The pipelines settle how long an answer may get before they look here.
    settings = {
        str(name): {key: value for key, value in values.items() if key != "max_length"}
        for name, values in tasks.items()
        if isinstance(values, dict)
    }
    for values in settings.values():
        if not isinstance(values.get("prefix", ""), str):
            raise ModelError("config.json: a prefix of task_specific_params is no text")
    return _Tasks(prefix if isinstance(prefix, str) else "", settings)
