"""Which variants may be published, and what is told of them."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree as ET

import pytest

from cloud_sync.fleet.description import Gate
from cloud_sync.fleet.gate import Judged, refusals
from cloud_sync.fleet.plot import plot
from cloud_sync.fleet.table import variants_table
from cloud_sync.fleet.telling import lines_of
from models.manifest import Budget


def judged(name: str = "default", measure: str = "accuracy", value: float = 0.9, **more: Any) -> Judged:
    facts = {
        "bytes": 1 << 20,
        "samples": 100,
        "failed": 0,
        "p50_ms": 5.0,
        "p95_ms": 9.0,
        "cpu_ms": 5.0,
        "open_ms": 50.0,
        "memory_mb": 60.0,
    }
    return Judged(name=name, scores={measure: value}, **{**facts, **more})


@pytest.mark.parametrize(
    ("one", "gate", "budget", "says"),
    [
        (
            judged("int8", value=0.88),
            Gate(max_drop=0.01),
            Budget(),
            "accuracy 0.88 is 0.0200 worse than the 0.9 of default",
        ),
        (judged("int8", value=0.7), Gate(least={"accuracy": 0.8}), Budget(), "gate.least.accuracy: 0.7 is under 0.8"),
        (judged("int8"), Gate(least={"f1": 0.8}), Budget(), "f1: is not measured; there is accuracy"),
        (judged("int8", p95_ms=20.0), Gate(), Budget(p95_ms=10), "budget.p95_ms: 20.0 ms are over 10 ms"),
        (judged("int8", memory_mb=900.0), Gate(), Budget(memory_mb=300), "900 MiB are over 300 MiB"),
        (judged("int8", failed=3), Gate(), Budget(), "3 of 100 samples had no answer"),
    ],
)
def test_what_falls_under_its_gate_or_budget_is_refused_with_the_figure(
    one: Judged, gate: Gate, budget: Budget, says: str
) -> None:
    found = refusals([judged(), one], gate, budget)
    assert says in found["int8"][0]


def test_an_error_that_grows_is_a_drop_and_one_that_shrinks_is_none() -> None:
    gate = Gate(max_drop=0.1, least={"mae": 2.0})
    better, worse = judged("a", "mae", 0.8), judged("b", "mae", 1.2)
    found = refusals([judged("default", "mae", 1.0), better, worse], gate, Budget())
    assert list(found) == ["b"]
    assert "20.0% worse" in found["b"][0]
    assert "over 2" in refusals([judged("default", "mae", 3.0)], gate, Budget())["default"][0]


def test_without_a_gate_nothing_is_refused() -> None:
    assert not refusals([judged(), judged("int4", value=0.1)], Gate(), Budget())


def test_the_plot_is_an_svg_with_every_variant_whatever_its_figures() -> None:
    for figures in ([judged()], [judged(), judged("<int8>", value=0.5, p95_ms=0.01, bytes=1)], [judged(value=0.0)]):
        root = ET.fromstring(plot(figures, "text-classification"))
        texts = [text.text or "" for text in root.iter("{http://www.w3.org/2000/svg}text")]
        assert len(list(root.iter("{http://www.w3.org/2000/svg}circle"))) == len(figures)
        assert all(any(text.startswith(one.name) for text in texts) for one in figures)


def test_the_table_has_a_row_for_each_variant_and_lines_up() -> None:
    lines = variants_table(
        {"default": {"accuracy": 0.91234, "bytes": 3 << 20}, "int8": {"accuracy": 0.9, "bytes": 1 << 20}}
    )
    assert lines[0].split() == ["variant", "accuracy", "MiB"]
    assert lines[1].split() == ["default", "0.9123", "3.0"]
    assert len({len(line) for line in lines}) == 1


def test_people_read_shares_in_percent_and_nothing_that_is_empty() -> None:
    report = {"models": {"m": {"share": 500, "window": "", "previous": None}}, "pools": []}
    assert lines_of(report) == ["models:", "  m:", "    share: 5 %", "    previous: null"]
    assert lines_of({"share": 10_000}) == ["share: 100 %"]
    assert lines_of({"share": 25}) == ["share: 0.25 %"]
