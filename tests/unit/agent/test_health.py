from __future__ import annotations

from agent.health import Health


def test_a_box_is_ready_once_it_is_online_whatever_its_links_and_models_do() -> None:
    health = Health()
    assert not health.summary()["ready"]
    health.state = "online"
    health.models["assistant"] = "starting"
    assert health.summary()["ready"]
    assert not health.summary()["local"]


def test_a_draining_box_is_not_ready() -> None:
    health = Health()
    health.state = "draining"
    assert not health.summary()["ready"]


def test_the_summary_keeps_what_it_showed() -> None:
    health = Health()
    shown = health.summary()
    health.models["digits"] = "serving"
    assert shown["models"] == {}


def test_the_status_line_says_how_many_models_serve_and_which_links_are_up() -> None:
    health = Health()
    health.state, health.local_up = "online", True
    health.models |= {"digits": "serving", "assistant": "failed"}
    assert health.status_line() == "online: 1 of 2 models serving, local link up, cloud link down"
