"""Which token is drawn from given logits."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from models.errors import ModelError
from models.generation.options import Sampling
from models.generation.sampling import Sampler

LOGITS = np.log(np.array([0.5, 0.25, 0.15, 0.1], dtype=np.float32))


def sampler(prompt: tuple[int, ...] = (), ends: frozenset[int] = frozenset(), **options: Any) -> Sampler:
    return Sampler(Sampling(**{"seed": 1, **options}), prompt, ends)


def shares(count: int = 4000, **options: Any) -> dict[int, float]:
    drawing = sampler(**{"temperature": 1.0, **options})
    drawn = Counter(drawing.draw(LOGITS) for _ in range(count))
    return {token: drawn[token] / count for token in sorted(drawn)}


def test_the_likeliest_is_taken_without_a_temperature() -> None:
    assert sampler(temperature=0.0).draw(LOGITS) == 0


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    assert shares() == pytest.approx({0: 0.5, 1: 0.25, 2: 0.15, 3: 0.1}, abs=0.03)


def test_temperature_evens_the_chances_out() -> None:
    root = np.sqrt(np.exp(LOGITS))
    assert shares(temperature=2.0) == pytest.approx(dict(enumerate(root / root.sum())), abs=0.03)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 9}, {0, 1, 2, 3}),
        ({"top_p": 0.7}, {0, 1}),
        ({"top_p": 0.76}, {0, 1, 2}),
        ({"top_p": 0.0}, {0}),
        ({"top_p": 1.0}, {0, 1, 2, 3}),
        ({"min_p": 0.4}, {0, 1}),
        ({"top_k": 3, "top_p": 0.6}, {0, 1}),
        ({"top_p": 0.95, "min_p": 0.25}, {0, 1, 2}),
    ],
)
def test_the_unlikely_ones_are_cut_off(options: dict[str, float], kept: set[int]) -> None:
    assert set(shares(500, **options)) == kept


def test_a_nucleus_wider_than_the_first_candidates_is_found_whole() -> None:
    logits = np.zeros(1600, dtype=np.float32)
    drawing = sampler(temperature=1.0, top_p=0.75)
    drawn = {drawing.draw(logits) for _ in range(4000)}
    assert 1024 < len(drawn) <= 1201


def test_the_same_seed_draws_the_same_and_another_differs() -> None:
    first, second, other = (
        [drawing.draw(LOGITS) for _ in range(50)]
        for drawing in (sampler(temperature=1.0, seed=5), sampler(temperature=1.0, seed=5), sampler(temperature=1.0))
    )
    assert first == second != other


def test_a_repetition_is_made_unlikelier_be_its_logit_above_or_below_zero() -> None:
    logits = np.array([1.0, 0.9, -0.1, -0.2], dtype=np.float32)
    assert sampler((0,), temperature=0.0, repetition_penalty=1.5).draw(logits) == 1
    below = np.array([-1.0, -1.2, -9.0], dtype=np.float32)
    assert sampler((0,), temperature=0.0, repetition_penalty=1.5).draw(below) == 1


def test_what_was_drawn_counts_as_a_repetition_too() -> None:
    drawing = sampler(temperature=0.0, repetition_penalty=2.0)
    assert [drawing.draw(np.array([1.0, 0.9, 0.8], dtype=np.float32)) for _ in range(3)] == [0, 1, 2]


def test_frequency_counts_how_often_and_presence_whether() -> None:
    logits = np.array([1.0, 0.75, -5.0], dtype=np.float32)
    often = sampler(temperature=0.0, frequency_penalty=0.2)
    assert [often.draw(logits) for _ in range(5)] == [0, 0, 1, 0, 1]
    once = sampler(temperature=0.0, presence_penalty=0.2)
    assert [once.draw(logits) for _ in range(4)] == [0, 0, 0, 0]


def test_no_end_comes_before_the_least_tokens() -> None:
    drawing = sampler(ends=frozenset({0, 1}), temperature=0.0, min_tokens=2)
    assert [drawing.draw(LOGITS) for _ in range(3)] == [2, 2, 0]


def test_only_what_is_allowed_is_drawn_and_a_grammars_end_goes_before_a_length() -> None:
    allowed = np.array([False, True, False, True])
    assert sampler(temperature=0.0).draw(LOGITS, allowed) == 1
    end_only = np.array([True, False, False, False])
    assert sampler(ends=frozenset({0}), temperature=0.0, min_tokens=5).draw(LOGITS, end_only) == 0


def test_a_vocabulary_shorter_than_the_logits_allows_nothing_beyond_it() -> None:
    assert sampler(temperature=0.0).draw(LOGITS[::-1].copy(), np.array([True, True])) == 1


def test_logits_are_left_as_they_were() -> None:
    logits = LOGITS.copy()
    sampler((0,), ends=frozenset({1}), temperature=1.0, repetition_penalty=2.0, min_tokens=3).draw(logits)
    assert (logits == LOGITS).all()


@pytest.mark.parametrize("broken", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_the_models_fault(broken: float, temperature: float) -> None:
    with pytest.raises(ModelError, match="no finite numbers"):
        sampler(temperature=temperature).draw(np.array([1.0, broken], dtype=np.float32))
    with pytest.raises(ModelError, match="no finite numbers"):
        sampler(temperature=temperature).draw(np.array([1.0, 2.0], dtype=np.float32), np.array([False, False]))
