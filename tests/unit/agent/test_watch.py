"""When a new version is worse than the one before it, and above all when it is not."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.config import Watching
from agent.records import PROVEN_S, Record, fresh_record
from agent.watch import KEPT, LEAST, SETTLE_S, Figures, Regression, Seen, Watch, best_score, seen_of, size_class
from models.channel import Piece

RULES = Watching()
AFTER_S = SETTLE_S + 1


def figures(
    number: int = 1000, *, errors: int = 0, ms: float = 10.0, score: float | None = None, size: int = 100
) -> Figures:
    """Return what a version has shown that took about so long."""
    shown, chance = Figures(), random.Random(1)
    for at in range(number):
        share = score if score is None else min(1.0, max(0.0, chance.gauss(score, 0.1)))
        shown.take(Seen(size=size, ms=ms * chance.uniform(0.8, 1.2), failed=at < errors, score=share))
    return shown


def judged(
    before: Figures, answers: list[Seen], *, budget_ms: float = 0.0, rules: Watching = RULES
) -> tuple[Regression | None, int]:
    """Return the verdict over these answers and after how many it came."""
    watch = Watch(watched_s=AFTER_S)
    for number, seen in enumerate(answers, 1):
        regression = watch.judge(seen, before, rules, budget_ms)
        if regression is not None:
            return regression, number
    return None, len(answers)


def answers(
    number: int, *, ms: float = 10.0, failing: float = 0.0, score: float | None = None, size: int = 100
) -> list[Seen]:
    chance = random.Random(7)
    return [
        Seen(
            size=size,
            ms=ms * chance.uniform(0.8, 1.2),
            failed=chance.random() < failing,
            score=score if score is None else min(1.0, max(0.0, chance.gauss(score, 0.1))),
        )
        for _ in range(number)
    ]


def test_a25_a_version_that_always_fails_is_known_within_ten_answers_and_the_message_has_the_figures() -> None:
    regression, number = judged(figures(errors=2), answers(100, failing=1.0))
    assert regression is not None
    assert regression.kind == "errors"
    assert number <= 10
    assert regression.message == f"errors: {number} of {number} answers failed; of the version before 0.2% of 1000"


def test_a25_a_version_that_fails_three_times_in_ten_is_known_within_a_hundred_answers() -> None:
    regression, number = judged(figures(errors=2), answers(1000, failing=0.3))
    assert regression is not None
    assert number < 100


@pytest.mark.parametrize(("failed_before", "fails_now"), [(0, 0.01), (10, 0.01), (100, 0.1), (300, 0.32), (900, 1.0)])
def test_a_version_that_fails_no_more_than_the_one_before_stays(failed_before: int, fails_now: float) -> None:
    assert judged(figures(errors=failed_before), answers(20_000, failing=fails_now))[0] is None


def test_without_figures_of_the_version_before_one_that_mostly_fails_is_known_all_the_same() -> None:
    assert judged(Figures(), answers(100, failing=0.04))[0] is None
    regression, _ = judged(Figures(), answers(100, failing=0.8))
    assert regression is not None
    assert regression.message.endswith("of the version before none known")


def test_a25_a_version_that_takes_ten_times_as_long_is_known_and_the_message_has_the_figures() -> None:
    regression, number = judged(figures(ms=10), answers(1000, ms=100))
    assert regression is not None
    assert regression.kind == "latency"
    assert number <= 2 * LEAST
    assert "95 % of the version before took at most 13.5 ms" in regression.message


@pytest.mark.parametrize("factor", [0.1, 1.0, 2.0])
def test_a_version_that_is_not_that_much_slower_stays(factor: float) -> None:
    assert judged(figures(ms=10), answers(20_000, ms=10 * factor))[0] is None


def test_a_few_slow_answers_among_quick_ones_are_no_regression() -> None:
    now = answers(10_000, ms=10)
    for at in range(0, 10_000, 40):
        now[at] = Seen(size=100, ms=500.0)
    assert judged(figures(ms=10), now)[0] is None


def test_what_the_signed_budget_allows_is_not_slow() -> None:
    assert judged(figures(ms=10), answers(1000, ms=100), budget_ms=200)[0] is None
    assert judged(figures(ms=10), answers(1000, ms=300), budget_ms=200)[0] is not None


def test_larger_questions_are_no_slower_model() -> None:
    assert judged(figures(ms=10, size=100), answers(1000, ms=1000, size=100_000))[0] is None


def test_no_time_is_judged_while_the_old_worker_still_finishes() -> None:
    watch = Watch(watched_s=SETTLE_S / 2)
    before = figures(ms=10)
    assert all(watch.judge(seen, before, RULES, 0.0) is None for seen in answers(1000, ms=100))


def test_a_version_that_is_much_less_sure_is_known_and_the_message_has_the_figures() -> None:
    regression, number = judged(figures(score=0.9), answers(1000, score=0.5))
    assert regression is not None
    assert (regression.kind, number) == ("confidence", 50)
    assert regression.message.startswith("confidence: the best score is 0.5")


@pytest.mark.parametrize("score", [0.85, 0.8, 0.95])
def test_a_version_that_is_about_as_sure_stays(score: float) -> None:
    assert judged(figures(score=0.9), answers(20_000, score=score))[0] is None


def test_a_few_doubtful_answers_judge_nothing() -> None:
    assert judged(figures(score=0.9), answers(49, score=0.1))[0] is None


def test_the_rules_are_the_owner_s() -> None:
    strict = Watching(max_slowdown=1.5, max_score_drop=0.02)
    assert judged(figures(ms=10), answers(1000, ms=30), rules=strict)[0] is not None
    assert judged(figures(score=0.9), answers(1000, score=0.85), rules=strict)[0] is not None


@pytest.mark.parametrize("seed", range(2))
def test_the_same_model_again_is_never_rolled_back(seed: int) -> None:
    """Thirty thousand answers that come from one and the same law of errors, times and scores, heavy tails too."""
    chance = random.Random(seed)

    def one() -> Seen:
        return Seen(
            size=chance.choice((50, 5000)),
            ms=chance.lognormvariate(2, 1),
            failed=chance.random() < 0.03,
            score=chance.betavariate(5, 1),
        )

    before = Figures()
    for _ in range(3000):
        before.take(one())
    assert judged(before, [one() for _ in range(30_000)])[0] is None


def test_the_95th_percentile_is_right_within_a_fifth_and_unknown_where_little_was_seen() -> None:
    assert figures(1000, ms=10).p95_ms(100) == pytest.approx(11.8, rel=0.2)
    assert figures(1000, ms=10).p95_ms(10_000) == 0
    assert figures(LEAST - 1).p95_ms(100) == 0
    assert Figures().p95_ms(1) == 0


@given(st.lists(st.tuples(st.integers(0, 1 << 30), st.floats(0, 1e7)), min_size=1, max_size=200))
def test_figures_are_bounded_and_come_back_from_the_disk_as_they_were(shown: list[tuple[int, float]]) -> None:
    kept = Figures()
    for size, ms in shown:
        kept.take(Seen(size=size, ms=ms, score=0.5))
    assert msgspec.json.decode(msgspec.json.encode(kept), type=Figures) == kept
    assert sum(sum(counts.values()) for counts in kept.times.values()) == len(shown)


def test_newer_answers_weigh_more_and_the_numbers_stay_bounded() -> None:
    shown = figures(10 * KEPT, ms=10)
    assert shown.answers < KEPT
    for _ in range(4 * KEPT):
        shown.take(Seen(size=100, ms=100.0))
    assert shown.p95_ms(100) == pytest.approx(100, rel=0.2)
    assert len(msgspec.json.encode(shown)) < 2000


def test_sizes_within_a_factor_of_two_are_one_class() -> None:
    assert size_class(64) == size_class(127) != size_class(128)


@pytest.mark.parametrize(
    ("body", "score"),
    [
        (b'{"outputs":[{"label":"7","score":0.9},{"label":"1","score":0.1}]}', 0.9),
        (b'{"outputs":{"label":"7","score":0.25}}', 0.25),
        (b'{"outputs":[{"label":"7","score":-3.5}]}', None),
        (b'{"outputs":[{"label":"7"}]}', None),
        (b'{"outputs":[0.1,0.2]}', None),
        (b"", None),
    ],
)
def test_the_best_score_is_that_of_ranked_labels_alone(body: bytes, score: float | None) -> None:
    assert best_score(body) == score


def test_what_an_asker_did_wrong_judges_no_version() -> None:
    assert seen_of(10, Piece(ticket=1, code="bad_request")) is None
    assert seen_of(10, Piece(ticket=1, code="cancelled")) is None
    assert seen_of(10, Piece(ticket=1, code="model_failed")) == Seen(size=10, failed=True)


def test_a_time_is_one_request_s_share_of_its_batch_and_a_generation_s_time_for_each_token() -> None:
    assert seen_of(10, Piece(ticket=1, compute_ms=80, batch=8)) == Seen(size=10, ms=10)
    assert seen_of(10, Piece(ticket=1, compute_ms=80, tokens_out=40)) == Seen(size=10, ms=2)


def record() -> Record:
    old = Record(digest="a", figures=figures(errors=2))
    return fresh_record(old, "b", "salt", p95_ms=5, memory_mb=50, watched=True)


def test_a_record_tells_of_a_regression_once() -> None:
    new = record()
    told = [new.take(seen, RULES, 0.0) for seen in answers(100, failing=1.0)]
    assert len([regression for regression in told if regression is not None]) == 1


def test_a_watch_ends_with_its_window_and_a_version_is_proven_once_the_agent_ran_on_with_it() -> None:
    new = record()
    new.age(PROVEN_S - 1, 1000)
    assert (new.proven, new.watch is None) == (False, False)
    new.age(1, 1000)
    assert (new.proven, new.watch is None) == (True, False)
    new.age(1000, 1000)
    assert (new.proven, new.watch is None) == (True, True)


def test_going_back_takes_the_old_figures_back() -> None:
    new = record()
    assert new.gone_back("a").figures.answers == 1000
    assert new.gone_back("another").figures == Figures()
    assert (new.peak_mb("b"), new.peak_mb("other")) == (50, 0)
