"""Which version a box runs, by what the admins signed for its groups (PROTOCOL 6)."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_sync.deployment import (
    Deployment,
    Pool,
    PoolKey,
    Rollout,
    decisions_of,
    deployment_bytes,
    in_share,
    parse_deployment,
    pools_of,
    targets_for,
    version_for,
)
from cloud_sync.errors import TrustError

POOL = Pool("main", "spillway/handoff/main", [PoolKey("ab", "0" * 64)])


def deployment(group: str = "all", pools: list[Pool] | None = None, **models: Rollout) -> Deployment:
    return Deployment(
        schema=1, group=group, sequence=1, issued="2027-01-01T00:00:00Z", models=models, pools=pools or []
    )


def test_a_deployment_survives_its_bytes() -> None:
    one = deployment(digits=Rollout(version="2", previous="1", share=100, salt="s"), pools=[POOL])
    assert parse_deployment(deployment_bytes(one), "all") == one


def test_the_share_is_counted_as_the_protocol_writes_it() -> None:
    number = int(hashlib.sha256(b"salt:box-1").hexdigest()[:8], 16) % 10000
    assert not in_share("salt", "box-1", number)
    assert in_share("salt", "box-1", number + 1)


@given(st.text(max_size=10), st.integers(0, 10000), st.integers(0, 10000))
def test_no_box_falls_out_while_a_share_is_raised(salt: str, one: int, other: int) -> None:
    low, high = sorted((one, other))
    boxes = [f"box-{number}" for number in range(20)]
    assert {box for box in boxes if in_share(salt, box, low)} <= {box for box in boxes if in_share(salt, box, high)}


def test_a_decision_is_for_what_is_deployed_and_not_for_what_boxes_fall_back_to() -> None:
    first = deployment(digits=Rollout(version="2", previous="1", salt="salt"))
    other = deployment(digits=Rollout(version="9", salt="other"), sea=Rollout(version="1", salt="pepper"))
    assert decisions_of([first, other]) == {("digits", "2"): "salt", ("sea", "1"): "pepper"}


def test_a_share_takes_about_that_part_of_a_fleet() -> None:
    taken = sum(in_share("salt", f"box-{number}", 2500) for number in range(4000))
    assert 900 < taken < 1100
    assert not any(in_share("salt", f"box-{number}", 0) for number in range(100))
    assert all(in_share("salt", f"box-{number}", 10000) for number in range(100))


def test_outside_the_share_the_previous_version_runs() -> None:
    rollout = Rollout(version="2", previous="1", share=0)
    assert version_for(rollout, "box-1", "1") == "1"
    assert version_for(Rollout(version="2", share=0), "box-1", None) is None


@pytest.mark.parametrize(("current", "runs"), [("2", "2"), ("1", "1"), (None, "1"), ("0", "1")])
def test_a_halted_rollout_moves_no_box_to_it(current: str | None, runs: str) -> None:
    assert version_for(Rollout(version="2", previous="1", halt=True), "box-1", current) == runs


def test_the_first_group_that_names_a_model_decides() -> None:
    first = deployment("canary", digits=Rollout(version="3"))
    second = deployment("all", digits=Rollout(version="2"), language=Rollout(version="1"))
    assert targets_for([first, second], "box-1", {}) == {"digits": "3", "language": "1"}


def test_a_group_that_names_a_model_decides_also_that_a_box_runs_none() -> None:
    first = deployment("canary", digits=Rollout(version="3", share=0))
    second = deployment("all", digits=Rollout(version="2"))
    assert not targets_for([first, second], "box-1", {})


def test_the_first_group_that_names_a_pool_decides() -> None:
    other = Pool("main", "elsewhere", [])
    assert pools_of([deployment(pools=[POOL]), deployment(pools=[other])]) == [POOL]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"schema": 2}, "unknown_schema"),
        ({"group": "other"}, "wrong_software"),
        ({"models": {"../x": {"version": "1"}}}, "bad_metadata"),
        ({"models": {"digits": {"version": "../1"}}}, "bad_metadata"),
        ({"models": {"digits": {"version": "1", "previous": "a/b"}}}, "bad_metadata"),
        ({"models": {"digits": {"version": "1", "share": 10001}}}, "bad_metadata"),
        ({"models": {"digits": {}}}, "bad_metadata"),
        ({"pools": [{"name": "p", "topic": "a/#", "keys": []}]}, "bad_metadata"),
        ({"pools": [{"name": "p", "topic": "a", "keys": [{"kid": "k", "key": "00"}]}]}, "bad_metadata"),
        ({"pools": [{"name": "P", "topic": "a", "keys": []}]}, "bad_metadata"),
        ({"sequence": "1"}, "bad_metadata"),
    ],
)
def test_what_breaks_the_format_is_refused(changes: dict[str, Any], code: str) -> None:
    raw = json.dumps(json.loads(deployment_bytes(deployment())) | changes).encode()
    with pytest.raises(TrustError) as caught:
        parse_deployment(raw, "all")
    assert caught.value.code == code


@given(st.binary(max_size=200))
def test_garbage_is_one_kind_of_error(raw: bytes) -> None:
    with pytest.raises(TrustError):
        parse_deployment(raw, "all")
