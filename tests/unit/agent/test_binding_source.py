from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.binding_settings import MAX_VALUES, Binding, WindowSettings
from agent.binding_source import Answering, DropError, Reader, Row, Source, advance, compose, slide, steps
from agent.binding_store import load_sources, save_sources
from models.body import parse_body
from models.request import Dialect

TOPIC = "s/a"


def binding(**facts: Any) -> Binding:
    return msgspec.convert({"name": "b", "topic": "s/+", "model": "m", "publish": "p/{1}", **facts}, Binding)


class Sensor:
    """One sensor of a binding, and a clock."""

    def __init__(self, **facts: Any) -> None:
        self.binding = binding(**facts)
        self.reader = Reader(self.binding)
        self.answering = Answering(self.binding)
        self.source = Source(parts=("a",))
        self.now = 1000.0

    def hear(self, payload: object, topic: str = TOPIC, after: float = 1.0) -> Any:
        """What a message becomes: inputs, None, or the word for why not."""
        self.now += after
        raw = payload if isinstance(payload, bytes) else msgspec.json.encode(payload)
        try:
            return advance(self.binding, self.source, self.reader.read(topic, raw), self.now)
        except DropError as drop:
            return drop.reason

    def body(self, inputs: Any) -> Any:
        return msgspec.json.decode(compose(self.binding, self.source, inputs).body)

    def answer(self, answer: object, answerer: str = "m@1") -> bytes | None:
        return self.answering.take(self.source, msgspec.json.encode(answer), answerer)


def test_a_number_is_scaled_and_is_the_one_input() -> None:
    sensor = Sensor(take="number", scale=0.5, offset=-1)
    inputs = sensor.hear(b" 22 ")
    assert inputs == [10.0]
    assert sensor.body(inputs) == {"inputs": [10.0]}


def test_a_path_takes_a_number_a_list_or_a_text_out_of_json() -> None:
    assert Sensor(take="$.t").hear({"t": "21.5"}) == "21.5"
    assert Sensor(take="$.t", window={"last": 1}).hear({"t": "21.5"}) == [21.5]
    plain = Sensor(take="$.t")
    assert plain.body(plain.hear({"t": 21.5})) == {"inputs": [21.5]}
    assert Sensor(take="$.t", scale=2).hear({"t": "21.5"}) == [43.0]
    assert Sensor(take="$.t", words={"ON": 1}).hear({"t": "ON"}) == [1.0]
    assert Sensor(take="$.l[*].v").hear({"l": [{"v": 1}, {"v": 2}]}) == [1, 2]
    text = Sensor(take="$.say")
    assert text.body(text.hear({"say": "hello"})) == {"inputs": "hello"}


def test_text_and_pictures_are_the_request_as_they_are_unless_parameters_go_with_them() -> None:
    png = b"\x89PNG\r\n\x1a\nrest"
    image = Sensor(take="image")
    body = compose(image.binding, image.source, image.hear(png))
    assert (body.content_type, body.body) == ("image/png", png)
    assert image.hear(b"RIFF0000WAVE") == "unreadable"
    assert Sensor(take="sound").hear(b"RIFF0000WAVEx") == b"RIFF0000WAVEx"
    more = Sensor(take="image", parameters={"top_k": 1})
    assert more.body(more.hear(png))["parameters"] == {"top_k": 1}
    text = Sensor(take="text")
    assert compose(text.binding, text.source, text.hear(b"{not json}")).content_type == "text/plain"
    assert text.hear(b"\xff") == "unreadable"
    assert text.hear(b" ") == "missing"


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"{", "unreadable"),
        (b"\xff", "unreadable"),
        (b"{}", "missing"),
        (b'{"t": null}', "not_a_number"),
        (b'{"t": "unavailable"}', "not_a_number"),
        (b'{"t": 1e999}', "unreadable"),
        (b'{"t": "1e300"}', "not_a_number"),
        (b'{"t": NaN}', "unreadable"),
        (b"[" * 10_000, "unreadable"),
        (b"", "unreadable"),
    ],
)
def test_what_is_no_measurement_is_dropped_by_a_word_and_changes_nothing(payload: bytes, reason: str) -> None:
    sensor = Sensor(take="$.t", window={"last": 2}, scale=1e10)
    assert sensor.hear({"t": 1}) is None
    assert sensor.hear(payload) == reason
    assert sensor.hear({"t": 2}) == [1e10, 2e10]


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["t", "h", "x"]), inner, max_size=3),
    max_leaves=12,
)
TAKES: list[dict[str, Any]] = [
    {"take": "number"},
    {"take": "text"},
    {"take": "image"},
    {"take": "$.t"},
    {"take": "$.t[*].x", "window": {"last": 2}},
    {"take": "$", "window": {"seconds": 2, "points": 2}},
    {"columns": [{"take": "$.t"}, {"take": "$.h[0]"}], "missing": "last"},
    {"take": "$.t", "tensor": {"name": "x", "shape": [1, -1], "datatype": "INT8"}},
    {"take": "$.t", "parameters": {"top_k": 1}},
]


