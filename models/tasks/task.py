"""What every task does, and what several of them share: reading `inputs` and `parameters`, labels, scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.answer import render_outputs
from models.backends.face import Backend, Tensors
from models.body import JSON, parse_failure, type_errors
from models.errors import ModelError, RequestError
from models.request import Dialect, Request

_T = TypeVar("_T")
MAX_LABELS: Final = 1 << 20
TEXT_OR_JSON: Final = "text/plain, or application/json with `inputs` a text"


class Prepared(msgspec.Struct):
    """A request made ready: `items` are the graph's inputs, one for each input of the asker, without a batch axis.

    `many` is whether the asker sent a list; `options` are the task's own; `tokens` are the tokens of all items;
    `content_type` is the answer's.
    """

    items: list[Tensors]
    many: bool = False
    options: Any = None
    tokens: int = 0
    content_type: str = JSON


class Task(Protocol):
    """Turns requests into the graph's inputs and its outputs into answers.

    `context_tokens` bounds one input (0: none); the other two are `models.channel.Ready`'s.
    """

    context_tokens: int
    longest_token_bytes: int
    extra_tokens: int

    def prepare(self, request: Request) -> Prepared:
        """Check a request and make it ready; raises RequestError that names the field."""

    def count(self, request: Request) -> int:
        """Return the tokens of the request's longest input; 0 where the model has none. Safe in any thread."""

    def run(self, items: Sequence[Tensors]) -> list[Tensors]:
        """Answer a batch: one result for each item, in order; raises ModelError."""

    def interpret(self, prepared: Prepared, results: Sequence[Tensors]) -> bytes:
        """Return the answer's JSON; raises RequestError `model_failed` for results that are none."""


class TokenlessTask:
    """What tasks have in common whose inputs are no texts."""

    context_tokens = 0
    longest_token_bytes = 0
    extra_tokens = 0

    def count(self, request: Request) -> int:
        """Return 0: nothing here is counted in tokens."""
        del request
        return 0


class Question(msgspec.Struct):
    """A body in the Hugging Face form, decoded."""

    inputs: Any
    parameters: dict[str, Any] = {}


_question = msgspec.json.Decoder(Question)


def parse_question(request: Request, known: frozenset[str], takes: str = "application/json") -> Question:
    """Decode a JSON body in the Hugging Face form whose parameters are among `known`; `takes` tells what is taken."""
    if request.dialect is Dialect.OPENAI:
        raise RequestError("bad_request", "messages: this model does not chat")
    if request.content_type != JSON:
        raise RequestError("bad_request", f"content type: expected {takes}, got {request.content_type}")
    try:
        question = _question.decode(request.body)
    except type_errors as error:
        raise parse_failure("body", error) from None
    if question.inputs == []:
        raise RequestError("bad_request", "inputs: is an empty list")
    for name in question.parameters.keys() - known:
        raise RequestError("bad_request", f"parameters.{name[:80]}: is not known for this model")
    return question


def parse_top_k(parameters: Mapping[str, Any], default: int | None) -> int | None:
    """Return how many labels are asked for; None means all of them."""
    value = parameters.get("top_k", default)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RequestError("bad_request", f"parameters.top_k: expected a whole number above 0, got {value!r:.40}")
    return value


def parse_share(parameters: Mapping[str, Any], name: str, default: float) -> float:
    """Return a parameter that is a number from 0 to 1."""
    value = parameters.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise RequestError("bad_request", f"parameters.{name}: expected a number from 0 to 1, got {value!r:.40}")
    return float(value)


def parse_whole(parameters: Mapping[str, Any], name: str, default: int) -> int:
    """Return a parameter that is a whole number above 0."""
    value = parameters.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RequestError("bad_request", f"parameters.{name}: expected a whole number above 0, got {value!r:.40}")
    return value


def load_labels(config: Mapping[str, object]) -> dict[int, str]:
    """Return the labels of a `config.json`, by class number."""
    table = config.get("id2label", {})
    if not isinstance(table, dict) or len(table) > MAX_LABELS:
        raise ModelError("config.json: id2label is no table of labels")
    try:
        return {int(number): str(label) for number, label in table.items()}
    except ValueError as error:
        raise ModelError("config.json: id2label has a key that is no number") from error


def check_finite(values: NDArray[Any]) -> NDArray[Any]:
    """Return the values, none of them NaN or infinite, which JSON could not say."""
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise RequestError("model_failed", "the model gave a value that is not a number")
    return values


def scores_of(logits: NDArray[Any], function: str) -> NDArray[np.float64]:
    """Return scores in 0 to 1 by `softmax` or `sigmoid`, or the values themselves by `none`."""
    values = check_finite(logits).astype(np.float64).ravel()
    if function == "none":
        return values
    if function == "sigmoid":
        # Split by sign so that the exponential never overflows.
        small = np.exp(-np.abs(values))
        return np.where(values >= 0, 1 / (1 + small), small / (1 + small))
    powers = np.exp(values - values.max())
    return np.asarray(powers / powers.sum())


