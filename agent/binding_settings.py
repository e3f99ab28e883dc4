"""`[[bindings]]` of the configuration: what may be said, and what is refused with a remedy. Pure: no I/O, no clock."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from agent import binding_rules as rules
from cloud_sync.messages import is_text
from cloud_sync.strict_toml import ConfigError
from models.manifest import is_name

CLIENT: Final = "binding"
"""A binding asks as the client `binding.{name}`."""
MAX_NAME: Final = 56
WHOLE: Final = ("number", "text", "image", "sound")
"""What `take` can say of a whole message; a JSON path takes a part of one."""
MAX_VALUES: Final = 10_000
"""Values of one window."""
MAX_ALL_VALUES: Final = 2_000_000
"""Values of all windows of one binding."""
DATATYPES: Final = ("FP32", "FP64", "FP16", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64")
ASKING: Final = ("label", "score", "outputs")
"""What `answer` can say beside a JSON path."""

Number = Annotated[float, Meta(ge=-1e300, le=1e300)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]


class Column(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One number of a row: `value * scale + offset`. Without a `topic` it comes with the binding's own messages."""

    take: str
    name: str = ""
    topic: str = ""
    scale: Number = 1.0
    offset: Number = 0.0


class WindowSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The last values as a series: `last` messages, or `seconds`; `points` makes even steps of these.

    `every`: ask after so many messages (with `last`), or when so many seconds have passed.
    """

    last: Annotated[int, Meta(ge=0, le=MAX_VALUES)] = 0
    seconds: Seconds = 0.0
    every: Seconds = 0.0
    points: Annotated[int, Meta(ge=0, le=MAX_VALUES)] = 0


class TensorSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The graph's input that the values become (Open Inference Protocol); one size may be -1."""

    name: str
    shape: list[int]
    datatype: str = "FP32"


