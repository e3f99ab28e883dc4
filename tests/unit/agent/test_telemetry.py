from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from agent.telemetry import Telemetry
from models.request import Response, Status

SAMPLE = re.compile(r'[a-z_]+(\{([a-z]+="(\\["\\n]|[^"\\\n])*",?)*\})? [0-9.e+-]+(inf)?')


def answer(total_ms: float = 7.0, **facts: str) -> Response:
    said = {"route": "local", "reason": "fits", "model": "digits@3"} | facts
    return Response(status=Status.ERROR if facts.get("code") else Status.OK, body=b"", total_ms=total_ms, **said)  # type: ignore[arg-type]


def value(text: str, name: str) -> float:
    return next(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name + " "))


def test_answers_are_counted_by_model_route_reason_and_code() -> None:
    telemetry = Telemetry()
    for _ in range(3):
        telemetry.answered(answer(), "digits")
    telemetry.answered(answer(code="deadline_exceeded"), "digits")
    text = telemetry.render()
    assert value(text, 'spillway_answers_total{model="digits",route="local",reason="fits",code=""}') == 3
    assert (
        value(text, 'spillway_answers_total{model="digits",route="local",reason="fits",code="deadline_exceeded"}') == 1
    )


def test_the_histogram_is_cumulative_and_in_seconds() -> None:
    telemetry = Telemetry()
    for total_ms in (3.0, 7.0, 60_000.0):
        telemetry.answered(answer(total_ms), "digits")
    text = telemetry.render()
    buckets = 'spillway_answer_seconds_bucket{route="local",le='
    assert value(text, buckets + '"0.005"}') == 1
    assert value(text, buckets + '"0.01"}') == 2
    assert value(text, buckets + '"30.0"}') == 2
    assert value(text, buckets + '"+Inf"}') == 3
    assert value(text, 'spillway_answer_seconds_count{route="local"}') == 3
    assert value(text, 'spillway_answer_seconds_sum{route="local"}') == 60.01


def test_names_of_models_that_this_box_does_not_know_do_not_become_labels() -> None:
    telemetry = Telemetry()
    for number in range(1000):
        telemetry.answered(answer(model=f"guess-{number}", route="", code="bad_request"), "")
    assert len(telemetry.answers) == 1
    assert "guess" not in telemetry.render()


def test_gauges_are_shown_by_their_names() -> None:
    telemetry = Telemetry()
    telemetry.gauges["spillway_outbox_rows"] = 4
    assert value(telemetry.render(), "spillway_outbox_rows") == 4


words = st.text(max_size=20)


@given(words, words, words)
def test_every_line_is_a_comment_or_a_sample_whatever_a_label_holds(model: str, route: str, reason: str) -> None:
    telemetry = Telemetry()
    telemetry.answered(answer(route=route, reason=reason), model)
    text = telemetry.render()
    assert text.endswith("\n")
    for line in text[:-1].split("\n"):
        assert line.startswith("# TYPE ") or SAMPLE.fullmatch(line), line
