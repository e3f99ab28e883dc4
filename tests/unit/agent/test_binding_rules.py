from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import binding_rules as rules

WORDS = ["a", "b", "", "$x"]
TOPICS = ["/".join(parts) for length in (1, 2, 3, 4) for parts in itertools.product(WORDS, repeat=length)]
parts_of_filter = st.lists(st.sampled_from(["a", "b", "", "+", "$x"]), min_size=1, max_size=3)
filters = st.builds(lambda parts, rest: "/".join([*parts, *rest]), parts_of_filter, st.sampled_from([[], ["#"]]))


def falls_under(pattern: str, topic: str) -> bool:
    """MQTT 5 section 4.7, one part after the other."""

    def fits(wanted: list[str], parts: list[str]) -> bool:
        if wanted == ["#"]:
            return True
        if not wanted or not parts:
            return wanted == parts
        return wanted[0] in {"+", parts[0]} and fits(wanted[1:], parts[1:])

    if topic.startswith("$") and pattern[0:1] in {"+", "#"}:
        return False
    return fits(pattern.split("/"), topic.split("/"))


@given(filters)
def test_a_filter_takes_the_topics_that_mqtt_gives_it(pattern: str) -> None:
    rules.check_filter(pattern) if pattern else None
    for topic in TOPICS:
        assert (rules.match(pattern, topic) is not None) == falls_under(pattern, topic), topic


@given(filters, st.sampled_from(TOPICS))
def test_the_wildcards_parts_put_back_give_the_topic(pattern: str, topic: str) -> None:
    parts = rules.match(pattern, topic)
    if parts is None:
        return
    rest = list(parts)
    again = [rest.pop(0) if part in {"+", "#"} else part for part in pattern.split("/")]
    assert "/".join(again).rstrip("/") == topic.rstrip("/")
    assert rest == []


@given(filters, filters)
def test_filters_overlap_where_a_topic_falls_under_both(one: str, other: str) -> None:
    shared = [topic for topic in TOPICS if falls_under(one, topic) and falls_under(other, topic)]
    if shared:
        assert rules.overlaps(one, other)
    elif not ("$" in one + other and {one[:1], other[:1]} & {"+", "#"}):
        assert not rules.overlaps(one, other)


@given(filters, filters)
def test_a_filter_covers_another_where_all_its_topics_are_its_own(wide: str, narrow: str) -> None:
    if rules.covers(wide, narrow):
        assert all(falls_under(wide, topic) for topic in TOPICS if falls_under(narrow, topic))


def test_the_filters_to_subscribe_to_send_no_message_twice() -> None:
    assert rules.cover(["a/b", "a/+", "a/+", "c"]) == ["a/+", "c"]
    assert rules.cover(["#", "a/#", "$SYS/x"]) == ["#", "$SYS/x"]


@pytest.mark.parametrize("text", ["", "a/#/b", "a+/b", "a/b#", "$share/g/a", "a\nb", "x" * 600])
def test_what_is_no_filter_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        rules.check_filter(text)


def test_a_template_becomes_a_topic_for_each_message() -> None:
    rules.check_template("home/{1}/{model}/{2}", ["a/+/b/#"])
    assert rules.fill("home/{1}/{model}/{2}", "a/x/b/c/d", ("x", "c/d"), "digits") == "home/x/digits/c/d"
    assert rules.fill("{topic}/forecast", "a/x", (), "digits") == "a/x/forecast"


@pytest.mark.parametrize("template", ["", "a/{1}", "a/{name}", "a/+", "a/#", "$SYS/x", "a/{topic", "a\n", "x{topic}"])
def test_a_template_that_can_be_no_topic_is_refused(template: str) -> None:
    with pytest.raises(ValueError):
        rules.check_template(template, ["a/b"])


@given(
    st.sampled_from(["+/+", "a/+", "+/a/#", "#"]),
    st.sampled_from(["x/{1}", "{topic}", "x/{topic}/y", "{1}/z", "q/{1}z"]),
)
def test_every_topic_that_a_template_becomes_falls_under_its_outcomes(pattern: str, template: str) -> None:
    try:
        rules.check_template(template, [pattern])
    except ValueError:
        return
    outcomes = rules.outcomes(template, pattern, "m")
    for topic in TOPICS:
        parts = rules.match(pattern, topic)
        if parts is not None:
            assert rules.overlaps(outcomes, rules.fill(template, topic, parts, "m"))


