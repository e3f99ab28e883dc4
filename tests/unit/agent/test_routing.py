from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.routing import Cloud, Cost, Load, Where, route
from models.errors import HTTP_STATUS

UP = Cloud(pool="gpu", connected=True)
DOWN = Cloud(pool="gpu", connected=False)
NONE = Cloud()
NO_POOL = Cloud(pool="", connected=True)

SECOND = Cost(deadline_ms=1000)
PRIVATE = Cost(deadline_ms=1000, local_only=True)
LONG = Cost(deadline_ms=1000, tokens=600)
LONG_PRIVATE = Cost(deadline_ms=1000, tokens=600, local_only=True)

UNKNOWN = Load(known=False, serving=False)
IDLE = Load(known=True, serving=True, max_queue=10, context_tokens=512)
AWAY = Load(known=True, serving=False, max_queue=10)
RESTARTING = Load(known=True, serving=False, starting=True, queued=3, max_queue=10)
CROWDED_RESTART = Load(known=True, serving=False, starting=True, queued=10, max_queue=10)
FULL = Load(known=True, serving=True, queued=10, max_queue=10)
BUSY = Load(known=True, serving=True, max_queue=10, wait_ms=900, service_ms=80, error_ms=30)
SLOW = Load(known=True, serving=True, max_queue=10, wait_ms=0, service_ms=2000)
HOPELESS = Load(known=True, serving=True, max_queue=10, wait_ms=1001, service_ms=80)
JUST = Load(known=True, serving=True, max_queue=10, wait_ms=900, service_ms=80, error_ms=20)


@pytest.mark.parametrize(
    ("cost", "load", "cloud", "where", "reason", "code"),
    [
        (SECOND, IDLE, UP, "local", "fits", ""),
        (SECOND, JUST, UP, "local", "fits", ""),
        (PRIVATE, IDLE, NONE, "local", "fits", ""),
        (SECOND, UNKNOWN, UP, "cloud", "not_local", ""),
        (SECOND, UNKNOWN, DOWN, "cloud", "not_local", ""),
        (SECOND, UNKNOWN, NONE, "refuse", "not_local", "model_not_found"),
        (SECOND, UNKNOWN, NO_POOL, "refuse", "not_local", "model_not_found"),
        (PRIVATE, UNKNOWN, UP, "refuse", "not_local", "model_not_found"),
        (LONG, IDLE, UP, "cloud", "oversized", ""),
        (LONG, IDLE, NONE, "refuse", "oversized", "too_large"),
        (LONG_PRIVATE, IDLE, UP, "refuse", "oversized", "too_large"),
        (SECOND, AWAY, UP, "cloud", "unavailable", ""),
        (SECOND, AWAY, NONE, "refuse", "unavailable", "overloaded"),
        (PRIVATE, AWAY, UP, "refuse", "unavailable", "overloaded"),
        (SECOND, RESTARTING, NONE, "local", "fits", ""),
        (SECOND, RESTARTING, UP, "cloud", "unavailable", ""),
        (PRIVATE, RESTARTING, UP, "local", "fits", ""),
        (PRIVATE, CROWDED_RESTART, UP, "refuse", "unavailable", "overloaded"),
        (SECOND, FULL, UP, "cloud", "overflow", ""),
        (SECOND, FULL, NONE, "refuse", "overflow", "overloaded"),
        (PRIVATE, FULL, UP, "refuse", "overflow", "overloaded"),
        (SECOND, BUSY, UP, "cloud", "overflow", ""),
        (SECOND, BUSY, DOWN, "local", "fits", ""),
        (PRIVATE, BUSY, UP, "local", "fits", ""),
        (SECOND, SLOW, UP, "cloud", "overflow", ""),
        (SECOND, SLOW, NONE, "local", "fits", ""),
        (SECOND, HOPELESS, DOWN, "cloud", "overflow", ""),
        (SECOND, HOPELESS, NONE, "refuse", "overflow", "overloaded"),
        (PRIVATE, HOPELESS, DOWN, "refuse", "overflow", "overloaded"),
    ],
)
def test_the_cheapest_place_that_can_be_in_time_is_taken_and_the_reason_said(
    cost: Cost, load: Load, cloud: Cloud, where: str, reason: str, code: str
) -> None:
    decision = route(cost, load, cloud)
    assert (decision.where, decision.reason, decision.code) == (where, reason, code)


def test_a_refusal_for_size_says_both_sizes() -> None:
    assert "600" in route(LONG, IDLE, NONE).message
    assert "512" in route(LONG, IDLE, NONE).message


def test_a_model_that_counts_no_tokens_takes_any_number_of_them() -> None:
    uncounted = Load(known=True, serving=True, max_queue=1)
    assert route(Cost(deadline_ms=1, tokens=10**9), uncounted, UP).where is Where.LOCAL


counts = st.integers(min_value=0, max_value=10**9)
times = st.floats()
costs = st.builds(Cost, tokens=counts, deadline_ms=st.floats(), local_only=st.booleans())
loads = st.builds(
    Load,
    known=st.booleans(),
    serving=st.booleans(),
    starting=st.booleans(),
    context_tokens=counts,
    queued=counts,
    max_queue=counts,
    wait_ms=times,
    service_ms=times,
    error_ms=times,
)
clouds = st.builds(Cloud, pool=st.sampled_from(["", "gpu"]), connected=st.booleans())


@given(costs, loads, clouds)
def test_every_case_has_one_answer_that_the_protocol_knows(cost: Cost, load: Load, cloud: Cloud) -> None:
    decision = route(cost, load, cloud)
    assert decision.reason in {"fits", "oversized", "overflow", "unavailable", "not_local"}
    assert (decision.where is Where.REFUSE) == (decision.code in HTTP_STATUS)
    assert bool(decision.code) == bool(decision.message)


@given(costs, loads, clouds)
def test_d8_what_is_local_only_never_goes_to_the_cloud(cost: Cost, load: Load, cloud: Cloud) -> None:
    private = Cost(tokens=cost.tokens, deadline_ms=cost.deadline_ms, local_only=True)
    assert route(private, load, cloud).where is not Where.CLOUD


@given(costs, loads, st.booleans())
def test_without_a_pool_nothing_goes_to_the_cloud(cost: Cost, load: Load, connected: bool) -> None:
    assert route(cost, load, Cloud(connected=connected)).where is not Where.CLOUD


@given(costs, loads)
def test_a_model_that_is_not_here_is_never_asked_here(cost: Cost, load: Load) -> None:
    gone = Load(known=False, serving=load.serving, queued=load.queued, max_queue=load.max_queue)
    for cloud in (UP, DOWN, NONE):
        assert route(cost, gone, cloud).where is not Where.LOCAL


def test_a_prediction_that_is_no_number_keeps_the_request_here() -> None:
    broken = Load(known=True, serving=True, max_queue=1, wait_ms=math.nan, service_ms=math.nan)
    assert route(SECOND, broken, UP).where is Where.LOCAL
