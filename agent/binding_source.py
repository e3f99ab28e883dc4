"""One sensor of a binding: its last values, its window, its model's state, what was published last.

Pure: no I/O; the clock is an argument, seconds of any origin.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from agent import binding_rules as rules
from agent.binding_settings import MAX_VALUES, Binding, Column, WindowSettings
from models.body import IMAGES, JSON, SOUNDS, TEXT, Body, sniff, type_errors
from models.request import Dialect

MAX_AHEAD_S: Final = 60.0
"""How far a sensor's clock may be ahead of the box's."""
SAME_S: Final = 0.01
"""How far two clocks may drift while a message is read."""
_json = msgspec.json.Decoder()
_encoder = msgspec.json.Encoder()
_KINDS: Final = {"image": IMAGES, "sound": SOUNDS}


class DropError(Exception):
    """A message that becomes no request; `reason` is counted, the text is for the owner and holds no value of it."""

    def __init__(self, reason: str, why: str) -> None:
        super().__init__(why)
        self.reason = reason


class Row(msgspec.Struct):
    """The numbers of one moment."""

    at: float
    values: list[float]


class Source(msgspec.Struct, kw_only=True):
    """What is kept of one sensor, told apart by the wildcard parts of its topics (`parts`)."""

    parts: tuple[str, ...]
    cells: dict[int, tuple[float, float]] = {}
    """The last number of each column, and when it came."""
    series: list[Row] = []
    since: float = 0.0
    heard_at: float = -math.inf
    asked_at: float = -math.inf
    unasked: int = 0
    memory: dict[str, Any] = {}
    """The state that goes into the next request, by the input's name."""
    answerer: str = ""
    last: Any = None
    told: bool = False
    raised: bool = False


class Reader:
    """What one binding reads from a message's bytes."""

    def __init__(self, binding: Binding) -> None:
        self._binding = binding
        self._cells = binding.cells
        self._paths = [rules.parse_path(cell.take) if cell.take.startswith("$") else None for cell in self._cells]
        self._whole = not binding.numeric
        self._time = rules.parse_path(binding.time) if binding.time else None

    def read(self, topic: str, payload: bytes) -> dict[int, Any]:
        """Return the columns that a message brings; raises DropError where it brings none that can be used."""
        if self._whole:
            return {0: self._content(payload)}
        mine = [
            at
            for at, cell in enumerate(self._cells)
            if rules.match(cell.topic or self._binding.topic, topic) is not None
        ]
        document = _decode(payload) if any(self._paths[at] is not None for at in mine) else None
        found: dict[int, Any] = {}
        for at in mine:
            try:
                found[at] = self._number(at, payload, document)
            except LookupError as error:
                if self._binding.missing == "drop":
                    raise DropError("missing", str(error)) from None
        if not found:
            raise DropError("missing", "none of the columns is there")
        return found

    def age_s(self, payload: bytes, wall_s: float) -> float:
        """Return how long ago a message was made by its own word, 0 where none is asked for; raises DropError."""
        if self._time is None:
            return 0.0
        try:
            made_s = rules.to_time(rules.read_path(self._time, _decode(payload)))
        except LookupError as error:
            raise DropError("missing", str(error)) from None
        except (ValueError, OverflowError):
            raise DropError("not_a_time", f"{self._binding.time} is no time") from None
        age_s = wall_s - made_s
        if age_s < -MAX_AHEAD_S:
            raise DropError("ahead", f"{self._binding.time} lies {-age_s:.0f} s ahead of this box's clock")
        if 0 < self._binding.max_age_s < age_s:
            raise DropError("stale", f"{self._binding.time} is older than {self._binding.max_age_s:g} s")
        return max(0.0, age_s)

    def _number(self, at: int, payload: bytes, document: Any) -> Any:
        cell, path = self._cells[at], self._paths[at]
        value = _text(payload) if path is None else rules.read_path(path, document)
        what = cell.take if path is not None else "the message"
        try:
            if isinstance(value, list) and not self._binding.columns:
                return [_scaled(cell, one, self._binding.words) for one in value]
            return _scaled(cell, value, self._binding.words)
        except ValueError as error:
            raise DropError("not_a_number", f"{what} {error}") from None

    def _content(self, payload: bytes) -> Any:
        """Return what is taken whole: bytes for an image or sound, else text or a JSON value."""
        take, path = self._cells[0].take, self._paths[0]
        if path is not None:
            try:
                return rules.read_path(path, _decode(payload))
            except LookupError as error:
                raise DropError("missing", str(error)) from None
        if take == "text":
            return _text(payload)
        if sniff(payload) not in _KINDS[take]:
            raise DropError("unreadable", f"the message is no {take} of a known kind")
        return payload


