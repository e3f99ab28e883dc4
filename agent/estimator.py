"""How long a request will take: a law for each model, fitted while it runs. Pure: no I/O, no clock.

The law is linear in what is known before a request runs: `ms = a + b * tokens_in + c * tokens_out`, fitted by recursive
least squares. Old samples are forgotten only in the direction of a new one (directional forgetting, Cao and Schwartz,
Automatica 36, 2000): a model that counts no tokens, or gets the same question all day, follows a box that grows hot,
and what it knows of other lengths neither fades nor blows up.
"""

from __future__ import annotations

import math

FORGET = 0.98
FIRST_INFORMATION = 2e-4
"""How much the prior weighs beside one sample: a standard deviation of 70 ms in each coefficient."""
TOKENS = 100.0
"""Tokens are counted in hundreds, so that the three coefficients are of one size."""


class ServiceLaw:
    """Service time in ms as a function of tokens; knows how wrong it has been."""

    def __init__(self, prior_ms: float = 20.0) -> None:
        self._weights = [prior_ms, 0.0, 0.0]
        self._information = [[FIRST_INFORMATION if row == column else 0.0 for column in range(3)] for row in range(3)]
        self._squared_error = 0.0
        self.observed = 0

    def predict_ms(self, tokens_in: int, tokens_out: int) -> float:
        """Return the expected service time, never below 0."""
        return max(0.0, _dot(self._weights, _features(tokens_in, tokens_out)))

    @property
    def error_ms(self) -> float:
        """Root mean square of the recent prediction errors in ms."""
        return math.sqrt(self._squared_error)

    def observe(self, tokens_in: int, tokens_out: int, took_ms: float) -> None:
        """Take one measured service time into the law; a time that cannot be is passed over."""
        if not 0 <= took_ms < math.inf:
            return
        x = _features(tokens_in, tokens_out)
        error = took_ms - _dot(self._weights, x)
        self._information = _informed(self._information, x)
        gain = _solve(self._information, x)
        self._weights = [weight + g * error for weight, g in zip(self._weights, gain, strict=True)]
        share = 1.0 if self.observed == 0 else 0.1
        self._squared_error += share * (error * error - self._squared_error)
        self.observed += 1


def _features(tokens_in: int, tokens_out: int) -> list[float]:
    return [1.0, tokens_in / TOKENS, tokens_out / TOKENS]


def _dot(left: list[float], right: list[float]) -> float:
    return left[0] * right[0] + left[1] * right[1] + left[2] * right[2]


def _informed(information: list[list[float]], x: list[float]) -> list[list[float]]:
    """Return the information matrix after a sample at `x`: a share forgotten along `x`, then the sample's own."""
    along = [_dot(row, x) for row in information]
    forget = (1.0 - FORGET) / _dot(along, x)
    a, b, c = along
    d, e, f = x
    return [
        [
            row[0] - forget * here * a + own * d,
            row[1] - forget * here * b + own * e,
            row[2] - forget * here * c + own * f,
        ]
        for row, here, own in zip(information, along, x, strict=True)
    ]


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Solve a symmetric, positive definite system by elimination; rounding makes no pivot less than the prior's."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for pivot in range(3):
        rows[pivot][pivot] = max(rows[pivot][pivot], FIRST_INFORMATION)
        for below in range(pivot + 1, 3):
            factor = rows[below][pivot] / rows[pivot][pivot]
            rows[below] = [b - factor * p for b, p in zip(rows[below], rows[pivot], strict=True)]
    solution = [0.0, 0.0, 0.0]
    for pivot in (2, 1, 0):
        solution[pivot] = (rows[pivot][3] - _dot(rows[pivot][:3], solution)) / rows[pivot][pivot]
    return solution
