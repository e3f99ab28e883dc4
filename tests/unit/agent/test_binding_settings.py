from __future__ import annotations

import re
from pathlib import Path

import pytest

from agent.binding_settings import Binding, Column, WindowSettings
from agent.config import parse_config
from cloud_sync.strict_toml import ConfigError

LEAST = """
[device]
name = "kitchen"
[local]
[repository]
url = "file:///srv/models"
"""
SEA = """
[[bindings]]
name = "sea"
topic = "sensors/+/temperature"
model = "sea-temperature"
take = "number"
publish = "forecast/{1}"
"""


def refusal(addition: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(LEAST + addition)
    return str(caught.value)


def test_the_least_binding_names_what_comes_in_who_answers_and_where_the_answer_goes() -> None:
    (binding,) = parse_config(LEAST + SEA).bindings
    assert binding.client == "binding.sea"
    assert binding.filters == ["sensors/+/temperature"]
    assert binding.window is None
    assert binding.on == "always"


def test_a_window_and_columns_can_be_said() -> None:
    (binding,) = parse_config(
        LEAST
        + SEA.replace('take = "number"', 'columns = [{take = "$.t", scale = 0.1}, {take = "number", topic = "h/+/x"}]')
        + "window = {seconds = 60, every = 10, points = 6}"
    ).bindings
    assert binding.window == WindowSettings(seconds=60, every=10, points=6)
    assert [cell.scale for cell in binding.cells] == [0.1, 1.0]
    assert binding.filters == ["sensors/+/temperature", "h/+/x"]


def test_a_recurrent_models_state_is_named_with_its_shape() -> None:
    (binding,) = parse_config(
        LEAST + SEA + 'tensor = {name = "x", shape = [1, -1]}\nstate = {h_in = {from = "h_out", shape = [1, 4]}}\n'
    ).bindings
    assert binding.state["h_in"].source == "h_out"


@pytest.mark.parametrize(
    ("addition", "told"),
    [
        (SEA.replace("sensors/+/temperature", "sensors/#/x"), "`bindings[0].topic` = 'sensors/#/x': `#` stands"),
        (SEA.replace("sensors/+/temperature", "spillway/kitchen/infer/+"), "the box's own topics"),
        (SEA.replace("sensors/+/temperature", "+/+/+/+"), "the box's own topics"),
        (SEA.replace("sensors/+/temperature", "#"), "the box's own topics"),
        (SEA.replace("forecast/{1}", "forecast/{2}"), "`bindings[0].publish` = 'forecast/{2}': {2} stands for nothing"),
        (SEA.replace("forecast/{1}", "spillway/kitchen/results/x"), "are the box's own"),
        (SEA.replace("forecast/{1}", "sensors/{1}/temperature"), "would come back to it"),
        (SEA.replace("forecast/{1}", "{topic}"), "would come back to it"),
        (SEA.replace('"number"', '"temperature"'), "`bindings[0].take` = 'temperature': right is number, text"),
        (SEA.replace('"number"', '"$.a b"'), "cannot be read from"),
        (SEA.replace('take = "number"', ""), "`bindings[0].take` = '': set `take`"),
        (SEA + 'columns = [{take = "number"}]', "one of them"),
        (SEA.replace('take = "number"', 'columns = [{take = "text"}]'), "go with numbers"),
        (
            SEA.replace('take = "number"', 'columns = [{take = "$.a", name = "a"}, {take = "$.b"}]'),
            "every column or none",
        ),
        (SEA.replace('take = "number"', 'columns = [{take = "$.a", topic = "a/b"}]'), "must have the wildcards of"),
        (SEA + "window = {}", "set `last` or `seconds`"),
        (SEA + "window = {last = 3, seconds = 3}", "one of them"),
        (SEA + "window = {last = 3, points = 3}", "goes with `seconds`"),
        (SEA + "window = {last = 3, every = 1.5}", "a whole number"),
        (SEA + "window = {last = 10000}\nmax_topics = 10000", "lower `last` or `max_topics`"),
        (SEA + "window = {lats = 3}", "unknown key `bindings[0].window.lats`"),
        (SEA + "window = 3", "`bindings[0].window` = 3: a table"),
        (SEA.replace('"number"', '"text"') + "window = {last = 3}", "go with numbers"),
        (SEA.replace('"number"', '"text"') + "words = {ON = 1}", "go with numbers"),
        (SEA.replace('take = "number"', 'columns = [{take = "$.a"}]') + "scale = 2", "of its own"),
        (SEA + 'state = {h = {from = "g", shape = [1]}}', "needs `tensor` too"),
        (SEA + 'tensor = {name = "x", shape = [-1, -1]}', "one may be -1"),
        (SEA + 'tensor = {name = "x", shape = [1], datatype = "BYTES"}', "`bindings[0].tensor.datatype` = 'BYTES'"),
        (
            SEA + 'tensor = {name = "x", shape = [1]}\nstate = {x = {from = "g", shape = [1]}}',
            "takes the values already",
        ),
        (SEA + 'on = "above"', "`bindings[0].threshold` = None"),
        (SEA + 'time = "$.t"', "is read from the message's JSON"),
        (SEA.replace('"number"', '"$.v"') + 'time = "t"', "`bindings[0].time` = 't'"),
        (SEA + "threshold = 3", "and they with it"),
        (SEA + "hysteresis = 3", "`bindings[0].hysteresis` = 3"),
        (SEA + 'cleared = "off"', "`bindings[0].cleared` = 'off'"),
        (SEA + 'answer = "best"', "label, score, outputs or a JSON path"),
        (SEA + 'on = "sometimes"', "`bindings[0].on` = 'sometimes'"),
        (SEA + "qos = 2", "`bindings[0].qos` = 2"),
        (SEA + "window = {last = 3}\nunknown = 1", "unknown key `bindings[0].unknown`"),
        (SEA.replace('"sea"', '"Sea"'), "`bindings[0].name` = 'Sea'"),
        (SEA.replace('"sea-temperature"', '"sea@1"'), "without its version"),
        (SEA + SEA, "another binding has this name"),
        ("bindings = 3\n", "`bindings` = 3"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_key_and_a_remedy(addition: str, told: str) -> None:
    raw = addition + LEAST if addition.startswith("bindings") else LEAST + addition
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    assert told in str(caught.value)


def test_a_loop_over_several_bindings_is_refused_and_a_chain_is_not() -> None:
    first = SEA
    second = (
        SEA.replace('"sea"', '"again"')
        .replace("sensors/+/temperature", "forecast/+")
        .replace("forecast/{1}", "end/{1}")
    )
    assert len(parse_config(LEAST + first + second).bindings) == 2
    assert "would come back" in refusal(first + second.replace("end/{1}", "sensors/{1}/temperature"))


def test_filters_of_which_a_broker_may_send_a_message_twice_are_refused() -> None:
    one = SEA.replace("sensors/+/temperature", "a/+").replace("{1}", "x")
    other = SEA.replace('"sea"', '"other"').replace("sensors/+/temperature", "+/b").replace("{1}", "x")
    assert "share some topics and not all" in refusal(one + other)
    wider = other.replace('"+/b"', '"a/#"')
    assert len(parse_config(LEAST + one + wider).bindings) == 2


def test_the_worked_example_of_the_page_is_a_right_configuration() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "bindings.md").read_text("utf-8")
    (example,) = re.findall(r"^```toml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert [binding.name for binding in parse_config(LEAST + example).bindings] == ["sea", "meter"]


def test_the_page_tells_every_key_of_a_binding() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "bindings.md").read_text("utf-8")
    told = set(re.findall(r"`(\w+)`", page)) | set(re.findall(r"`(\w+) = ", page))
    keys = set(Binding.__struct_fields__) | set(Column.__struct_fields__) | set(WindowSettings.__struct_fields__)
    assert not keys - told - {"name"}
