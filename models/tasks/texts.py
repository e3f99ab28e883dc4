"""What tasks on texts share: tokens into the graph, its length, and texts from a question. A text is never cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.artifact import Artifact
from models.backends.face import Backend, Tensors
from models.body import TEXT
from models.errors import ModelError, RequestError
from models.request import Request
from models.tasks.task import TEXT_OR_JSON, Question, check_fields, json_name, parse_question, split_rows
from models.tokens import Text, Tokens, load_special, load_tokenizer

INPUTS: Final = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
_SHIFTED: Final = frozenset({
    "camembert",
    "ibert",
    "longformer",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
})  # fmt: skip
"""Architectures whose positions begin behind that of the padding, so that they hold fewer tokens than positions."""


MAX_WINDOWS: Final = 512
"""Of one text; what has more takes a box too long, and too much memory."""
MAX_LETTERS: Final = 1 << 19
"""Of a text that is read in windows."""
MAX_COUNTED: Final = 64
"""Texts that were counted and are kept in tokens until their request comes, at most."""
MAX_COUNTED_TOKENS: Final = 1 << 13


class Field(msgspec.Struct, frozen=True):
    """A text of a question, or a pair, with the name of its field."""

    name: str
    text: Text


class TextTask:
    """Token numbers into the graph; `context_tokens` 0 takes the bound of the model's folder."""

    def __init__(self, artifact: Artifact, backend: Backend, context_tokens: int) -> None:
        self.config = artifact.read_json("config.json")
        self.tokenizer = load_tokenizer(artifact)
        self.special = load_special(artifact, self.tokenizer)
        self.backend = backend
        self._dtypes = {spec.name: spec.dtype for spec in backend.inputs}
        if unknown := self._dtypes.keys() - set(INPUTS):
            raise ModelError(f"a task on texts has nothing for the graph's input {min(unknown)!r}")
        # A graph whose length is fixed is filled up to it.
        self._fixed = max((spec.shape[1] or 0 for spec in backend.inputs if len(spec.shape) > 1), default=0)
        self.context_tokens = self._fixed or context_tokens or self.special.max_tokens or _positions(self.config)
        self.longest_token_bytes = self.tokenizer.longest_token_bytes
        self.extra_tokens = len(self.tokenizer.encode("").ids)
        self._counted: dict[Text, Tokens] = {}
        self._pad = self.special.pad if self.special.pad is not None else _whole(self.config.get("pad_token_id"))

    def length(self, text: Text) -> int:
        """Return a text's tokens, or fewer where they are too many anyway and counting would take long."""
        least = self.least(text)
        if 0 < self.context_tokens < least:
            return least
        tokens = self.tokenizer.encode_batch([text])[0]
        # The request itself comes next. Several threads use these entries, so each is put and taken by one step.
        if len(self._counted) < MAX_COUNTED and len(tokens.ids) <= MAX_COUNTED_TOKENS:
            self._counted[text] = tokens
        else:
            self._counted.clear()
        return len(tokens.ids)

    def least(self, text: Text) -> int:
        """Return a number of tokens that the text has at least, without looking into it."""
        parts = (text,) if isinstance(text, str) else text
        return sum(self.tokenizer.least_tokens(part) for part in parts)

    def check_fits(self, tokens: int, field: str, hint: str = "") -> None:
        """Raise RequestError `too_large` for more tokens than the model takes."""
        if 0 < self.context_tokens < tokens:
            message = f"{field}: {tokens} tokens or more are over the model's {self.context_tokens}{hint}"
            raise RequestError("too_large", message)

    def check_windows(self, text: str, room: int, stride: int, field: str) -> None:
        """Raise RequestError `too_large` for a text of too many windows, each with `room` for its tokens."""
        tokens = 0
        if len(text) <= MAX_LETTERS:
            tokens = len(self.tokenizer.encode(text, special=False).ids)
            if tokens <= room + (room - stride) * (MAX_WINDOWS - 1):
                return
        told = f"{tokens} tokens" if tokens else f"{len(text)} letters"
        raise RequestError("too_large", f"{field}: {told} are over the {MAX_WINDOWS} windows that are read of a text")

    def encode(self, fields: Sequence[Field]) -> list[Tensors]:
        """Return the graph's inputs for each text; raises RequestError for one that does not fit."""
        for field in fields:
            self.check_fits(self.least(field.text), field.name)
        known = {field.text: tokens for field in fields if (tokens := self._counted.pop(field.text, None)) is not None}
        new = [field.text for field in fields if field.text not in known]
        known |= zip(new, self.tokenizer.encode_batch(new), strict=True) if new else ()
        for field in fields:
            self.check_fits(len(known[field.text].ids), field.name)
        return [self.item(known[field.text].ids, known[field.text].types) for field in fields]

    def item(self, ids: Sequence[int], types: Sequence[int]) -> Tensors:
        """Return what differs from text to text of the graph's inputs; raises RequestError for no tokens."""
        if not ids:
            raise RequestError("bad_request", "inputs: the text has no tokens for this model")
        made = {"input_ids": np.asarray(ids, dtype=self._dtypes.get("input_ids", "int64"))}
        if "token_type_ids" in self._dtypes:
            made["token_type_ids"] = np.asarray(types, dtype=self._dtypes["token_type_ids"])
        return made

    def run(self, items: Sequence[Tensors]) -> list[Tensors]:
        """Answer a batch of texts, the shorter ones padded and masked; results are as long as the padded texts."""
        if "attention_mask" not in self._dtypes and len({item["input_ids"].size for item in items}) > 1:
            return [split_rows(self.backend.run(self._feeds([item])), 1)[0] for item in items]
        return split_rows(self.backend.run(self._feeds(items)), len(items))

    def _feeds(self, items: Sequence[Tensors]) -> Tensors:
        sizes = [item["input_ids"].size for item in items]
        longest = self._fixed or max(sizes)
        feeds: Tensors = {}
        for name, dtype in self._dtypes.items():
            if name == "attention_mask":
                feeds[name] = (np.arange(longest) < np.asarray(sizes)[:, None]).astype(dtype)
            elif name == "position_ids":
                feeds[name] = np.tile(np.arange(longest, dtype=dtype), (len(items), 1))
            else:
                fill = self._pad if name == "input_ids" else 0
                feeds[name] = padded([item[name] for item in items], longest, fill)
        return feeds


