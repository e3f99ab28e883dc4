"""How a version does beside the one before it: errors, time, confidence. Pure: no I/O, no clock.

Errors and times are judged by Page's cumulative sum test (Biometrika 41, 1954), which may look after every answer:
each answer adds the logarithm of how much likelier it is if the version has regressed, the sum never falls below 0,
and at `ALARM` the version has. Times are held against the 95th percentile of requests of the same size (bodies within
a factor of two), so that other questions are no slower model. The mean of the best score is held against the version
before by Welch's test each time the number of answers has doubled.
"""

from __future__ import annotations

import math
from typing import Final, Literal

import msgspec

from agent.config import Watching
from models.channel import Piece

ALARM: Final = 16.0
"""About e^16 sound answers between two false alarms; a version that always fails is known after 9 answers."""
LEAST: Final = 20
"""Answers of a kind, before and now, from which on the kind is judged."""
LEAST_SCORES: Final = 50
SETTLE_S: Final = 10.0
"""After a switch the old worker still finishes and caches are cold: no time is judged so early."""
PAUSE_S: Final = 60.0
"""After a regression that could not be acted on, nothing is judged for so long."""
KEPT: Final = 4096
"""Answers after which the weight of older ones is halved."""
FEW_ERRORS: Final = 0.05
"""The share of errors that is taken for sound where the version before has answered too little to know its own."""
LEAST_ERRORS: Final = 8
BROKEN_SHARE: Final = 0.9
"""The share of errors of a version that hardly works at all, looked for beside one that fails a little more often."""
SLOW_SHARE: Final = 0.05
SLOWED_SHARE: Final = 0.2
STEPS: Final = 4.0
"""Buckets of times in a factor of two; a percentile is right within 19 %."""
Z_LIMIT: Final = 4.0
RANKED: Final = (b'{"outputs":[{"label"', b'{"outputs":{"label"')
MAX_RANKED_BYTES: Final = 8192
FAILURES: Final = frozenset({"model_failed", "internal"})
"""Codes that are the model's fault; what an asker did wrong judges no version."""


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """One answer: `size` in bytes of the request, `ms` of compute for it alone, `score` of the best label if any."""

    size: int
    ms: float = 0.0
    failed: bool = False
    score: float | None = None


class Scores(msgspec.Struct):
    """Mean and variance of the best scores, kept up as they come (Welford, Technometrics 4, 1962)."""

    number: float = 0.0
    mean: float = 0.0
    square: float = 0.0

    def take(self, score: float) -> None:
        """Take one score in."""
        self.number += 1
        away = score - self.mean
        self.mean += away / self.number
        self.square += away * (score - self.mean)

    def fade(self) -> None:
        """Halve the weight of what was seen."""
        self.number, self.square = self.number / 2, self.square / 2

    @property
    def variance(self) -> float:
        """Variance of the scores; 0 for fewer than two."""
        return self.square / (self.number - 1) if self.number > 1 else 0.0


class Figures(msgspec.Struct):
    """What a version has shown on this box; bounded, and newer answers weigh more."""

    answers: float = 0.0
    errors: float = 0.0
    times: dict[int, dict[int, float]] = {}
    """By size class, then by bucket of time, the number of answers."""
    scores: Scores = msgspec.field(default_factory=Scores)
    peak_mb: float = 0.0
    """The most memory that a worker of it has held here."""
    trial_mb: float = 0.0
    trial_ms: float = 0.0
    """What it held, and the 95th percentile of its times, when its trial here was over."""

    def take(self, seen: Seen) -> None:
        """Take one answer in."""
        self.answers += 1
        if seen.failed:
            self.errors += 1
        else:
            self._take_time(seen)
        if seen.score is not None:
            self.scores.take(seen.score)
        if self.answers >= KEPT:
            self._fade()

    def p95_ms(self, size: int) -> float:
        """Return the 95th percentile of the time of requests of this size; 0 where too few were seen."""
        counts = self.times.get(size_class(size), {})
        total = sum(counts.values())
        left = total * SLOW_SHARE
        for bucket in sorted(counts, reverse=True) if total >= LEAST else ():
            left -= counts[bucket]
            if left < 0:
                return float(2 ** ((bucket + 1) / STEPS))
        return 0.0

    @property
    def error_share(self) -> float:
        """The share of answers that failed."""
        return self.errors / self.answers if self.answers else 0.0

    def _take_time(self, seen: Seen) -> None:
        counts = self.times.setdefault(size_class(seen.size), {})
        bucket = math.floor(math.log2(max(seen.ms, 1e-3)) * STEPS)
        counts[bucket] = counts.get(bucket, 0.0) + 1

    def _fade(self) -> None:
        """Halve the weight of everything seen; what weighs next to nothing is forgotten."""
        self.answers, self.errors = self.answers / 2, self.errors / 2
        self.scores.fade()
        faded = {
            size: {bucket: count / 2 for bucket, count in counts.items() if count > 0.1}
            for size, counts in self.times.items()
        }
        self.times = {size: counts for size, counts in faded.items() if counts}


class Regression(msgspec.Struct, frozen=True):
    """What a new version does worse than the one before it, in a word and with the figures."""

    kind: Literal["errors", "latency", "confidence"]
    message: str


