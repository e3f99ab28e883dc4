"""What bindings go by: topics, templates of topics, JSON paths, numbers. Pure: no I/O, no clock.

JSON paths are a part of RFC 9535: `$`, `.key`, `['key']`, `[0]`, `[-1]`, `[*]` over a list.
"""

from __future__ import annotations

import datetime as dt
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec

from cloud_sync.messages import is_text

MAX_FILTER_BYTES: Final = 512
MAX_STEPS: Final = 32
MILLISECONDS: Final = 1e11
MAX_DIGITS: Final = 64
"""Of a number that is written as text."""

Step = str | int | None
"""A key, an index, or every element of a list (None)."""
Path = tuple[Step, ...]

_STEP = re.compile(
    r"\.(?P<name>[^\W\d]\w*)"
    r"|\['(?P<single>[^'\\]+)'\]"
    r'|\["(?P<double>[^"\\]+)"\]'
    r"|\[(?P<index>-?(?:0|[1-9][0-9]{0,8}))\]"
    r"|\[(?P<all>\*)\]"
)
_PLACE = re.compile(r"\{([^{}]*)\}")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")


def check_filter(text: str) -> None:
    """Raise ValueError, saying why, where `text` is no topic filter (MQTT 5 section 4.7) that a binding can read."""
    if not text or not is_text(text) or len(text.encode()) > MAX_FILTER_BYTES:
        raise ValueError(f"a filter has 1 to {MAX_FILTER_BYTES} bytes and no control characters")
    if text.startswith("$share/"):
        raise ValueError("a shared subscription would give this box a part of the messages only")
    parts = text.split("/")
    for at, part in enumerate(parts):
        if part == "#" and at != len(parts) - 1:
            raise ValueError("`#` stands for the rest of a topic: it can only come last")
        if part not in {"+", "#"} and ("+" in part or "#" in part):
            raise ValueError("`+` and `#` stand alone between slashes")


def match(pattern: str, topic: str) -> tuple[str, ...] | None:
    """Return what the wildcards of a filter stand for in a topic; None where it does not fall under the filter.

    `#` may stand for several parts, with their slashes, and for none.
    """
    if topic.startswith("$") and pattern[:1] in {"+", "#"}:
        return None
    wanted, parts = pattern.split("/"), topic.split("/")
    found: list[str] = []
    for at, want in enumerate(wanted):
        if want == "#":
            return (*found, "/".join(parts[at:]))
        if at >= len(parts) or want not in {"+", parts[at]}:
            return None
        if want == "+":
            found.append(parts[at])
    return tuple(found) if len(wanted) == len(parts) else None


def wildcards(pattern: str) -> list[str]:
    """Return the wildcards of a filter, in order."""
    return [part for part in pattern.split("/") if part in {"+", "#"}]


def covers(wide: str, narrow: str) -> bool:
    """Whether every topic under `narrow` falls under `wide`."""
    if narrow.startswith("$") and wide[:1] in {"+", "#"}:
        return False
    return _covers(wide.split("/"), narrow.split("/"))


def _covers(wide: Sequence[str], narrow: Sequence[str]) -> bool:
    for at, want in enumerate(wide):
        if want == "#":
            return True
        if at >= len(narrow) or narrow[at] == "#" or want not in {"+", narrow[at]}:
            return False
    return len(wide) == len(narrow)


def overlaps(one: str, other: str) -> bool:
    """Whether a topic can fall under both; in templates `#` may stand in the middle."""
    return _overlaps(tuple(one.split("/")), tuple(other.split("/")))


