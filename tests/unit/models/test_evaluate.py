"""When an answer counts as the recorded one, and when a version may serve."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from models.evaluate import Answered, judge, matches, quantile
from models.manifest import Budget, Golden, Manifest


def manifest(task: str = "tabular-regression", budget: Budget = Budget()) -> Manifest:  # noqa: B008 - frozen
    return Manifest(schema=1, name="m", version="1", task=task, format="onnx", variants=[], files=[], budget=budget)


def answered(expected: Any, actual: Any, ms: float = 1.0, tolerance: float = 0.01, code: str = "") -> Answered:
    golden = Golden("application/json", b"{}", msgspec.Raw(msgspec.json.encode(expected)), tolerance)
    return Answered(golden, msgspec.json.encode(actual), ms, code=code, message="why")


@pytest.mark.parametrize(
    ("expected", "actual"),
    [
        (1.0, 1.009),
        (1, 1.0),
        ({"a": [1, "x", None, True]}, {"a": [1.005, "x", None, True]}),
        ([{"label": "a", "score": 0.5}, {"label": "b", "score": 0.499}],
         [{"label": "b", "score": 0.5}, {"label": "a", "score": 0.499}]),
        ([{"label": "a", "score": 0.9}, {"label": "b", "score": 0.05}],
         [{"label": "a", "score": 0.9}, {"label": "c", "score": 0.05}]),
    ],
)  # fmt: skip
def test_numbers_within_the_tolerance_and_near_ties_match(expected: Any, actual: Any) -> None:
    assert matches(expected, actual, 0.01) is None


@pytest.mark.parametrize(
    ("expected", "actual", "where"),
    [
        (1.0, 1.011, "."),
        (1, True, "."),
        ("a", "b", "."),
        (None, 0, "."),
        ({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}, ".a.b[1]"),
        ({"a": 1}, {"a": 1, "b": 2}, "."),
        ([1, 2], [1], "."),
        ([], {}, "."),
        ([{"label": "a", "score": 0.9}], [{"label": "b", "score": 0.9}, {"label": "a", "score": 0.1}], "."),
        ([{"label": "a", "score": 0.9}, {"label": "b", "score": 0.1}],
         [{"label": "b", "score": 0.9}, {"label": "a", "score": 0.1}], "["),
    ],
)  # fmt: skip
def test_what_differs_is_said_with_its_place(expected: Any, actual: Any, where: str) -> None:
    problem = matches(expected, actual, 0.01)
    assert problem is not None
    assert problem.startswith(where)


def test_a_label_from_below_the_cut_must_lie_near_it() -> None:
    expected = [{"label": "a", "score": 0.6}, {"label": "b", "score": 0.3}]
    actual = [{"label": "a", "score": 0.6}, {"label": "c", "score": 0.2}]
    assert matches(expected, actual, 0.01) is not None


def test_a_version_passes_inside_tolerance_and_budget() -> None:
    verdict = judge(manifest(budget=Budget(p95_ms=10, memory_mb=100)), [answered(1.0, 1.001)], memory_mb=99)
    assert verdict.passed
    assert (verdict.p95_ms, verdict.memory_mb) == (1.0, 99)


def test_a25_a_slow_large_or_wrong_version_is_told_apart() -> None:
    slow = judge(manifest(budget=Budget(p95_ms=10)), [answered(1, 1, ms=11)], 0)
    large = judge(manifest(budget=Budget(memory_mb=100)), [answered(1, 1)], 101)
    wrong = judge(manifest(), [answered(1, 1), answered(1, 2)], 0)
    failed = judge(manifest(), [answered(1, 1, code="model_failed")], 0)
    assert [bool(verdict.passed) for verdict in (slow, large, wrong, failed)] == [False] * 4
    assert "p95_ms" in slow.problems[0]
    assert "memory_mb" in large.problems[0]
    assert wrong.problems[0].startswith("golden[1]: ")
    assert failed.problems == ["golden[0]: model_failed: why"]


def test_an_answer_that_is_no_json_is_a_problem() -> None:
    broken = msgspec.structs.replace(answered(1, 1), body=b"\xff")
    assert judge(manifest(), [broken], 0).problems == ["golden[0]: the answer is not JSON"]


def test_generated_texts_need_the_same_shape_but_not_the_same_tokens() -> None:
    def verdict(actual: Any) -> bool:
        return judge(manifest("text-generation"), [answered({"outputs": {"generated_text": "a"}}, actual)], 0).passed

    assert verdict({"outputs": {"generated_text": "quite another"}})
    assert not verdict({"outputs": {"generated_text": ""}})
    assert not verdict({"outputs": {}})


def test_a_quantile_is_one_of_the_values() -> None:
    assert quantile([], 0.95) == 0
    assert quantile([3.0], 0.95) == 3.0
    assert quantile([float(value) for value in range(1, 101)], 0.95) == 95.0