def test_a_path_leads_to_keys_indices_and_every_element() -> None:
    value = {"a": [{"b": 1}, {"b": 2}], "odd key": {"x": [7, 8]}, "ß": 3}
    for text, expected in [
        ("$", value),
        ("$.a[0].b", 1),
        ("$.a[-1]['b']", 2),
        ("$.a[*].b", [1, 2]),
        ('$["odd key"].x[1]', 8),
        ("$.ß", 3),
    ]:
        path = rules.parse_path(text)
        assert rules.read_path(path, value) == expected
        assert rules.read_path(rules.parse_path(rules.show_path(path)), value) == expected


@pytest.mark.parametrize(
    "text", ["", "a", "$a", "$.", "$.a b", "$[x]", "$[01]", "$..a", "$.a[", "$['']", "$[1:2]", "$" + ".a" * 40]
)
def test_what_is_no_path_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        rules.parse_path(text)


@pytest.mark.parametrize(
    ("text", "told"),
    [("$.a.b", "$.a.b is not there"), ("$.l[3]", "$.l[3]"), ("$.a[*]", "$.a is no list"), ("$.l[*].x", "$.x")],
)
def test_what_a_path_does_not_find_is_named_and_nothing_is_left_out_in_silence(text: str, told: str) -> None:
    with pytest.raises(LookupError, match=told.replace("$", r"\$").replace("[", r"\[").replace("]", r"\]")):
        rules.read_path(rules.parse_path(text), {"a": 1, "l": [{"x": 1}, {"y": 1}]})


@pytest.mark.parametrize(
    ("value", "number"),
    [(1, 1.0), (2.5, 2.5), (True, 1.0), (False, 0.0), ("21.5", 21.5), (" -3e2\n", -300.0), ("ON", 1.0), (".5", 0.5)],
)
def test_sensors_write_numbers_in_several_ways(value: object, number: float) -> None:
    assert rules.to_number(value, {"ON": 1.0}) == number


@pytest.mark.parametrize(
    "value", [None, "", "unavailable", "nan", "inf", "1_0", "1e999", "0x10", [], {}, 10**400, "1" * 100, "\u0661"]
)
def test_what_is_no_finite_number_is_refused(value: object) -> None:
    with pytest.raises(ValueError):
        rules.to_number(value, {})


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (1_700_000_000, 1_700_000_000.0),
        (1_700_000_000_500, 1_700_000_000.5),
        ("1700000000.25", 1_700_000_000.25),
        ("2023-11-14T22:13:20Z", 1_700_000_000.0),
        ("2023-11-14T23:13:20+01:00", 1_700_000_000.0),
        ("2023-11-14 22:13:20", 1_700_000_000.0),
    ],
)
def test_sensors_write_times_in_several_ways(value: object, seconds: float) -> None:
    assert rules.to_time(value) == seconds


@pytest.mark.parametrize("value", [None, "", "today", True, -1, [], float("nan")])
def test_what_is_no_time_is_refused(value: object) -> None:
    with pytest.raises(ValueError):
        rules.to_time(value)


@pytest.mark.parametrize(
    ("answer", "published", "measure"),
    [
        ({"outputs": [{"label": "3", "score": 0.9}, {"label": "5", "score": 0.1}]}, "3", 0.9),
        ({"outputs": {"label": "wet", "score": 0.7}}, "wet", 0.7),
        ({"outputs": [21.5]}, 21.5, 21.5),
        ({"outputs": 21.5}, 21.5, 21.5),
        ({"outputs": [1.0, 2.0]}, [1.0, 2.0], [1.0, 2.0]),
        ({"outputs": {"generated_text": "hm"}}, "hm", "hm"),
        ({"outputs": {"text": "spoken"}}, "spoken", "spoken"),
        ({"choices": [{"message": {"role": "assistant", "content": "yes"}}]}, "yes", "yes"),
        ({"outputs": [{"name": "y", "shape": [1], "datatype": "FP32", "data": [4.0]}]}, 4.0, 4.0),
        ({"outputs": [{"name": "y", "shape": [2], "datatype": "FP32", "data": [4.0, 5.0]}]}, [4.0, 5.0], [4.0, 5.0]),
    ],
)
def test_an_answer_has_a_part_that_its_reader_most_likely_wants(
    answer: object, published: object, measure: object
) -> None:
    assert rules.default_answer(answer) == published
    assert rules.default_measure(answer, published) == measure


def test_a_payload_is_plain_text_or_json() -> None:
    assert rules.to_payload("wet") == b"wet"
    assert rules.to_payload(21.5) == b"21.5"
    assert rules.to_payload([{"a": 1}]) == b'[{"a":1}]'
