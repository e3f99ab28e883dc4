from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.estimator import ServiceLaw


def test_before_the_first_sample_the_prior_is_the_prediction() -> None:
    assert ServiceLaw(prior_ms=20.0).predict_ms(500, 0) == 20.0
    assert ServiceLaw().observed == 0


def test_a_known_law_is_found_in_noisy_samples() -> None:
    rng = random.Random(7)
    law = ServiceLaw()
    for _ in range(500):
        tokens_in, tokens_out = rng.randrange(10, 500), rng.randrange(1, 200)
        law.observe(tokens_in, tokens_out, 12 + 0.05 * tokens_in + 2.0 * tokens_out + rng.gauss(0, 3))
    for tokens_in, tokens_out in ((10, 1), (500, 200), (200, 50)):
        truth = 12 + 0.05 * tokens_in + 2.0 * tokens_out
        assert law.predict_ms(tokens_in, tokens_out) == pytest.approx(truth, abs=4)
    assert 1 < law.error_ms < 8


def test_a_model_without_tokens_has_a_plain_mean() -> None:
    law = ServiceLaw()
    for took_ms in (9.0, 11.0) * 50:
        law.observe(0, 0, took_ms)
    assert law.predict_ms(0, 0) == pytest.approx(10, abs=0.5)


def test_a_law_that_changes_is_followed() -> None:
    law = ServiceLaw()
    for _ in range(200):
        law.observe(0, 0, 10.0)
    for _ in range(200):
        law.observe(0, 0, 30.0)  # the box got hot
    assert law.predict_ms(0, 0) == pytest.approx(30, abs=1)


def test_one_outlier_does_not_stay() -> None:
    law = ServiceLaw()
    for _ in range(100):
        law.observe(0, 0, 10.0)
    law.observe(0, 0, 10_000.0)
    for _ in range(200):
        law.observe(0, 0, 10.0)
    assert law.predict_ms(0, 0) == pytest.approx(10, abs=5)
    assert law.error_ms < 20


def test_the_longest_request_asked_over_and_over_leaves_it_able_to_learn() -> None:
    law = ServiceLaw()
    for _ in range(3000):
        law.observe(200_000, 200_000, 500_000.0)
    for _ in range(100):
        law.observe(10, 0, 25.0)
    assert law.predict_ms(10, 0) == pytest.approx(25, abs=1)
    assert law.predict_ms(200_000, 200_000) == pytest.approx(500_000, rel=0.01)


def test_a_hundred_thousand_identical_samples_leave_it_finite_and_able_to_learn() -> None:
    law = ServiceLaw()
    for _ in range(100_000):
        law.observe(100, 0, 25.0)
    assert law.predict_ms(100, 0) == pytest.approx(25, abs=0.1)
    assert math.isfinite(law.predict_ms(100_000, 100_000))
    for tokens_out in range(200):
        law.observe(100, tokens_out, 25.0 + 3.0 * tokens_out)
    assert law.predict_ms(100, 100) == pytest.approx(325, rel=0.05)


@pytest.mark.parametrize("nonsense", [math.nan, math.inf, -math.inf, -1.0])
def test_a_measurement_that_cannot_be_is_not_taken_in(nonsense: float) -> None:
    law = ServiceLaw()
    law.observe(0, 0, 10.0)
    before = law.predict_ms(0, 0), law.error_ms, law.observed
    law.observe(0, 0, nonsense)
    assert (law.predict_ms(0, 0), law.error_ms, law.observed) == before


samples = st.lists(
    st.tuples(st.integers(0, 200_000), st.integers(0, 200_000), st.floats(min_value=0, max_value=1e7)), max_size=60
)


@settings(max_examples=150)
@given(samples, st.integers(0, 200_000), st.integers(0, 200_000))
def test_whatever_was_measured_the_prediction_is_a_time(
    seen: list[tuple[int, int, float]], tokens_in: int, tokens_out: int
) -> None:
    law = ServiceLaw()
    for sample in seen:
        law.observe(*sample)
    assert 0 <= law.predict_ms(tokens_in, tokens_out) < math.inf
    assert 0 <= law.error_ms < math.inf
    assert law.observed == len(seen)
