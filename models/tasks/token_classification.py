"""token-classification: entities in a text, as the Hugging Face pipeline finds and groups them.

A text over the model's length is read in windows where the asker names their `stride`, and refused where not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec
import numpy as np

from models.artifact import Artifact
from models.backends.face import Backend, Tensors
from models.errors import RequestError
from models.manifest import Manifest
from models.request import Request
from models.tasks.entities import AGGREGATIONS, Piece, best_of_overlapping, group, single, words_of
from models.tasks.task import Prepared, check_finite, load_labels, render_results
from models.tasks.texts import Field, TextTask, parse_whole, read_texts
from models.tokens import Reading

_PARAMETERS: Final = frozenset({"aggregation_strategy", "ignore_labels", "stride"})
_HINT: Final = "; parameters.stride has it read in windows"


class _Options(msgspec.Struct, frozen=True):
    aggregation: str
    ignored: frozenset[str]
    stride: int | None


class _Windowed(msgspec.Struct, frozen=True):
    """One text and its windows."""

    text: str
    windows: list[Reading]


class _Job(msgspec.Struct, frozen=True):
    options: _Options
    texts: list[_Windowed]


class TokenClassification(TextTask):
    """Token numbers into the graph, `logits` of each token out of it."""

    def __init__(self, artifact: Artifact, backend: Backend, context_tokens: int) -> None:
        super().__init__(artifact, backend, context_tokens)
        # With windows a text may be of any length, which only counting can tell.
        self.longest_token_bytes = 0
        self._labels = load_labels(self.config)
        self._output = next((spec.name for spec in backend.outputs if spec.name == "logits"), backend.outputs[0].name)

    def count(self, request: Request) -> int:
        """Return the tokens of the longest text; with windows no more than one of them holds."""
        fields, question = read_texts(request, _PARAMETERS)
        longest = max(self.length(field.text) for field in fields)
        if self._options(question.parameters).stride is not None and self.context_tokens:
            return min(longest, self.context_tokens)
        return longest

    def prepare(self, request: Request) -> Prepared:
        """Count each text and cut it into windows; raises RequestError, `too_large` for one that needs them."""
        fields, question = read_texts(request, _PARAMETERS)
        options = self._options(question.parameters)
        texts = [_Windowed(str(field.text), self._windows(field, options.stride)) for field in fields]
        readings = [window for text in texts for window in text.windows]
        return Prepared(
            items=[self.item(reading.ids, reading.types) for reading in readings],
            many=isinstance(question.inputs, list),
            options=_Job(options, texts),
            tokens=sum(len(reading.ids) for reading in readings),
        )

    def interpret(self, prepared: Prepared, results: Sequence[Tensors]) -> bytes:
        """Return the entities of each text in their order."""
        job: _Job = prepared.options
        rest = iter(results)
        outputs = [self._entities(text, [next(rest) for _ in text.windows], job.options) for text in job.texts]
        return render_results(prepared, outputs)

    def _windows(self, field: Field, stride: int | None) -> list[Reading]:
        text = str(field.text)
        if stride is None or not self.context_tokens:
            self.check_fits(self.least(text), field.name, _HINT)
            reading = self.tokenizer.read(text)
            self.check_fits(len(reading.ids), field.name, _HINT)
            return [reading]
        if stride >= self.context_tokens - self.extra_tokens:
            most = self.context_tokens - self.extra_tokens - 1
            raise RequestError("bad_request", f"parameters.stride: must be at most {most}, got {stride}")
        self.check_windows(text, self.context_tokens - self.extra_tokens, stride, field.name)
        return self.tokenizer.windows(text, max_tokens=self.context_tokens, stride=stride)

    def _entities(self, text: _Windowed, results: Sequence[Tensors], options: _Options) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for reading, result in zip(text.windows, results, strict=True):
            pieces = self._pieces(text.text, reading, result)
            entities = self._grouped(pieces, options.aggregation)
            found += [entity for entity in entities if _label(entity) not in options.ignored]
        return best_of_overlapping(found) if len(text.windows) > 1 else found

    def _grouped(self, pieces: list[Piece], aggregation: str) -> list[dict[str, Any]]:
        if aggregation in {"none", "simple"}:
            entities = [single(piece, self._name) for piece in pieces]
        else:
            entities = words_of(pieces, aggregation, self._name, self.tokenizer.join)
        return entities if aggregation == "none" else group(entities, self.tokenizer.join)

    def _pieces(self, text: str, reading: Reading, result: Tensors) -> list[Piece]:
        """Return the tokens of a window that stand for letters, each with its scores."""
        logits = check_finite(result[self._output][: len(reading.ids)]).astype(np.float32)
        powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
        scores = powers / powers.sum(axis=-1, keepdims=True)
        return [self._piece(text, reading, at, scores[at]) for at, special in enumerate(reading.special) if not special]

    def _piece(self, text: str, reading: Reading, at: int, scores: Any) -> Piece:
        start, end = reading.offsets[at]
        number = reading.ids[at]
        if number == self.special.unknown:
            return Piece(text[start:end], scores, start, end, at, continues=False)
        word = self.tokenizer.token(number)
        if self.tokenizer.joins_words:
            continues = len(word) != end - start
        else:
            continues = start > 0 and " " not in text[start - 1 : start + 1]
        return Piece(word, scores, start, end, at, continues=continues)

    def _name(self, number: int) -> str:
        return self._labels.get(number, f"LABEL_{number}")

    def _options(self, parameters: dict[str, Any]) -> _Options:
        aggregation = parameters.get("aggregation_strategy", "simple")
        if aggregation not in AGGREGATIONS:
            known = ", ".join(AGGREGATIONS)
            message = f"parameters.aggregation_strategy: expected one of {known}, got {aggregation!r:.40}"
            raise RequestError("bad_request", message)
        stride = parse_whole(parameters, "stride", 0)
        if stride is not None and aggregation == "none":
            raise RequestError("bad_request", "parameters.stride: windows need an aggregation_strategy, not none")
        return _Options(aggregation, _ignored(parameters.get("ignore_labels", ["O"])), stride)


def _ignored(values: object) -> frozenset[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise RequestError("bad_request", "parameters.ignore_labels: expected a list of labels")
    return frozenset(values)


def _label(entity: dict[str, Any]) -> str:
    return str(entity["entity"] if "entity" in entity else entity["entity_group"])


def build(artifact: Artifact, backend: Backend, manifest: Manifest) -> TokenClassification:
    """Make the task for an opened graph."""
    return TokenClassification(artifact, backend, manifest.limits.context_tokens)
