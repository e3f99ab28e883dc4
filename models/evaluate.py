"""Golden samples, latency and memory against what a manifest allows: one verdict. Pure: no I/O, no clock."""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from models.manifest import Budget, Golden, Manifest

MAX_SHOWN: Final = 80
BOX_PIXELS: Final = 1
"""How far a box's corner may lie from the golden one, where the tolerance allows less."""

MASK_SHARE: Final = 0.01
"""The part of a mask's pixels that may differ from the golden ones."""

MAX_MASK_BYTES: Final = 64 << 20
_GENERATING: Final = frozenset({"summarization", "text-generation", "translation"})
"""Tasks whose greedy tokens differ between processors, so that only an answer's shape can be asked for."""


class Answered(msgspec.Struct, frozen=True):
    """How one golden sample was answered: its body, or the code and message of its error, and the time it took."""

    golden: Golden
    body: bytes
    ms: float
    code: str = ""
    message: str = ""


class Verdict(msgspec.Struct, frozen=True):
    """What a trial found; `problems` is empty where the version may serve."""

    problems: list[str]
    p95_ms: float
    memory_mb: float

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def judge(manifest: Manifest, answers: Sequence[Answered], memory_mb: float) -> Verdict:
    """Judge a version by its answers (each sample at least once, warm) and its memory in MiB (0: not measured)."""
    problems = [
        f"golden[{number}]: {problem}"
        for number, answered in enumerate(answers)
        if (problem := judge_answer(manifest.task, answered)) is not None
    ]
    p95_ms = quantile([answered.ms for answered in answers], 0.95)
    problems += judge_cost(manifest.budget, p95_ms, memory_mb)
    return Verdict(problems=problems, p95_ms=p95_ms, memory_mb=memory_mb)


def judge_cost(budget: Budget, p95_ms: float, memory_mb: float) -> list[str]:
    """Return what is over the budget; a bound of 0 is none."""
    problems = []
    if 0 < budget.p95_ms < p95_ms:
        problems.append(f"budget.p95_ms: {p95_ms:.1f} ms are over {budget.p95_ms:g} ms")
    if 0 < budget.memory_mb < memory_mb:
        problems.append(f"budget.memory_mb: {memory_mb:.0f} MiB are over {budget.memory_mb} MiB")
    return problems


def judge_answer(task: str, answered: Answered) -> str | None:
    """Return what is wrong with an answer, or None."""
    if answered.code:
        return f"{answered.code}: {answered.message}"
    try:
        expected = msgspec.json.decode(answered.golden.expected)
        actual = msgspec.json.decode(answered.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return "the answer is not JSON"
    if task in _GENERATING:
        return _same_shape(expected, actual)
    return matches(expected, actual, answered.golden.tolerance)


def quantile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least `share` of the values do not exceed (nearest rank); 0 for none."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)] if ranked else 0.0


def matches(expected: Any, actual: Any, tolerance: float, path: str = "") -> str | None:
    """Return None where two JSON values agree, numbers within `tolerance`, else where and how they differ."""
    if _is_number(expected) and _is_number(actual):
        near = abs(expected - actual) <= tolerance
        return None if near else _differ(path, expected, actual)
    if isinstance(expected, dict) and isinstance(actual, dict):
        return _match_members(expected, actual, tolerance, path)
    if isinstance(expected, list) and isinstance(actual, list):
        if _are_scores(expected) and _are_scores(actual):
            return _match_scores(expected, actual, tolerance, path)
        return _match_lists(expected, actual, tolerance, path)
    same = type(expected) is type(actual) and expected == actual
    return None if same else _differ(path, expected, actual)


def _match_members(expected: dict[str, Any], actual: dict[str, Any], tolerance: float, path: str) -> str | None:
    if expected.keys() != actual.keys():
        return _differ(path, sorted(expected), sorted(actual))
    found = (_match_member(name, expected[name], actual[name], tolerance, f"{path}.{name}") for name in expected)
    return next((problem for problem in found if problem), None)


def _match_member(name: str, expected: Any, actual: Any, tolerance: float, path: str) -> str | None:
    """Compare a member; corners in whole pixels and masks differ a little between processors, as numbers do."""
    if name == "box":
        tolerance = max(tolerance, BOX_PIXELS)
    if name == "mask" and isinstance(expected, str) and isinstance(actual, str):
        wanted, given = _mask_pixels(expected), _mask_pixels(actual)
        if wanted is not None and given is not None and len(wanted) == len(given):
            differing = (int.from_bytes(wanted) ^ int.from_bytes(given)).bit_count() / 8
            near = differing <= MASK_SHARE * len(wanted)
            return None if near else f"{path}: {differing / len(wanted):.1%} of the pixels differ"
    return matches(expected, actual, tolerance, path)


def _mask_pixels(text: str) -> bytes | None:
    """Return the rows of a mask as our own files hold them (`models.images.encode_mask`); None for anything else."""
    try:
        data = base64.b64decode(text, validate=True)
        at = data.index(b"IDAT")
        length = int.from_bytes(data[at - 4 : at])
        return zlib.decompressobj().decompress(data[at + 4 : at + 4 + length], MAX_MASK_BYTES)
    except (ValueError, zlib.error):
        return None


def _match_lists(expected: list[Any], actual: list[Any], tolerance: float, path: str) -> str | None:
    if len(expected) != len(actual):
        return f"{path or '.'}: expected {len(expected)} values, got {len(actual)}"
    pairs = enumerate(zip(expected, actual, strict=True))
    found = (matches(want, got, tolerance, f"{path}[{at}]") for at, (want, got) in pairs)
    return next((problem for problem in found if problem), None)


def _match_scores(expected: list[Any], actual: list[Any], tolerance: float, path: str) -> str | None:
    """Compare ranked labels by label: two whose scores lie within the tolerance may change places, also at the cut."""
    if len(expected) != len(actual):
        return f"{path or '.'}: expected {len(expected)} labels, got {len(actual)}"
    wanted = {entry["label"]: entry["score"] for entry in expected}
    given = {entry["label"]: entry["score"] for entry in actual}
    for label in wanted.keys() | given.keys():
        # A label that fell off one list's end has at most the score of that list's last.
        want = wanted.get(label, min(wanted.values()))
        got = given.get(label, min(given.values()))
        if abs(want - got) > tolerance:
            return _differ(f"{path}[{label}]", want, got)
    return None


def _same_shape(expected: Any, actual: Any) -> str | None:
    """Compare two answers of a generating model: the same members, and a text where there was one."""
    if isinstance(expected, dict) and isinstance(actual, dict):
        missing = expected.keys() - actual.keys()
        if missing:
            return f"the answer has no {min(missing)!r}"
        found = (_same_shape(expected[name], actual[name]) for name in expected)
        return next((problem for problem in found if problem), None)
    if isinstance(expected, list) and isinstance(actual, list) and expected and actual:
        return _same_shape(expected[0], actual[0])
    if isinstance(expected, str) and expected and not (isinstance(actual, str) and actual):
        return "the answer has an empty text"
    return None


def _are_scores(values: list[Any]) -> bool:
    return bool(values) and all(
        isinstance(value, dict)
        and value.keys() == {"label", "score"}
        and isinstance(value["label"], str)
        and _is_number(value["score"])
        for value in values
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _differ(path: str, expected: object, actual: object) -> str:
    return f"{path or '.'}: expected {str(expected)[:MAX_SHOWN]}, got {str(actual)[:MAX_SHOWN]}"
