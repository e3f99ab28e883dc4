"""Measures of answers, against values worked out by hand or known from their definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.accuracy import chrf, drop, edit_distance, is_better, score, spearman, word_error_rate
from models.errors import ModelError


def labelled(*pairs: tuple[str, str]) -> list[tuple[Any, Any]]:
    return [([{"label": answered, "score": 0.9}, {"label": "z", "score": 0.1}], right) for answered, right in pairs]


def test_classes_are_judged_by_the_best_label() -> None:
    found = score("text-classification", labelled(("a", "a"), ("a", "a"), ("a", "b"), ("b", "b")))
    assert found == {"accuracy": 0.75, "macro_f1": pytest.approx((0.8 + 2 / 3) / 2, abs=1e-6)}
    assert next(iter(found)) == "accuracy"
    assert score("tabular-classification", [({"label": "a", "score": 1.0}, "a")])["accuracy"] == 1


def test_a_label_that_is_a_number_is_its_name() -> None:
    assert score("image-classification", [([{"label": "7", "score": 1.0}], 7)])["accuracy"] == 1


def test_numbers_are_judged_by_how_far_off_they_are() -> None:
    assert score("tabular-regression", [(1.0, 2.0), (5.0, 2.0)]) == {
        "mae": 2.0,
        "rmse": pytest.approx(math.sqrt(5), abs=1e-6),
    }
    assert score("time-series-forecasting", [([1.0, 2.0], [1.0, 4.0])])["mae"] == 1
    outputs = [{"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [1.0, 2.0]}]
    assert score("tensors", [(outputs, [[1.0, 3.0]])])["mae"] == 0.5


def test_entities_count_when_place_and_kind_are_right() -> None:
    found = [{"entity_group": "PER", "start": 0, "end": 4, "word": "Anna", "score": 1.0}]
    right = [[0, 4, "PER"], {"entity_group": "LOC", "start": 9, "end": 13}]
    assert score("token-classification", [(found, right)]) == {
        "entity_f1": pytest.approx(2 / 3, abs=1e-6),
        "precision": 1.0,
        "recall": 0.5,
    }
    assert score("token-classification", [([], [])])["entity_f1"] == 1


def test_answers_are_compared_as_squad_compares_them() -> None:
    pairs = [({"answer": "The Eiffel tower!"}, ["eiffel Tower", "a tower"]), ({"answer": "in 1999"}, "1999")]
    assert score("question-answering", pairs) == {
        "f1": pytest.approx((1 + 2 / 3) / 2, abs=1e-6),
        "exact_match": 0.5,
    }
    assert score("question-answering", [({"answer": ""}, "")])["f1"] == 1


def test_speech_is_judged_by_words_that_are_wrong() -> None:
    found = score("automatic-speech-recognition", [({"text": "THE CAT SAT"}, "the cat sat down")])
    assert found == {"word_error_rate": 0.25, "exact_match": 0.0}
    assert word_error_rate([("", "a b")]) == 1


def test_texts_are_judged_by_runs_of_letters() -> None:
    assert chrf("the same", "the same") == pytest.approx(1)
    assert chrf("abc", "xyz") == 0
    assert (chrf("", ""), chrf("", "a"), chrf("a", " ")) == (1, 0, 0)
    # One letter of four differs: 3/4, 2/3, 1/2 and 0 of the runs of 1 to 4 letters are shared.
    assert chrf("abcd", "abcx") == pytest.approx((3 / 4 + 2 / 3 + 1 / 2) / 4)
    assert score("translation", [({"translation_text": "ja"}, ["nein", "ja"])]) == {"chrf": 1.0, "exact_match": 1.0}


def test_embeddings_are_judged_by_the_order_of_likeness() -> None:
    near, far = [[1.0, 0.0], [1.0, 0.1]], [[1.0, 0.0], [0.0, 1.0]]
    assert score("feature-extraction", [(near, 5), (far, 1)]) == {"spearman": 1.0}
    assert spearman([(1, 3), (2, 2), (3, 1)]) == -1
    assert spearman([(1, 1), (1, 2)]) == 0
    assert spearman([(1, 1), (2, 2), (2, 2), (3, 3)]) == pytest.approx(1)


def test_boxes_count_when_they_overlap_by_half_and_each_once() -> None:
    box = {"xmin": 0, "ymin": 0, "xmax": 10, "ymax": 10}
    near = {**box, "xmax": 9}
    far = {**box, "xmin": 8, "xmax": 18}
    found = [{"label": "cat", "box": near, "score": 0.9}, {"label": "cat", "box": box, "score": 0.5}]
    assert score("object-detection", [(found, [{"label": "cat", "box": box}])])["precision"] == 0.5
    assert score("object-detection", [(found[:1], [{"label": "dog", "box": box}])])["box_f1"] == 0
    assert score("object-detection", [(found[:1], [{"label": "cat", "box": far}])])["box_f1"] == 0


@pytest.mark.parametrize(
    ("task", "pairs", "says"),
    [
        ("image-segmentation", [([], [])], "has no measure"),
        ("text-classification", [], "no labelled samples"),
        ("tabular-regression", [(1.0, "warm")], "a label is not what tabular-regression answers"),
        ("feature-extraction", [([[1.0]], 1)], "a label is not what"),
    ],
)
def test_what_cannot_be_judged_is_said(task: str, pairs: list[tuple[Any, Any]], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        score(task, pairs)


def test_a_drop_is_worse_whichever_way_the_measure_points() -> None:
    assert drop("accuracy", 0.8, 0.9) == pytest.approx(0.1)
    assert drop("word_error_rate", 0.3, 0.2) == pytest.approx(0.1)
    assert drop("mae", 1.1, 1.0) == pytest.approx(0.1)
    assert drop("mae", 0.0, 0.0) == 0
    assert drop("mae", 0.1, 0.0) == math.inf
    assert is_better("mae", 1, 2)
    assert not is_better("accuracy", 1, 2)


@given(st.text("ab", max_size=8), st.text("ab", max_size=8))
def test_an_edit_distance_is_one(left: str, right: str) -> None:
    found = edit_distance(left, right)
    assert found == edit_distance(right, left)
    assert abs(len(left) - len(right)) <= found <= max(len(left), len(right))
    assert (found == 0) == (left == right)
