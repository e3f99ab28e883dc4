"""tabular-regression and tabular-classification: rows of numbers into a number or a label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from numpy.typing import NDArray

from models.artifact import Artifact
from models.backends.face import Backend, Tensors
from models.errors import ModelError, RequestError
from models.manifest import Manifest
from models.request import Request
from models.tasks.task import (
    Prepared,
    TokenlessTask,
    check_finite,
    check_numbers,
    default_function,
    load_labels,
    parse_question,
    rank,
    render_results,
    run_stacked,
    scores_of,
)

_PARAMETERS: Final[frozenset[str]] = frozenset()


class Tabular(TokenlessTask):
    """One row of `feature_names` (of `config.json`) at a time, as a list in that order or an object by name."""

    def __init__(self, config: Mapping[str, object], backend: Backend, *, classify: bool) -> None:
        self._backend = backend
        self._input = backend.inputs[0]
        ready = classify and "probabilities" in {spec.name for spec in backend.outputs}
        self._output = "probabilities" if ready else backend.outputs[0].name
        self._features = feature_names(config)
        self._width = self._input.shape[-1] or len(self._features) or None
        self._labels = load_labels(config)
        self._function: str | None = None
        if classify:
            self._function = "none" if ready else default_function(config, len(self._labels) or 2)

    def prepare(self, request: Request) -> Prepared:
        """Check each row; raises RequestError that names the row, what was expected and what was got."""
        inputs = parse_question(request, _PARAMETERS).inputs
        many = isinstance(inputs, list) and isinstance(inputs[0], list | dict)
        rows = inputs if many else [inputs]
        fields = [f"inputs[{at}]" for at in range(len(rows))] if many else ["inputs"]
        items = [{self._input.name: self._row(row, field)} for row, field in zip(rows, fields, strict=True)]
        return Prepared(items=items, many=many)

    def run(self, items: Sequence[Tensors]) -> list[Tensors]:
        """Answer a batch of rows."""
        return run_stacked(self._backend, items)

    def interpret(self, prepared: Prepared, results: Sequence[Tensors]) -> bytes:
        """Return each row's number, or its best label with the score."""
        return render_results(prepared, [self._outcome(result[self._output]) for result in results])

    def _outcome(self, values: NDArray[Any]) -> object:
        if self._function is not None:
            return rank(scores_of(values, self._function), self._labels, 1)[0]
        if values.size != 1:
            raise RequestError("model_failed", f"the model gave {values.size} numbers for one row")
        return check_finite(values).ravel()[0].item()

    def _row(self, row: object, field: str) -> NDArray[Any]:
        named = isinstance(row, dict)
        values = self._by_name(row, field) if isinstance(row, dict) else row
        numbers = check_numbers(values, self._input.dtype, field, self._features if named else ())
        if self._width is not None and len(numbers) != self._width:
            raise RequestError("bad_request", f"{field}: expected {self._width} numbers, got {len(numbers)}")
        return numbers

    def _by_name(self, row: Mapping[str, object], field: str) -> list[object]:
        if not self._features:
            raise RequestError("bad_request", f"{field}: this model's features have no names; send a list of numbers")
        for name in self._features:
            if name not in row:
                raise RequestError("bad_request", f"{field}.{name}: is missing")
        for name in row.keys() - set(self._features):
            raise RequestError("bad_request", f"{field}.{name[:80]}: is not one of the model's features")
        return [row[name] for name in self._features]


def feature_names(config: Mapping[str, object]) -> list[str]:
    """Return the names of the graph's columns, in order; raises ModelError."""
    names = config.get("feature_names", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError("config.json: feature_names is no list of names")
    return names


def build(artifact: Artifact, backend: Backend, manifest: Manifest) -> Tabular:
    """Make the task for an opened graph."""
    return Tabular(artifact.read_json("config.json"), backend, classify=manifest.task == "tabular-classification")
