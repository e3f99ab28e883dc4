"""tabular-regression and tabular-classification: rows of numbers, or of numbers and texts, into a number or a label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from models.artifact import Artifact
from models.backends.face import Backend, Tensors, TensorSpec
from models.errors import ModelError, RequestError
from models.manifest import Manifest
from models.request import Request
from models.tasks.task import (
    Prepared,
    TokenlessTask,
    check_finite,
    check_numbers,
    default_function,
    json_name,
    load_labels,
    parse_question,
    rank,
    render_results,
    run_stacked,
    scores_of,
)

_PARAMETERS: Final[frozenset[str]] = frozenset()
_TAKES: Final = "application/json with `inputs` a row of numbers, an object of columns, or a list of these"


class Tabular(TokenlessTask):
    """One row of columns at a time, as a list in the graph's order or an object by name.

    The columns' names and order are those of `config.json` (`feature_names`, or `sklearn.columns` of skops), or
    of the graph's inputs where it has one for each column.
    """

    def __init__(self, config: Mapping[str, object], backend: Backend, *, classify: bool) -> None:
        self._backend = backend
        self._inputs = {spec.name: spec for spec in backend.inputs}
        self._only = backend.inputs[0] if len(backend.inputs) == 1 else None
        self._features = feature_names(config) or ([] if self._only else list(self._inputs))
        if self._only is None and (odd := set(self._features) ^ self._inputs.keys()):
            raise ModelError(f"{min(odd)!r} is not both one of the columns and one of the graph's inputs")
        self._width = (self._only.shape[-1] if self._only else None) or len(self._features) or None
        self._labels = load_labels(config)
        self._predicted, self._output, ready = _outputs(backend.outputs, classify=classify)
        self._function: str | None = None
        if classify:
            self._function = "none" if ready else default_function(config, len(self._labels) or 2)

    def prepare(self, request: Request) -> Prepared:
        """Check each row; raises RequestError that names the row, what was expected and what was got."""
        inputs = parse_question(request, _PARAMETERS, _TAKES).inputs
        if isinstance(inputs, dict) and isinstance(inputs.get("data"), dict) and "data" not in self._features:
            named, many = self._columns(inputs), True
        else:
            many = isinstance(inputs, list) and isinstance(inputs[0], list | dict)
            rows = inputs if many else [inputs]
            fields = [f"inputs[{at}]" for at in range(len(rows))] if many else ["inputs"]
            named = list(zip(fields, rows, strict=True))
        return Prepared(items=[self._item(row, field) for field, row in named], many=many)

    def run(self, items: Sequence[Tensors]) -> list[Tensors]:
        """Answer a batch of rows."""
        return run_stacked(self._backend, items)

    def interpret(self, prepared: Prepared, results: Sequence[Tensors]) -> bytes:
        """Return each row's number, or its best label with the score."""
        return render_results(prepared, [self._outcome(result) for result in results])

    def _outcome(self, result: Tensors) -> object:
        values = result[self._output]
        if self._function is None:
            if values.size != 1:
                raise RequestError("model_failed", f"the model gave {values.size} numbers for one row")
            return check_finite(values).ravel()[0].item()
        best = rank(scores_of(values, self._function), self._labels, 1)[0]
        if self._predicted is None:
            return best
        # What the graph itself says: its classes need not be numbered from 0.
        said = np.asarray(result[self._predicted]).ravel()[0]
        label = str(said) if isinstance(said, str) else self._labels.get(int(said), f"LABEL_{int(said)}")
        return {"label": label, "score": best["score"]}

    def _columns(self, inputs: Mapping[str, Any]) -> list[tuple[str, object]]:
        """Return the rows of `{"data": {column: [value, ...]}}`."""
        if len(inputs) > 1:
            raise RequestError("bad_request", f"inputs.{min(inputs.keys() - {'data'})[:80]}: is not known beside data")
        columns: dict[str, Any] = inputs["data"]
        lengths = set()
        for name, values in columns.items():
            if not isinstance(values, list):
                raise RequestError("bad_request", f"inputs.data.{name[:80]}: expected a list, got {json_name(values)}")
            lengths.add(len(values))
        if len(lengths) != 1 or 0 in lengths:
            raise RequestError("bad_request", f"inputs.data: expected columns of one length, got {sorted(lengths)[:9]}")
        return [
            (f"inputs.data[{at}]", {name: values[at] for name, values in columns.items()})
            for at in range(lengths.pop())
        ]

    def _item(self, row: object, field: str) -> Tensors:
        values = self._by_name(row, field) if isinstance(row, dict) else row
        names = self._features if isinstance(row, dict) else ()
        if self._only is not None:
            numbers = check_numbers(values, self._only.dtype, field, names)
            self._check_width(len(numbers), field, "numbers")
            return {self._only.name: numbers}
        if not isinstance(values, list):
            raise RequestError("bad_request", f"{field}: expected a list or an object, got {json_name(values)}")
        self._check_width(len(values), field, "values")
        cells = zip(self._features, values, strict=True)
        return {name: _cell(value, self._inputs[name], f"{field}.{name}") for name, value in cells}

    def _check_width(self, given: int, field: str, what: str) -> None:
        if self._width is not None and given != self._width:
            raise RequestError("bad_request", f"{field}: expected {self._width} {what}, got {given}")

    def _by_name(self, row: Mapping[str, object], field: str) -> list[object]:
        if not self._features:
            raise RequestError("bad_request", f"{field}: this model's features have no names; send a list of numbers")
        for name in self._features:
            if name not in row:
                raise RequestError("bad_request", f"{field}.{name}: is missing")
        for name in row.keys() - set(self._features):
            raise RequestError("bad_request", f"{field}.{name[:80]}: is not one of the model's features")
        return [row[name] for name in self._features]


def _cell(value: object, spec: TensorSpec, field: str) -> NDArray[Any]:
    """Return one column's value as its input takes it: [1], or a bare value where the input has no such dimension."""
    if spec.dtype == "object":
        if not isinstance(value, str):
            raise RequestError("bad_request", f"{field}: expected a text, got {json_name(value)}")
        cell = np.asarray([value], object)
    else:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RequestError("bad_request", f"{field}: expected a number, got {json_name(value)}")
        cell = check_numbers([value], spec.dtype, field)
    return cell if len(spec.shape) > 1 else cell[0]


def _outputs(outputs: Sequence[TensorSpec], *, classify: bool) -> tuple[str | None, str, bool]:
    """Return (the output with the predicted class, the one with scores or numbers, whether those are probabilities)."""
    floats = [spec for spec in outputs if spec.dtype.startswith("float")]
    others = [spec for spec in outputs if not spec.dtype.startswith("float")]
    if not classify or not floats:
        return None, outputs[0].name, False
    named = [spec for spec in floats if spec.name == "probabilities"] or floats[:1]
    predicted = others[0].name if others and len(others[0].shape) <= 2 else None
    return predicted, named[0].name, predicted is not None or named[0].name == "probabilities"


def feature_names(config: Mapping[str, object]) -> list[str]:
    """Return the names of the graph's columns, in order; raises ModelError."""
    skops = config.get("sklearn")
    columns = skops.get("columns", []) if isinstance(skops, dict) else []
    names = config.get("feature_names", columns)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError("config.json: feature_names is no list of names")
    return names


def build(artifact: Artifact, backend: Backend, manifest: Manifest) -> Tabular:
    """Make the task for an opened graph."""
    return Tabular(artifact.read_json("config.json"), backend, classify=manifest.task == "tabular-classification")