def rank(scores: NDArray[np.float64], labels: Mapping[int, str], top_k: int | None) -> list[dict[str, object]]:
    """Return `[{"label", "score"}]`, best first."""
    order = np.argsort(-scores, kind="stable")[:top_k]
    return [{"label": labels.get(int(at), f"LABEL_{at}"), "score": float(scores[at])} for at in order]


def default_function(config: Mapping[str, object], classes: int) -> str:
    """Return how scores come from logits, as the Hugging Face pipelines choose it."""
    kind = config.get("problem_type")
    if kind == "regression":
        return "none"
    return "sigmoid" if kind == "multi_label_classification" or classes == 1 else "softmax"


class Ranking(msgspec.Struct, frozen=True):
    """How an asker wants labels: the best `top_k` (None: all), scored by `function`."""

    top_k: int | None
    function: str


def parse_ranking(parameters: Mapping[str, Any], top_k: int | None, function: str) -> Ranking:
    """Return what is asked for, with the task's defaults; raises RequestError that names the parameter."""
    return Ranking(parse_top_k(parameters, top_k), parse_function(parameters, function))


def render_ranked(prepared: Prepared, logits: Sequence[NDArray[Any]], labels: Mapping[int, str]) -> bytes:
    """Return the labels of each input, best first; `prepared.options` is a Ranking."""
    asked: Ranking = prepared.options
    outputs = [rank(scores_of(values, asked.function), labels, asked.top_k) for values in logits]
    return render_results(prepared, outputs)


def render_results(prepared: Prepared, outputs: list[Any]) -> bytes:
    """Return the answer for one input, or the list of answers for a list."""
    return render_outputs(outputs if prepared.many else outputs[0])


def run_stacked(backend: Backend, items: Sequence[Tensors]) -> list[Tensors]:
    """Run items of equal shapes as one batch along a new first axis."""
    feeds = {name: np.stack([item[name] for item in items]) for name in items[0]}
    return split_rows(backend.run(feeds), len(items))


def run_alike(backend: Backend, items: Sequence[Tensors]) -> list[Tensors]:
    """Run items in order, as one batch those that follow each other with equal shapes."""
    results: list[Tensors] = []
    at = 0
    while at < len(items):
        shapes = {name: values.shape for name, values in items[at].items()}
        end = at + 1
        while end < len(items) and {name: values.shape for name, values in items[end].items()} == shapes:
            end += 1
        results += run_stacked(backend, items[at:end])
        at = end
    return results


def split_rows(results: Tensors, rows: int) -> list[Tensors]:
    """Return each row's share of a batch's results; raises ModelError where an output has other rows."""
    for name, values in results.items():
        if values.ndim == 0 or values.shape[0] != rows:
            raise ModelError(f"output {name} has the shape {list(values.shape)} for a batch of {rows}")
    return [{name: values[row] for name, values in results.items()} for row in range(rows)]


def parse_function(parameters: Mapping[str, Any], default: str) -> str:
    """Return the asked way from logits to scores."""
    value = parameters.get("function_to_apply", default)
    if not isinstance(value, str) or value not in {"softmax", "sigmoid", "none"}:
        message = f"parameters.function_to_apply: expected softmax, sigmoid or none, got {value!r:.40}"
        raise RequestError("bad_request", message)
    return value


def check_fields(values: Sequence[Any], kind: type[_T], what: str) -> list[tuple[str, _T]]:
    """Return each value with the name of its field, all of one kind; raises RequestError that names the first other."""
    named = []
    for at, value in enumerate(values):
        field = f"inputs[{at}]" if len(values) > 1 else "inputs"
        if not isinstance(value, kind):
            raise RequestError("bad_request", f"{field}: expected {what}, got {json_name(value)}")
        named.append((field, value))
    return named


def json_name(value: object) -> str:
    """Say in JSON's words what a value is."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def check_numbers(values: object, dtype: str, field: str, names: Sequence[str] = ()) -> NDArray[Any]:
    """Return a flat list of numbers in the graph's type; raises RequestError that names the first that is none.

    `names` are the values' own names, where they came by name.
    """
    if not isinstance(values, list):
        raise RequestError("bad_request", f"{field}: expected a list of numbers, got {json_name(values)}")
    for at, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float):
            where = f"{field}.{names[at]}" if names else f"{field}[{at}]"
            raise RequestError("bad_request", f"{where}: expected a number, got {json_name(value)}")
    try:
        with np.errstate(over="ignore"):
            numbers = np.asarray(values, dtype=dtype)
    except OverflowError:
        numbers = np.full(len(values), np.inf)
    if numbers.dtype.kind == "f" and not np.isfinite(numbers).all():
        raise RequestError("bad_request", f"{field}: a number is too large for the model's {dtype}")
    return numbers
