"""time-series-forecasting: the last values of a series into the next ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
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
    json_name,
    parse_question,
    render_results,
    run_alike,
)

_PARAMETERS: Final[frozenset[str]] = frozenset()
_TAKES: Final = "application/json with `inputs` a list of numbers, oldest first, or a list of such lists"


class TimeSeriesForecasting(TokenlessTask):
    """One series at a time, oldest value first: a list of numbers, or of rows where the graph takes several series."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._input = backend.inputs[0]
        self._output = backend.outputs[0].name
        if len(backend.inputs) != 1 or len(self._input.shape) not in {2, 3}:
            raise ModelError(
                "time-series-forecasting needs a graph with one input of [batch, time] or [batch, time, series]"
            )
        self._rows = len(self._input.shape) == 3

    def prepare(self, request: Request) -> Prepared:
        """Check each series; raises RequestError that names it, what was expected and what was got."""
        inputs = parse_question(request, _PARAMETERS, _TAKES).inputs
        many = _depth(inputs) > (2 if self._rows else 1)
        series = inputs if many else [inputs]
        fields = [f"inputs[{at}]" for at in range(len(series))] if many else ["inputs"]
        items = [{self._input.name: self._series(values, field)} for values, field in zip(series, fields, strict=True)]
        return Prepared(items=items, many=many)

    def run(self, items: Sequence[Tensors]) -> list[Tensors]:
        """Answer a batch; series of another length than the one before run apart from it."""
        return run_alike(self._backend, items)

    def interpret(self, prepared: Prepared, results: Sequence[Tensors]) -> bytes:
        """Return the list of the next values of each series."""
        return render_results(prepared, [_forecast(result[self._output]) for result in results])

    def _series(self, values: object, field: str) -> NDArray[Any]:
        if not isinstance(values, list):
            raise RequestError("bad_request", f"{field}: expected a list of numbers, got {json_name(values)}")
        wanted = self._input.shape[1]
        if not values or (wanted is not None and len(values) != wanted):
            expected = "at least 1" if wanted is None else str(wanted)
            raise RequestError("bad_request", f"{field}: expected {expected} values, got {len(values)}")
        if self._rows:
            rows = [self._row(row, f"{field}[{at}]") for at, row in enumerate(values)]
            return np.stack(rows)
        return check_numbers(values, self._input.dtype, field)

    def _row(self, row: object, field: str) -> NDArray[Any]:
        numbers = check_numbers(row, self._input.dtype, field)
        wanted = self._input.shape[2]
        if wanted is not None and len(numbers) != wanted:
            raise RequestError("bad_request", f"{field}: expected {wanted} numbers, got {len(numbers)}")
        return numbers


def _depth(values: object) -> int:
    depth = 0
    while isinstance(values, list) and values and depth < 4:
        depth += 1
        values = values[0]
    return depth


def _forecast(values: NDArray[Any]) -> Any:
    values = check_finite(values)
    return values.ravel().tolist() if values.ndim < 2 or 1 in values.shape else values.tolist()


def build(artifact: Artifact, backend: Backend, manifest: Manifest) -> TimeSeriesForecasting:
    """Make the task for an opened graph."""
    del artifact, manifest
    return TimeSeriesForecasting(backend)
