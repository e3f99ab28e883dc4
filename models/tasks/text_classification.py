"""text-classification: texts into labels with scores. A text over the model's length is refused, never cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np

from models.artifact import Artifact
from models.backends.face import Backend, Tensors
from models.body import TEXT
from models.errors import ModelError, RequestError
from models.manifest import Manifest
from models.request import Request
from models.tasks.task import (
    Prepared,
    check_fields,
    default_function,
    load_labels,
    parse_function,
    parse_question,
    parse_top_k,
    rank,
    render_results,
    scores_of,
    split_rows,
)
from models.tokens import MAX_TOKENIZER_BYTES, Tokenizer, Tokens

DEFAULT_TOP_K: Final = 1
_PARAMETERS: Final = frozenset({"top_k", "function_to_apply"})
_INPUTS: Final = ("input_ids", "attention_mask", "token_type_ids")


class _Options(msgspec.Struct, frozen=True):
    top_k: int | None
    function: str


class TextClassification:
    """Token numbers into the graph, `logits` out of it; `context_tokens` 0 takes the bound of `config.json`."""

    def __init__(self, artifact: Artifact, backend: Backend, context_tokens: int) -> None:
        config = artifact.read_json("config.json")
        self.tokenizer = Tokenizer(artifact.read("tokenizer.json", MAX_TOKENIZER_BYTES))
        self.context_tokens = context_tokens or _whole(config.get("max_position_embeddings"))
        self.longest_token_bytes = self.tokenizer.longest_token_bytes
        self.extra_tokens = len(self.tokenizer.encode("").ids)
        self._backend = backend
        self._dtypes = {spec.name: spec.dtype for spec in backend.inputs}
        if unknown := self._dtypes.keys() - set(_INPUTS):
            raise ModelError(f"text-classification has nothing for the graph's input {min(unknown)!r}")
        self._pad = _whole(config.get("pad_token_id"))
        self._labels = load_labels(config)
        self._output = backend.outputs[0].name
        self._function = default_function(config, len(self._labels) or 2)

    def count(self, request: Request) -> int:
        """Return the tokens of the longest text."""
        texts, _ = self._read(request)
        return max(self._length(text) for _, text in texts)

    def prepare(self, request: Request) -> Prepared:
        """Count and check each text; raises RequestError, `too_large` for one that the model cannot hold."""
        texts, prepared = self._read(request)
        for field, text in texts:
            self._check_fits(self.tokenizer.least_tokens(text), field)
        encoded = self.tokenizer.encode_batch([text for _, text in texts])
        for (field, _), tokens in zip(texts, encoded, strict=True):
            self._check_fits(len(tokens.ids), field)
        prepared.items = [_item(tokens) for tokens in encoded]
        prepared.tokens = sum(len(tokens.ids) for tokens in encoded)
        return prepared

    def _length(self, text: str) -> int:
        """Return a text's tokens, or fewer where they are too many anyway and counting would take long."""
        least = self.tokenizer.least_tokens(text)
        return least if 0 < self.context_tokens < least else len(self.tokenizer.encode(text).ids)

    def _check_fits(self, tokens: int, field: str) -> None:
        if 0 < self.context_tokens < tokens:
            message = f"{field}: {tokens} tokens or more are over the model's {self.context_tokens}"
            raise RequestError("too_large", message)

    def run(self, items: Sequence[Tensors]) -> list[Tensors]:
        """Answer a batch of texts, the shorter ones padded and masked."""
        if "attention_mask" not in self._dtypes and len({item["input_ids"].size for item in items}) > 1:
            return [self._run([item])[0] for item in items]
        return self._run(items)

    def _run(self, items: Sequence[Tensors]) -> list[Tensors]:
        longest = max(item["input_ids"].size for item in items)
        fill = {"input_ids": self._pad, "attention_mask": 0, "token_type_ids": 0}
        feeds: Tensors = {}
        for name, dtype in self._dtypes.items():
            feeds[name] = np.full((len(items), longest), fill[name], dtype=dtype)
            for row, item in enumerate(items):
                feeds[name][row, : item[name].size] = item[name]
        return split_rows(self._backend.run(feeds), len(items))

    def interpret(self, prepared: Prepared, results: Sequence[Tensors]) -> bytes:
        """Return the labels of each text, best first."""
        options: _Options = prepared.options
        outputs = [
            rank(scores_of(result[self._output], options.function), self._labels, options.top_k) for result in results
        ]
        return render_results(prepared, outputs)

    def _read(self, request: Request) -> tuple[list[tuple[str, str]], Prepared]:
        """Return the texts with the names of their fields, and what is to be prepared."""
        if request.content_type == TEXT:
            return [("body", request.body.decode())], Prepared(items=[], options=self._options({}))
        question = parse_question(request, _PARAMETERS)
        many = isinstance(question.inputs, list)
        texts = check_fields(question.inputs if many else [question.inputs], str, "a text")
        return texts, Prepared(items=[], many=many, options=self._options(question.parameters))

    def _options(self, parameters: dict[str, object]) -> _Options:
        return _Options(parse_top_k(parameters, DEFAULT_TOP_K), parse_function(parameters, self._function))


def _item(tokens: Tokens) -> Tensors:
    ids = np.asarray(tokens.ids, dtype=np.int64)
    types = np.asarray(tokens.types, dtype=np.int64)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": types}


def _whole(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def build(artifact: Artifact, backend: Backend, manifest: Manifest) -> TextClassification:
    """Make the task for an opened graph."""
    return TextClassification(artifact, backend, manifest.limits.context_tokens)