@given(st.sampled_from(TAKES), st.lists(st.binary(max_size=20) | JSONS.map(json.dumps).map(str.encode), max_size=4))
def test_whatever_a_sensor_sends_becomes_a_request_or_is_dropped_by_a_word(
    facts: dict[str, Any], payloads: list[bytes]
) -> None:
    sensor = Sensor(**facts)
    for payload in payloads:
        inputs = sensor.hear(payload)
        if inputs is not None and not isinstance(inputs, str):
            with contextlib.suppress(DropError):
                body = compose(sensor.binding, sensor.source, inputs).body
                assert parse_body(None, body).body


@given(st.sampled_from(["", "label", "score", "outputs", "$.outputs[0]"]), JSONS)
def test_whatever_a_model_answers_is_published_or_dropped_by_a_word(answer: str, value: object) -> None:
    for on in ("always", "change"):
        with contextlib.suppress(DropError):
            told = Sensor(take="text", answer=answer, on=on).answer({"outputs": value})
            assert told is None or isinstance(told, bytes)


def test_columns_make_a_row_by_position_or_by_name() -> None:
    payload = {"t": 20, "h": "ON"}
    plain = Sensor(columns=[{"take": "$.t", "scale": 2}, {"take": "$.h"}], words={"ON": 1})
    assert plain.hear(payload) == [40.0, 1.0]
    named = Sensor(columns=[{"take": "$.t", "name": "temp"}, {"take": "$.h", "name": "heat"}], words={"ON": 1})
    assert named.hear(payload) == {"temp": 20.0, "heat": 1.0}
    assert named.hear({"t": 20}) == "missing"


def test_a_missing_column_keeps_its_last_value_where_that_is_asked_for_until_it_is_stale() -> None:
    sensor = Sensor(columns=[{"take": "$.t"}, {"take": "$.h"}], missing="last", max_age_s=10)
    assert sensor.hear({"t": 1}) == "missing"
    assert sensor.hear({"h": 5}) == [1.0, 5.0]
    assert sensor.hear({"t": 2}, after=9) == [2.0, 5.0]
    assert sensor.hear({"t": 3}, after=9) == "stale"


def test_columns_of_several_topics_are_joined_by_the_wildcards_part() -> None:
    sensor = Sensor(columns=[{"take": "number"}, {"take": "$.h", "topic": "h/+"}])
    assert sensor.hear(b"1", "s/a") == "missing"
    assert sensor.hear({"h": 2}, "h/a") == [1.0, 2.0]
    assert sensor.hear(b"3", "s/a") == [3.0, 2.0]


def test_a_window_asks_once_it_is_full_and_then_as_often_as_it_is_told() -> None:
    sensor = Sensor(take="number", window={"last": 3, "every": 2})
    heard = [sensor.hear(number) for number in range(8)]
    assert heard == [None, None, [0, 1, 2], None, [2, 3, 4], None, [4, 5, 6], None]


def test_a_window_of_rows_is_a_list_of_rows() -> None:
    sensor = Sensor(columns=[{"take": "$.t"}, {"take": "$.h"}], window={"last": 2})
    sensor.hear({"t": 1, "h": 2})
    assert sensor.hear({"t": 3, "h": 4}) == [[1.0, 2.0], [3.0, 4.0]]


def test_a_message_with_several_numbers_fills_as_many_steps() -> None:
    sensor = Sensor(take="$.samples", window={"last": 3, "every": 3})
    assert sensor.hear({"samples": [1, 2]}) is None
    assert sensor.hear({"samples": [3, 4]}) == [2.0, 3.0, 4.0]
    assert sensor.hear({"samples": []}) == "missing"


def test_a_window_of_seconds_waits_until_it_has_seen_them() -> None:
    sensor = Sensor(take="number", window={"seconds": 3, "every": 2})
    heard = [sensor.hear(number) for number in range(8)]
    assert heard == [None, None, None, [1, 2, 3], None, [3, 4, 5], None, [5, 6, 7]]


def test_a_gap_over_max_age_empties_the_window_so_that_no_series_goes_over_it() -> None:
    sensor = Sensor(take="number", window={"last": 2}, max_age_s=10)
    sensor.hear(1)
    assert sensor.hear(2) == [1.0, 2.0]
    assert sensor.hear(3, after=11) is None
    assert sensor.hear(4) == [3.0, 4.0]