def _scaled(cell: Column, value: Any, words: Mapping[str, float]) -> float:
    return rules.to_number(cell.scale * rules.to_number(value, words) + cell.offset, {})


def _decode(payload: bytes) -> Any:
    try:
        return _json.decode(payload)
    except type_errors:
        raise DropError("unreadable", "the message is no JSON") from None


def _text(payload: bytes) -> str:
    try:
        text = payload.decode()
    except UnicodeDecodeError:
        raise DropError("unreadable", "the message is no UTF-8 text") from None
    if not text.strip():
        raise DropError("missing", "the message is empty")
    return text


def advance(binding: Binding, source: Source, found: dict[int, Any], at: float) -> Any | None:
    """Take a message's values in; return the inputs of a request, or None while there is nothing to ask.

    Raises DropError where a column is missing or too old.
    """
    if at < source.heard_at - SAME_S:
        raise DropError("out_of_order", "a later message of this sensor came before it")
    if binding.max_age_s and at - source.heard_at > binding.max_age_s:
        forget(source)
    source.heard_at = at
    if not binding.numeric:
        return found[0]
    if not binding.columns and isinstance(found[0], list):
        return _series_of_one(binding, source, found[0], at)
    source.cells.update({column: (at, value) for column, value in found.items()})
    values = [_cell(binding, source, column, at) for column in range(len(binding.cells))]
    if binding.window is None:
        named = [column.name for column in binding.columns if column.name]
        return dict(zip(named, values, strict=True)) if named else values
    return slide(binding.window, source, [Row(at, values)], at, flat=not binding.columns)


def _series_of_one(binding: Binding, source: Source, values: list[float], at: float) -> Any | None:
    """Take a message that holds several numbers: all of a request, or that many steps of a window."""
    if not values:
        raise DropError("missing", "the list is empty")
    if binding.window is None:
        return values
    return slide(binding.window, source, [Row(at, [value]) for value in values], at, flat=True)


def forget(source: Source) -> None:
    """Begin anew: what comes does not go on from what was."""
    source.cells, source.series, source.memory = {}, [], {}
    source.unasked, source.asked_at = 0, -math.inf


def _cell(binding: Binding, source: Source, column: int, at: float) -> float:
    what = binding.cells[column].name or f"column {column}"
    known = source.cells.get(column)
    if known is None:
        raise DropError("missing", f"{what} has not come yet")
    if binding.max_age_s and at - known[0] > binding.max_age_s:
        raise DropError("stale", f"{what} is older than {binding.max_age_s:g} s")
    return known[1]


def slide(window: WindowSettings, source: Source, rows: Sequence[Row], at: float, *, flat: bool) -> Any | None:
    """Push rows into a window; return its content where it is full and time has come, else None."""
    if not source.series:
        source.since = at
    source.series += rows
    source.unasked += len(rows)
    if window.last:
        del source.series[: -window.last]
        ready = len(source.series) == window.last and source.unasked >= max(1, window.every)
        content: list[list[float]] | None = [row.values for row in source.series] if ready else None
    else:
        _let_go(source, at - window.seconds)
        ready = at - source.since >= window.seconds and at - source.asked_at >= window.every
        content = _content(window, source.series, at) if ready else None
    if content is None:
        return None
    source.unasked, source.asked_at = 0, at
    return [values[0] for values in content] if flat else content


