"""text-classification: texts, or pairs of them, into labels with scores, as the Hugging Face pipeline has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from models.artifact import Artifact
from models.backends.face import Backend, Tensors
from models.body import TEXT
from models.errors import RequestError
from models.manifest import Manifest
from models.request import Request
from models.tasks.task import (
    TEXT_OR_JSON,
    Prepared,
    Ranking,
    default_function,
    json_name,
    load_labels,
    parse_question,
    parse_ranking,
    render_ranked,
)
from models.tasks.texts import Field, TextTask
from models.tokens import Text

DEFAULT_TOP_K: Final = 1
_PARAMETERS: Final = frozenset({"top_k", "function_to_apply"})


class TextClassification(TextTask):
    """Token numbers into the graph, `logits` out of it."""

    def __init__(self, artifact: Artifact, backend: Backend, context_tokens: int) -> None:
        super().__init__(artifact, backend, context_tokens)
        self._labels = load_labels(self.config)
        self._output = next((spec.name for spec in backend.outputs if spec.name == "logits"), backend.outputs[0].name)
        self._function = default_function(self.config, len(self._labels) or 2)

    def count(self, request: Request) -> int:
        """Return the tokens of the longest text."""
        fields, _ = self._read(request)
        return max(self.length(field.text) for field in fields)

    def prepare(self, request: Request) -> Prepared:
        """Count and check each text; raises RequestError, `too_large` for one that the model cannot hold."""
        fields, prepared = self._read(request)
        prepared.items = self.encode(fields)
        prepared.tokens = sum(item["input_ids"].size for item in prepared.items)
        return prepared

    def interpret(self, prepared: Prepared, results: Sequence[Tensors]) -> bytes:
        """Return the labels of each text, best first."""
        return render_ranked(prepared, [result[self._output] for result in results], self._labels)

    def _read(self, request: Request) -> tuple[list[Field], Prepared]:
        """Return the texts with the names of their fields, and what is to be prepared."""
        if request.content_type == TEXT:
            return [Field("body", request.body.decode())], Prepared(items=[], options=self._options({}))
        question = parse_question(request, _PARAMETERS, TEXT_OR_JSON)
        many = isinstance(question.inputs, list)
        values = question.inputs if many else [question.inputs]
        fields = [_field(value, f"inputs[{at}]" if len(values) > 1 else "inputs") for at, value in enumerate(values)]
        return fields, Prepared(items=[], many=many, options=self._options(question.parameters))

    def _options(self, parameters: Mapping[str, Any]) -> Ranking:
        return parse_ranking(parameters, DEFAULT_TOP_K, self._function)


def _field(value: object, name: str) -> Field:
    if isinstance(value, str):
        return Field(name, value)
    if not isinstance(value, dict):
        raise RequestError("bad_request", f"{name}: expected a text, got {json_name(value)}")
    for part in value.keys() - {"text", "text_pair"}:
        raise RequestError("bad_request", f"{name}.{part[:80]}: is not known; a pair has text and text_pair")
    return Field(name, _pair(value, name))


def _pair(value: Mapping[str, object], name: str) -> Text:
    """Return a pair; one whose second text is empty is a single text, as `transformers` has it."""
    text, pair = value.get("text"), value.get("text_pair")
    if not isinstance(text, str):
        raise RequestError("bad_request", f"{name}.text: expected a text, got {json_name(text)}")
    if pair is not None and not isinstance(pair, str):
        raise RequestError("bad_request", f"{name}.text_pair: expected a text, got {json_name(pair)}")
    return (text, pair) if pair else text


def build(artifact: Artifact, backend: Backend, manifest: Manifest) -> TextClassification:
    """Make the task for an opened graph."""
    return TextClassification(artifact, backend, manifest.limits.context_tokens)