def test_even_steps_are_means_and_an_empty_step_repeats_the_one_before() -> None:
    rows = [Row(at, [value]) for at, value in [(-5, 9.0), (1, 1.0), (2, 3.0), (7, 5.0)]]
    assert steps(rows, 0.0, 2.0, 4) == [[2.0], [2.0], [2.0], [5.0]]
    assert steps(rows[:1], 0.0, 2.0, 2) == [[9.0], [9.0]]
    assert steps(rows[3:], 0.0, 2.0, 4) is None


@given(
    st.lists(st.tuples(st.floats(0, 20), st.floats(-1e6, 1e6)), min_size=1, max_size=60),
    st.floats(0.5, 30),
    st.integers(1, 12),
)
def test_whenever_messages_come_a_window_holds_its_seconds_and_no_more(
    messages: list[tuple[float, float]], seconds: float, points: int
) -> None:
    sensor = Sensor(take="number", window={"seconds": seconds})
    even = Sensor(take="number", window={"seconds": seconds, "points": points})
    heard: list[tuple[float, float]] = []
    for after, value in messages:
        found = sensor.hear(value, after=after)
        heard.append((sensor.now, value))
        if found is not None:
            assert found == [one for at, one in heard if at > sensor.now - seconds]
        again = even.hear(value, after=after)
        assert again is None or (len(again) == points and min(v for _, v in heard) - 1 <= min(again))
    assert len(sensor.source.series) <= len(heard)


def test_a_window_over_its_bound_says_so_and_begins_to_fill_anew() -> None:
    source = Source(parts=())
    window = WindowSettings(seconds=1e6)
    for number in range(MAX_VALUES):
        slide(window, source, [Row(number, [1.0])], number, flat=True)
    with pytest.raises(DropError) as caught:
        slide(window, source, [Row(MAX_VALUES, [1.0])] * 2, MAX_VALUES, flat=True)
    assert caught.value.reason == "window_full"
    assert len(source.series) == MAX_VALUES


TENSOR = {"name": "x", "shape": [1, -1]}
STATE = {"h_in": {"from": "h_out", "shape": [1, 2]}}


def oip(y: float, *state: float) -> dict[str, Any]:
    def tensor(name: str, data: list[float]) -> dict[str, Any]:
        return {"name": name, "datatype": "FP32", "shape": [1, len(data)], "data": data}

    return {"model_name": "m", "outputs": [tensor("h_out", list(state)), tensor("y", [y])]}