def _let_go(source: Source, begins_at: float) -> None:
    """Drop what lies before the window, but for the last value before it, which holds until the next."""
    series = source.series
    gone = next((at for at, row in enumerate(series) if row.at > begins_at), len(series))
    del series[: max(0, gone - 1)]
    if len(series) > MAX_VALUES:
        del series[:-MAX_VALUES]
        source.since = series[0].at  # the window is not whole: it begins to fill anew
        raise DropError("window_full", f"more than {MAX_VALUES} values came within the window's seconds")


def _content(window: WindowSettings, series: Sequence[Row], at: float) -> list[list[float]] | None:
    begins_at = at - window.seconds
    if not window.points:
        return [row.values for row in series if row.at > begins_at]
    return steps([row for row in series if row.at <= at], begins_at, window.seconds / window.points, window.points)


def steps(series: Sequence[Row], begins_at: float, step_s: float, points: int) -> list[list[float]] | None:
    """Return the means of `points` even steps; an empty one repeats the one before. None where the first has none."""
    sums: list[list[Row]] = [[] for _ in range(points)]
    value: list[float] | None = None
    for row in series:
        at = math.ceil((row.at - begins_at) / step_s) - 1
        if at < 0:
            value = row.values
        else:
            sums[min(at, points - 1)].append(row)
    content: list[list[float]] = []
    for rows in sums:
        if rows:
            value = [math.fsum(column) / len(rows) for column in zip(*(row.values for row in rows), strict=True)]
        if value is None:
            return None
        content.append(value)
    return content


def compose(binding: Binding, source: Source, inputs: Any) -> Body:
    """Return the request's body; raises DropError where the values do not fill the tensor."""
    if binding.tensor is not None:
        return _tensors(binding, source, _flat(inputs))
    if isinstance(inputs, bytes):
        if not binding.parameters:
            return Body(sniff(inputs), Dialect.HUGGINGFACE, inputs)
        inputs = base64.b64encode(inputs).decode()
    elif binding.take == "text" and not binding.parameters:
        return Body(TEXT, Dialect.HUGGINGFACE, inputs.encode())
    if rules.is_number(inputs):
        inputs = [inputs]
    if not isinstance(inputs, str | list | dict) or inputs == []:
        raise DropError("unreadable", f"{binding.take} is no text, list or object")
    question = {"inputs": inputs, "parameters": binding.parameters} if binding.parameters else {"inputs": inputs}
    return Body(JSON, Dialect.HUGGINGFACE, _encoder.encode(question))


def _flat(inputs: Any) -> list[float]:
    if isinstance(inputs, dict):
        return list(inputs.values())
    return [value for one in inputs for value in (one if isinstance(one, list) else [one])]


def _tensors(binding: Binding, source: Source, values: list[float]) -> Body:
    tensor = binding.tensor
    assert tensor is not None
    shape = _shape(tensor.shape, len(values))
    entries = [_tensor(tensor.name, shape, tensor.datatype, values)]
    for name, state in binding.state.items():
        known = source.memory.get(name)
        entries.append(
            {**known, "name": name}
            if known is not None
            else _tensor(name, state.shape, state.datatype, [0.0] * math.prod(state.shape))
        )
    return Body(JSON, Dialect.OPEN_INFERENCE, _encoder.encode({"inputs": entries}))


def _shape(wanted: Sequence[int], count: int) -> list[int]:
    known = math.prod(size for size in wanted if size != -1)
    free = count // known if -1 in wanted else 1
    if known * free != count or not count:
        raise DropError("wrong_shape", f"{count} values do not make the shape {list(wanted)}")
    return [free if size == -1 else size for size in wanted]