class Watch(msgspec.Struct):
    """A version that was just activated, beside the figures of the one before it; durable, so it outlives a restart."""

    watched_s: float = 0.0
    """How long the version has served; a box that is off watches nothing."""
    judged_from_s: float = 0.0
    answers: int = 0
    errors: int = 0
    timed: int = 0
    slow: int = 0
    error_sum: float = 0.0
    broken_sum: float = 0.0
    slow_sum: float = 0.0
    scores: Scores = msgspec.field(default_factory=Scores)

    def judge(self, seen: Seen, before: Figures, rules: Watching, budget_ms: float) -> Regression | None:
        """Take one answer of the new version in; return what is wrong with the version once that is certain."""
        if self.watched_s < self.judged_from_s:
            return None
        self.answers += 1
        self.errors += seen.failed
        problem = self._judge_error(before, rules, failed=seen.failed)
        if problem is None and not seen.failed:
            problem = self._judge_time(seen, before, rules, budget_ms)
        if problem is None and seen.score is not None:
            problem = self._judge_score(seen.score, before, rules)
        return problem

    def begin_anew(self) -> None:
        """Forget what was held against the version, and watch on after a pause."""
        self.judged_from_s = self.watched_s + PAUSE_S
        self.answers = self.errors = self.timed = self.slow = 0
        self.error_sum = self.broken_sum = self.slow_sum = 0.0
        self.scores = Scores()

    def _judge_error(self, before: Figures, rules: Watching, *, failed: bool) -> Regression | None:
        sound = max(rules.max_error_share, 1.5 * _upper_share(before.errors, before.answers))
        if before.answers < LEAST:
            sound = max(rules.max_error_share, FEW_ERRORS)
        if 2 * sound >= BROKEN_SHARE:
            return None
        self.error_sum = _page(self.error_sum, sound, sound + max(0.1, sound), hit=failed)
        self.broken_sum = _page(self.broken_sum, sound, BROKEN_SHARE, hit=failed)
        if max(self.error_sum, self.broken_sum) < ALARM or self.errors < LEAST_ERRORS:
            return None
        was = f"{before.error_share:.1%} of {before.answers:.0f}" if before.answers else "none known"
        told = f"errors: {self.errors} of {self.answers} answers failed; of the version before {was}"
        return Regression("errors", told)

    def _judge_time(self, seen: Seen, before: Figures, rules: Watching, budget_ms: float) -> Regression | None:
        usual_ms = before.p95_ms(seen.size)
        if not usual_ms or self.watched_s < SETTLE_S:
            return None
        bound_ms = max(rules.max_slowdown * usual_ms, budget_ms)
        slow = seen.ms > bound_ms
        self.timed += 1
        self.slow += slow
        self.slow_sum = _page(self.slow_sum, SLOW_SHARE, SLOWED_SHARE, hit=slow)
        if self.slow_sum < ALARM or self.timed < LEAST:
            return None
        told = f"latency: {self.slow} of {self.timed} answers took over {bound_ms:.3g} ms, the last {seen.ms:.3g} ms"
        return Regression("latency", f"{told}; 95 % of the version before took at most {usual_ms:.3g} ms")

    def _judge_score(self, score: float, before: Figures, rules: Watching) -> Regression | None:
        now, usual = self.scores, before.scores
        now.take(score)
        if not _is_doubled(now.number) or usual.number < LEAST_SCORES:
            return None
        spread = math.sqrt(now.variance / now.number + usual.variance / usual.number)
        drop = usual.mean - now.mean
        if drop <= rules.max_score_drop or drop - rules.max_score_drop / 2 < Z_LIMIT * spread:
            return None
        told = f"confidence: the best score is {now.mean:.3f} in the mean of {now.number:.0f} answers"
        return Regression("confidence", f"{told}; of the version before {usual.mean:.3f}")


class _Label(msgspec.Struct):
    score: float


class _Labels(msgspec.Struct):
    outputs: list[_Label] | _Label


_labels = msgspec.json.Decoder(_Labels)


def seen_of(size: int, piece: Piece) -> Seen | None:
    """Return what a final piece shows of its version; None where it shows nothing, as an asker's own mistake."""
    if piece.code:
        return Seen(size=size, failed=True) if piece.code in FAILURES else None
    ms = piece.compute_ms / max(1, piece.batch) / max(1, piece.tokens_out)
    return Seen(size=size, ms=ms, score=best_score(piece.body))


def best_score(body: bytes) -> float | None:
    """Return the score of the first label of an answer that ranks labels; None for any other answer."""
    if not body.startswith(RANKED) or len(body) > MAX_RANKED_BYTES:
        return None
    try:
        outputs = _labels.decode(body).outputs
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    best = outputs if isinstance(outputs, _Label) else outputs[0]
    score = best.score
    return score if 0.0 <= score <= 1.0 else None


def size_class(size: int) -> int:
    """Return the class of a request's size in bytes: each holds a factor of two."""
    return size.bit_length()


def _is_doubled(number: float) -> bool:
    """Whether so many answers are `LEAST_SCORES`, or twice, four times as many, and so on."""
    share, rest = divmod(number, LEAST_SCORES)
    return rest == 0 and share >= 1 and math.log2(share).is_integer()


def _page(total: float, sound: float, regressed: float, *, hit: bool) -> float:
    """Return the next cumulative sum: `sound` and `regressed` are the shares of hits of the two hypotheses."""
    gain = math.log(regressed / sound) if hit else math.log((1 - regressed) / (1 - sound))
    return max(0.0, total + gain)


def _upper_share(hits: float, number: float) -> float:
    """Return the upper end of Wilson's 95 % interval of a share (JASA 22, 1927)."""
    if number <= 0:
        return 1.0
    z2 = 1.96**2
    middle = hits + z2 / 2
    half = 1.96 * math.sqrt(hits * (number - hits) / number + z2 / 4)
    return (middle + half) / (number + z2)