def test_a_state_goes_from_each_answer_into_the_next_request() -> None:
    sensor = Sensor(take="number", tensor=TENSOR, state=STATE)
    body = compose(sensor.binding, sensor.source, sensor.hear(5))
    assert body.dialect is Dialect.OPEN_INFERENCE
    first = msgspec.json.decode(body.body)["inputs"]
    assert first[0] == {"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [5.0]}
    assert first[1] == {"name": "h_in", "shape": [1, 2], "datatype": "FP32", "data": [0.0, 0.0]}
    assert sensor.answer(oip(7.0, 0.25, 0.5)) == b"7.0"
    again = sensor.body(sensor.hear(6))["inputs"]
    assert again[1] == {"name": "h_in", "shape": [1, 2], "datatype": "FP32", "data": [0.25, 0.5]}


def test_a_state_is_not_taken_over_by_another_version_nor_over_a_gap() -> None:
    sensor = Sensor(take="number", tensor=TENSOR, state=STATE, max_age_s=10)
    sensor.hear(1)
    sensor.answer(oip(1.0, 3.0, 4.0))
    sensor.answer(oip(1.0, 5.0, 6.0), "m@2")
    assert sensor.source.memory == {}
    sensor.answer(oip(1.0, 5.0, 6.0), "m@2")
    assert sensor.source.memory != {}
    assert sensor.body(sensor.hear(1, after=11))["inputs"][1]["data"] == [0.0, 0.0]


def test_a_model_that_gives_no_state_is_said_to() -> None:
    sensor = Sensor(take="number", tensor=TENSOR, state=STATE)
    with pytest.raises(DropError, match="no tensor h_out"):
        sensor.answer({"outputs": []})


@pytest.mark.parametrize(
    ("tensor", "inputs", "reason"),
    [
        ({"name": "x", "shape": [1, 3]}, [1.0], "wrong_shape"),
        ({"name": "x", "shape": [2, -1]}, [1.0, 2.0, 3.0], "wrong_shape"),
        ({"name": "x", "shape": [1], "datatype": "INT64"}, [1.5], "not_a_number"),
    ],
)
def test_values_that_do_not_fill_a_tensor_are_dropped(tensor: dict[str, Any], inputs: list[float], reason: str) -> None:
    sensor = Sensor(take="number", tensor=tensor)
    with pytest.raises(DropError) as caught:
        compose(sensor.binding, sensor.source, inputs)
    assert caught.value.reason == reason


def test_whole_numbers_and_rows_become_tensors() -> None:
    sensor = Sensor(take="number", tensor={"name": "x", "shape": [-1, 2], "datatype": "INT8"})
    assert sensor.body([[1.0, 2.0], [3.0, 4.0]])["inputs"][0]["data"] == [1, 2, 3, 4]
    assert sensor.body({"a": 1.0, "b": 2.0})["inputs"][0]["shape"] == [1, 2]


def score(label: str, value: float) -> dict[str, Any]:
    return {"outputs": [{"label": label, "score": value}, {"label": "other", "score": 0.01}]}


def test_on_change_publishes_the_first_answer_and_those_that_differ() -> None:
    sensor = Sensor(take="text", on="change")
    assert [sensor.answer(score(label, 0.9)) for label in ("a", "a", "b", "b", "a")] == [b"a", None, b"b", None, b"a"]
    numbers = Sensor(take="number", on="change", hysteresis=0.5)
    assert [numbers.answer({"outputs": value}) for value in (20.0, 20.4, 20.6, 20.2, 20.0)] == [
        b"20.0",
        None,
        b"20.6",
        None,
        b"20.0",
    ]


def test_above_tells_a_crossing_once_until_it_is_over_by_the_hysteresis() -> None:
    sensor = Sensor(take="number", on="above", threshold=30.0, hysteresis=2.0, cleared="cool")
    told = [sensor.answer({"outputs": value}) for value in (29.0, 30.0, 30.5, 31.0, 29.0, 28.0, 27.0, 33.0)]
    assert told == [None, None, b"30.5", None, None, b"cool", None, b"33.0"]


def test_below_is_above_turned_round_and_measures_a_score_or_a_path() -> None:
    low = Sensor(take="number", on="below", threshold=5.0)
    assert [low.answer({"outputs": value}) for value in (6.0, 4.0, 3.0, 5.0, 4.0)] == [None, b"4.0", None, None, b"4.0"]
    sure = Sensor(take="image", on="above", threshold=0.8)
    assert [sure.answer(score("cat", value)) for value in (0.5, 0.9)] == [None, b"cat"]
    path = Sensor(take="image", on="above", threshold=0.5, measure="$.outputs[1].score")
    assert path.answer(score("cat", 0.9)) is None
    with pytest.raises(DropError, match="is no number"):
        Sensor(take="text", on="above", threshold=0.5).answer({"outputs": {"generated_text": "x"}})


@pytest.mark.parametrize(
    ("answer", "payload"),
    [
        ("", b"cat"),
        ("label", b"cat"),
        ("score", b"0.9"),
        ("$.outputs[0]", b'{"label":"cat","score":0.9}'),
        ("$.outputs[*].label", b'["cat","other"]'),
    ],
)
def test_the_owner_says_which_part_of_the_answer_is_published(answer: str, payload: bytes) -> None:
    assert Sensor(take="image", answer=answer).answer(score("cat", 0.9)) == payload


@pytest.mark.parametrize("answer", ["label", "score", "$.outputs.x", "outputs"])
def test_an_answer_without_the_asked_part_is_said_to_be_so(answer: str) -> None:
    with pytest.raises(DropError, match="in the answer"):
        Sensor(take="image", answer=answer).answer({"other": 21.5})


def test_windows_and_states_outlast_a_restart_with_the_time_away_in_them(tmp_path: Path) -> None:
    file = tmp_path / "bindings.state"
    sensor = Sensor(take="number", window={"last": 3}, max_age_s=100)
    sensor.hear(1)
    sensor.hear(2)
    save_sources(file, [sensor.binding], {"b": [sensor.source]}, sensor.now, wall_s=5000.0)
    kept = load_sources(file, [sensor.binding], 7.0, wall_s=5030.0)
    assert kept.filters == ["s/+"]
    (sensor.source,) = kept.sources["b"]
    sensor.now = 7.0
    assert sensor.hear(3) == [1.0, 2.0, 3.0]
    (late,) = load_sources(file, [sensor.binding], 7.0, wall_s=5200.0).sources["b"]
    sensor.source, sensor.now = late, 7.0
    assert sensor.hear(3) is None


def test_what_was_kept_is_forgotten_where_its_binding_changed_or_its_age_is_unknown(tmp_path: Path) -> None:
    file = tmp_path / "bindings.state"
    sensor = Sensor(take="number", window={"last": 3}, max_age_s=100)
    sensor.hear(1)
    save_sources(file, [sensor.binding], {"b": [sensor.source]}, sensor.now, wall_s=5000.0)
    assert load_sources(file, [binding(take="number", window={"last": 4})], 7.0, wall_s=5000.0).sources == {}
    assert load_sources(file, [sensor.binding], 7.0, wall_s=4000.0).sources == {}
    file.write_bytes(file.read_bytes()[:-3])
    assert load_sources(file, [sensor.binding], 7.0).sources == {}
    assert load_sources(tmp_path / "none", [sensor.binding], 7.0).sources == {}