def _tensor(name: str, shape: Sequence[int], datatype: str, values: Sequence[float]) -> dict[str, Any]:
    data: Sequence[float] = values
    if not datatype.startswith("FP"):
        if not all(value.is_integer() for value in values):
            raise DropError("not_a_number", f"{datatype} takes whole numbers")
        data = [int(value) for value in values]
    return {"name": name, "shape": list(shape), "datatype": datatype, "data": data}


class Answering:
    """What one binding makes of an answer."""

    def __init__(self, binding: Binding) -> None:
        self._binding = binding
        self._answer = rules.parse_path(binding.answer) if binding.answer.startswith("$") else None
        self._measure = rules.parse_path(binding.measure) if binding.measure else None
        self._memories = {state.source: name for name, state in binding.state.items()}

    def take(self, source: Source, body: bytes, answerer: str) -> bytes | None:
        """Return the payload to publish, or None; raises DropError where the answer lacks what is asked of it."""
        value = _json.decode(body)
        if self._memories:
            value = self._remember(source, value, answerer)
        try:
            answer = self._part(value)
            measure = rules.default_measure(value, answer)
            if self._measure is not None:
                measure = rules.read_path(self._measure, value)
        except LookupError as error:
            raise DropError("no_answer", f"in the answer {error}") from None
        return self._gate(source, answer, measure)

    def _part(self, value: Any) -> Any:
        if self._answer is not None:
            return rules.read_path(self._answer, value)
        if self._binding.answer == "outputs":
            return value["outputs"]
        if self._binding.answer:
            return _best(value)[self._binding.answer]
        return rules.default_answer(value)

    def _remember(self, source: Source, value: Any, answerer: str) -> Any:
        """Keep the state tensors; return the answer without them. A state is not taken over by another version."""
        outputs = value["outputs"]
        kept = {self._memories[one["name"]]: one for one in outputs if one["name"] in self._memories}
        if len(kept) < len(self._memories):
            lacking = min(set(self._memories) - {one["name"] for one in outputs})
            raise DropError("no_answer", f"the model gives no tensor {lacking}")
        foreign = source.answerer not in {"", answerer}
        source.memory, source.answerer = {} if foreign else kept, answerer
        return {**value, "outputs": [one for one in outputs if one["name"] not in self._memories]}

    def _gate(self, source: Source, answer: Any, measure: Any) -> bytes | None:
        binding = self._binding
        if binding.on in {"above", "below"}:
            return self._cross(source, answer, measure)
        if binding.on == "change" and source.told and not _differs(source.last, answer, binding.hysteresis):
            return None
        source.last, source.told = answer, True
        return rules.to_payload(answer)

    def _cross(self, source: Source, answer: Any, measure: Any) -> bytes | None:
        """Publish when the threshold is crossed; again only after a return beyond the hysteresis."""
        binding = self._binding
        if not rules.is_number(measure) or binding.threshold is None:
            raise DropError("no_answer", "what is compared with the threshold is no number")
        over = measure - binding.threshold if binding.on == "above" else binding.threshold - measure
        if not source.raised and over > 0:
            source.raised = True
            return rules.to_payload(answer)
        if source.raised and over <= -binding.hysteresis:
            source.raised = False
            return binding.cleared.encode() or None
        return None


def _best(value: Any) -> dict[str, Any]:
    """Return the best label of an answer with its score; raises LookupError."""
    match value:
        case {"outputs": [{"label": label, "score": score}, *_]} | {"outputs": {"label": label, "score": score}}:
            return {"label": label, "score": score}
    raise LookupError("no label and score are there")


def _differs(one: Any, other: Any, tolerance: float) -> bool:
    if rules.is_number(one) and rules.is_number(other):
        return bool(abs(one - other) > tolerance)
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return any(_differs(left, right, tolerance) for left, right in zip(one, other, strict=True))
    return bool(one != other)