def padded(rows: Sequence[NDArray[Any]], longest: int, fill: int) -> NDArray[Any]:
    """Return rows of numbers as one table, the shorter ones filled up at their end."""
    if len(rows) == 1 and rows[0].size == longest:
        return rows[0][None]
    table = np.full((len(rows), longest), fill, dtype=rows[0].dtype)
    for row, values in zip(table, rows, strict=True):
        row[: values.size] = values
    return table


def read_texts(request: Request, known: frozenset[str]) -> tuple[list[Field], Question]:
    """Return a request's texts, plain or in JSON, with its question; raises RequestError that names the field."""
    if request.content_type == TEXT:
        text = request.body.decode()
        return [Field("body", text)], Question(inputs=text)
    question = parse_question(request, known, TEXT_OR_JSON)
    values = question.inputs if isinstance(question.inputs, list) else [question.inputs]
    return [Field(name, text) for name, text in check_fields(values, str, "a text")], question


def parse_flag(parameters: Mapping[str, Any], name: str, *, default: bool) -> bool:
    """Return a parameter that is true or false."""
    value = parameters.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise RequestError("bad_request", f"parameters.{name}: expected true or false, got {json_name(value)}")
    return value


def parse_whole(parameters: Mapping[str, Any], name: str, least: int) -> int | None:
    """Return a parameter that is a whole number, None where it is not given."""
    value = parameters.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        message = f"parameters.{name}: expected a whole number from {least} on, got {value!r:.40}"
        raise RequestError("bad_request", message)
    return value


def _positions(config: Mapping[str, object]) -> int:
    """Return how many tokens the positions of a `config.json` hold; 0 where it names none."""
    positions = _whole(config.get("max_position_embeddings")) or _whole(config.get("n_positions"))
    if config.get("model_type") in _SHIFTED and positions:
        return max(1, positions - _whole(config.get("pad_token_id")) - 1)
    return positions


def _whole(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0