@functools.lru_cache(maxsize=1024)
def _overlaps(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    if not one or not other:
        return all(part == "#" for part in one + other)
    if one[0] == "#":
        return _overlaps(one[1:], other) or _overlaps(one, other[1:])
    if other[0] == "#":
        return _overlaps(one, other[1:]) or _overlaps(one[1:], other)
    return (one[0] == other[0] or "+" in {one[0], other[0]}) and _overlaps(one[1:], other[1:])


def cover(filters: Sequence[str]) -> list[str]:
    """Return the filters to subscribe to: none lies under another, so that no message comes twice."""
    kept: list[str] = []
    for at, one in enumerate(filters):
        others = [*kept, *filters[at + 1 :]]
        if not any(covers(other, one) for other in others):
            kept.append(one)
    return kept


def places(template: str) -> list[str]:
    """Return what stands in braces in a template."""
    return _PLACE.findall(template)


def check_template(template: str, patterns: Sequence[str]) -> None:
    """Raise ValueError, saying why, where a template cannot become topics for messages under these filters."""
    known = {"topic", "model"} | {str(number + 1) for number in range(len(wildcards(patterns[0])))}
    for place in places(template):
        if place not in known:
            right = ", ".join(f"{{{name}}}" for name in sorted(known))
            raise ValueError(f"{{{place}}} stands for nothing here; these do: {right}")
    several = {"{topic}"} | {f"{{{at + 1}}}" for at, kind in enumerate(wildcards(patterns[0])) if kind == "#"}
    for part in template.split("/"):
        if part not in several and any(place in part for place in several):
            raise ValueError(f"{part!r}: what can be several parts of a topic stands alone between slashes")
    plain = _PLACE.sub("x", template)
    if not plain or not is_text(plain) or plain.startswith("$") or any(sign in plain for sign in "+#{}"):
        raise ValueError("a topic to publish on has no wildcards, no single braces and does not begin with `$`")


def fill(template: str, topic: str, parts: Sequence[str], model: str) -> str:
    """Return the topic that a template becomes for one message."""

    def value(found: re.Match[str]) -> str:
        name = found[1]
        return topic if name == "topic" else model if name == "model" else parts[int(name) - 1]

    return _PLACE.sub(value, template)


def outcomes(template: str, pattern: str, model: str) -> str:
    """Return a filter of every topic that a template can become for messages under `pattern`, or a wider one."""
    kinds = wildcards(pattern)

    def value(found: re.Match[str]) -> str:
        name = found[1]
        return pattern if name == "topic" else model if name == "model" else kinds[int(name) - 1]

    parts = _PLACE.sub(value, template).split("/")
    return "/".join("#" if "#" in part else "+" if "+" in part else part for part in parts)


def parse_path(text: str) -> Path:
    """Return the steps of a JSON path; raises ValueError saying where it is not understood."""
    if not text.startswith("$"):
        raise ValueError("a JSON path begins with `$`")
    steps: list[Step] = []
    at = 1
    while at < len(text):
        found = _STEP.match(text, at)
        if found is None or len(steps) == MAX_STEPS:
            raise ValueError(f"cannot be read from {text[at : at + 20]!r} on; steps are .key ['any key'] [0] [-1] [*]")
        steps.append(_step(found))
        at = found.end()
    return tuple(steps)


def _step(found: re.Match[str]) -> Step:
    if found["index"] is not None:
        return int(found["index"])
    return None if found["all"] else found["name"] or found["single"] or found["double"]


def read_path(path: Path, value: Any) -> Any:
    """Return what a path leads to in a JSON value, a list where it has `[*]`; raises LookupError naming the step."""
    for at, step in enumerate(path):
        if step is None:
            if not isinstance(value, list):
                raise LookupError(f"{show_path(path[:at])} is no list")
            return [read_path(path[at + 1 :], one) for one in value]
        value = _child(value, step, path[: at + 1])
    return value


def _child(value: Any, step: str | int, path: Path) -> Any:
    if isinstance(step, int):
        if isinstance(value, list) and -len(value) <= step < len(value):
            return value[step]
    elif isinstance(value, dict) and step in value:
        return value[step]
    raise LookupError(f"{show_path(path)} is not there")


def show_path(path: Path) -> str:
    """Return a path as its owner would write it."""

    def steps() -> Iterator[str]:
        for step in path:
            if step is None:
                yield "[*]"
            elif isinstance(step, int):
                yield f"[{step}]"
            else:
                yield f".{step}" if re.fullmatch(r"[^\W\d]\w*", step) else f"['{step}']"

    return "$" + "".join(steps())


def to_number(value: Any, words: Mapping[str, float]) -> float:
    """Return a sensor's value as a number: JSON numbers, true and false, numbers as text, the owner's own words.

    Raises ValueError for all else, and for what is not finite.
    """
    if isinstance(value, str):
        text = value.strip()
        if text in words:
            return words[text]
        if len(text) > MAX_DIGITS or not _NUMBER.fullmatch(text):
            raise ValueError("is no number")
        value = float(text)
    if not isinstance(value, int | float):
        raise ValueError("is no number")  # noqa: TRY004 - one error for all that a sensor may send
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError("is no finite number")
    return number


def to_time(value: Any) -> float:
    """Return seconds since 1970: of such seconds, milliseconds (from 100 thousand million on), or ISO 8601 text.

    A text without a zone is UTC. Raises ValueError.
    """
    if isinstance(value, str) and not _NUMBER.fullmatch(value.strip()):
        moment = dt.datetime.fromisoformat(value.strip())
        return (moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)).timestamp()
    number = to_number(value, {})
    if isinstance(value, bool) or number < 0:
        raise ValueError("is no time")
    return number / 1e3 if number >= MILLISECONDS else number


_TEXTS: Final = ("generated_text", "summary_text", "translation_text", "text", "answer")
"""Members of an answer that are its text (PROTOCOL 2)."""


def default_answer(value: Any) -> Any:
    """Return what a binding publishes of an answer where its owner names no part: label, text or number.

    The best label of a list of them; the only number of a list or tensor; else the outputs as they are.
    """
    match value:
        case {"choices": [{"message": {"content": answer}}, *_]} | {"outputs": [{"label": answer, "score": _}, *_]}:
            return answer
        case {"outputs": [{"name": _, "shape": _, "data": [*answer]}, *_]} | {"outputs": [*answer]}:
            return answer[0] if len(answer) == 1 and is_number(answer[0]) else answer
        case {"outputs": {"label": answer, "score": _}}:
            return answer
        case {"outputs": dict(outputs)}:
            return next((outputs[name] for name in _TEXTS if name in outputs), outputs)
        case {"outputs": outputs}:
            return outputs
    return value


def default_measure(value: Any, answer: Any) -> Any:
    """Return what is compared with a threshold where the owner names no path: the answer, else the best score."""
    if is_number(answer):
        return answer
    match value:
        case {"outputs": [{"score": score}, *_]} | {"outputs": {"score": score}}:
            return score
    return answer


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def to_payload(value: Any) -> bytes:
    """Return an answer as a message's bytes: texts as they are, all else as JSON."""
    return value.encode() if isinstance(value, str) else msgspec.json.encode(value)