class StateTensor(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An input that takes what the answer before had in its tensor `from`; zeros of this shape at first."""

    source: str = msgspec.field(name="from")
    shape: list[Annotated[int, Meta(ge=1)]]
    datatype: str = "FP32"


class Binding(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Messages on a topic become requests, and their answers messages."""

    name: str
    topic: str
    model: str
    publish: str
    take: str = ""
    columns: list[Column] = []
    scale: Number = 1.0
    offset: Number = 0.0
    words: dict[str, Number] = {}
    missing: Literal["drop", "last"] = "drop"
    time: str = ""
    max_age_s: Seconds = 0.0
    window: WindowSettings | None = None
    tensor: TensorSettings | None = None
    state: dict[str, StateTensor] = {}
    parameters: dict[str, Any] = {}
    retained: Literal["ignore", "use"] = "ignore"
    max_topics: Annotated[int, Meta(ge=1, le=10_000)] = 100
    max_waiting: Annotated[int, Meta(ge=1, le=10_000)] = 64
    deadline_ms: Annotated[int, Meta(ge=0, le=86_400_000)] = 0
    priority: Annotated[int, Meta(ge=0, le=9)] = 5
    local_only: bool = False
    answer: str = ""
    on: Literal["always", "change", "above", "below"] = "always"
    measure: str = ""
    threshold: Number | None = None
    hysteresis: Annotated[float, Meta(ge=0, le=1e300)] = 0.0
    cleared: str = ""
    qos: Annotated[int, Meta(ge=0, le=1)] = 0
    retain: bool = False

    @property
    def client(self) -> str:
        """The client name under which it asks."""
        return f"{CLIENT}.{self.name}"

    @property
    def cells(self) -> list[Column]:
        """What is taken: the columns, or the one value."""
        return self.columns or [Column(take=self.take, scale=self.scale, offset=self.offset)]

    @property
    def filters(self) -> list[str]:
        """Every filter whose messages it reads, its own first."""
        return [self.topic, *dict.fromkeys(column.topic for column in self.columns if column.topic)]

    @property
    def numeric(self) -> bool:
        """Whether what is taken must be numbers."""
        scaled = self.scale != 1.0 or self.offset != 0.0 or bool(self.words)
        return bool(self.columns or self.window or self.tensor or scaled or self.take == "number")


def check_bindings(bindings: Sequence[Binding], base: str) -> None:
    """Refuse what cannot be meant; `base` is where the box's own topics begin. Raises ConfigError."""
    names: set[str] = set()
    for number, binding in enumerate(bindings):
        for field, value, problem in _problems(binding, base):
            raise ConfigError(f"`bindings[{number}].{field}` = {value!r}: {problem}")
        if binding.name in names:
            raise ConfigError(f"`bindings[{number}].name` = {binding.name!r}: another binding has this name")
        names.add(binding.name)
    _check_filters(bindings)
    _check_loops(bindings)


_Problems = Iterator[tuple[str, object, str]]


def _problems(binding: Binding, base: str) -> _Problems:
    """Yield field, value and what is wrong."""
    if not is_name(binding.name) or len(binding.name) > MAX_NAME:
        right = f"use 1 to {MAX_NAME} of a-z, 0-9, `.`, `_`, `-`, beginning with a-z or 0-9"
        yield "name", binding.name, right
    if not is_name(binding.model):
        yield "model", binding.model, "is no name of a model; name it without its version"
    yield from _topic_problems(binding, base)
    yield from _taking_problems(binding)
    yield from _time_problems(binding)
    yield from _window_problems(binding)
    yield from _tensor_problems(binding)
    yield from _answer_problems(binding)


def _topic_problems(binding: Binding, base: str) -> _Problems:
    for pattern in binding.filters:
        field = "topic" if pattern == binding.topic else "columns.topic"
        try:
            rules.check_filter(pattern)
        except ValueError as error:
            yield field, pattern, str(error)
            return
        if rules.overlaps(pattern, f"{base}/+/#"):
            yield field, pattern, f"the box's own topics under {base}/ would match; write a narrower filter"
        if rules.wildcards(pattern) != rules.wildcards(binding.topic):
            yield field, pattern, f"must have the wildcards of {binding.topic!r}, which tell what belongs together"
    try:
        rules.check_template(binding.publish, binding.filters)
    except ValueError as error:
        yield "publish", binding.publish, str(error)
        return
    for pattern in binding.filters:
        if rules.overlaps(rules.outcomes(binding.publish, pattern, binding.model), f"{base}/+/#"):
            yield "publish", binding.publish, f"topics under {base}/ are the box's own; choose another beginning"


def _taking_problems(binding: Binding) -> _Problems:
    if bool(binding.take) == bool(binding.columns):
        right = f"set `take` ({', '.join(WHOLE)}, or a JSON path such as $.temperature) or `columns`, one of them"
        yield "take", binding.take, right
        return
    for at, column in enumerate(binding.cells):
        field = f"columns[{at}].take" if binding.columns else "take"
        if column.take.startswith("$"):
            try:
                rules.parse_path(column.take)
            except ValueError as error:
                yield field, column.take, str(error)
        elif column.take not in WHOLE:
            yield field, column.take, f"right is {', '.join(WHOLE)}, or a JSON path such as $.temperature"
        elif binding.numeric and column.take != "number":
            right = "`columns`, `window`, `tensor`, `scale`, `offset` and `words` go with numbers"
            yield field, column.take, f"{right}: take `number` or a JSON path"
    yield from _row_problems(binding)


def _time_problems(binding: Binding) -> _Problems:
    if not binding.time:
        return
    try:
        rules.parse_path(binding.time)
    except ValueError as error:
        yield "time", binding.time, str(error)
    if not any(column.take.startswith("$") for column in binding.cells):
        yield "time", binding.time, "is read from the message's JSON, of which nothing else is taken"


def _row_problems(binding: Binding) -> _Problems:
    named = [column.name for column in binding.columns if column.name]
    if len(set(named)) != len(named) or 0 < len(named) < len(binding.columns):
        yield "columns", named, "name every column or none, and none twice"
    if binding.columns and (binding.scale != 1.0 or binding.offset != 0.0):
        yield "scale", binding.scale, "each of `columns` has a `scale` and an `offset` of its own"
    if named and (binding.window or binding.tensor):
        yield "columns", named, "a window or tensor has no names of columns; leave them out"


def _window_problems(binding: Binding) -> _Problems:
    window = binding.window
    if window is None:
        return
    if bool(window.last) == bool(window.seconds):
        yield "window", {"last": window.last, "seconds": window.seconds}, "set `last` or `seconds`, one of them"
    if window.points and not window.seconds:
        yield "window.points", window.points, "goes with `seconds`; with `last` the points are the messages"
    if window.last and window.every != int(window.every):
        yield "window.every", window.every, "counts messages here; a whole number is right"
    values = (window.last or MAX_VALUES) * len(binding.cells) * binding.max_topics
    if window.last and values > MAX_ALL_VALUES:
        right = f"{values} values could be held, and {MAX_ALL_VALUES} may be: lower `last` or `max_topics`"
        yield "window.last", window.last, right


def _tensor_problems(binding: Binding) -> _Problems:
    tensor = binding.tensor
    if binding.state and tensor is None:
        yield "state", sorted(binding.state), "needs `tensor` too: only tensors have names that state can go into"
    if tensor is None:
        return
    free = [size for size in tensor.shape if size == -1]
    if not tensor.name or len(free) > 1 or any(size < 1 and size != -1 for size in tensor.shape):
        yield "tensor.shape", tensor.shape, "sizes are above 0, and one may be -1"
    if tensor.datatype not in DATATYPES:
        yield "tensor.datatype", tensor.datatype, f"right is one of {', '.join(DATATYPES)}"
    if binding.parameters:
        yield "parameters", sorted(binding.parameters), "tensors take none"
    for name, state in binding.state.items():
        if name == tensor.name:
            yield "state", name, "this input takes the values already"
        if math.prod(state.shape) > MAX_VALUES * 10 or state.datatype not in DATATYPES:
            right = f"at most {MAX_VALUES * 10} values of {', '.join(DATATYPES)}"
            yield f"state.{name}", [state.shape, state.datatype], right


def _answer_problems(binding: Binding) -> _Problems:
    for field, text, words in (("answer", binding.answer, ASKING), ("measure", binding.measure, ())):
        if text and text not in words:
            try:
                rules.parse_path(text)
            except ValueError as error:
                right = f"{', '.join(words)} or " if words else ""
                yield field, text, f"right is {right}a JSON path into the answer: {error}"
    compares = binding.on in {"above", "below"}
    if compares != (binding.threshold is not None):
        yield "threshold", binding.threshold, 'goes with `on = "above"` or `"below"`, and they with it'
    if binding.hysteresis and binding.on == "always":
        yield "hysteresis", binding.hysteresis, 'goes with `on = "change"`, `"above"` or `"below"`'
    if (binding.cleared or binding.measure) and not compares:
        field = "cleared" if binding.cleared else "measure"
        yield field, getattr(binding, field), 'goes with `on = "above"` or `"below"`'
    if not is_text(binding.cleared):
        yield "cleared", binding.cleared, "holds control characters"


def _check_filters(bindings: Sequence[Binding]) -> None:
    """Refuse filters of which a broker could send one message twice and neither lies under the other."""
    filters = list(dict.fromkeys(pattern for binding in bindings for pattern in binding.filters))
    for at, one in enumerate(filters):
        for other in filters[at + 1 :]:
            if rules.overlaps(one, other) and not rules.covers(one, other) and not rules.covers(other, one):
                remedy = "make one the wider of the two, or take them apart"
                raise ConfigError(f"`bindings`: {one!r} and {other!r} share some topics and not all: {remedy}")


def _check_loops(bindings: Sequence[Binding]) -> None:
    """Refuse answers that come back as questions, over one binding or several."""
    after = {binding.name: [other.name for other in bindings if _feeds(binding, other)] for binding in bindings}
    for start, first in after.items():
        reached, ahead = set[str](), list(first)
        while ahead:
            name = ahead.pop()
            if name == start:
                raise ConfigError(
                    f"`bindings`: what {start!r} publishes would come back to it as a message, without end: "
                    "publish on a topic that no binding on the way reads"
                )
            if name not in reached:
                reached.add(name)
                ahead += after[name]


def _feeds(binding: Binding, other: Binding) -> bool:
    """Whether an answer of one binding can be a message of another."""
    answers = [rules.outcomes(binding.publish, pattern, binding.model) for pattern in binding.filters]
    return any(rules.overlaps(answer, pattern) for answer in answers for pattern in other.filters)
