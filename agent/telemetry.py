"""Counters of what the box did, in Prometheus' text form. Never a prompt, a topic or a client's name."""

from __future__ import annotations

import bisect
import collections

from models.request import Response

LATENCY_BUCKETS_MS = (5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000, 30000)


class Telemetry:
    """Counts answers by model, route, reason and code."""

    def __init__(self) -> None:
        self.answers: collections.Counter[tuple[str, str, str, str]] = collections.Counter()
        self._buckets: collections.Counter[tuple[str, int]] = collections.Counter()
        self._sums: dict[str, float] = collections.defaultdict(float)
        self.gauges: dict[str, float] = {}

    def answered(self, response: Response, model: str) -> None:
        """Count one final reply; `model` is empty for a name that this box does not know, or labels had no bound."""
        route = response.route or "none"
        self.answers[model, route, response.reason, response.code] += 1
        self._sums[route] += response.total_ms
        self._buckets[route, bisect.bisect_left(LATENCY_BUCKETS_MS, response.total_ms)] += 1

    def render(self) -> str:
        """Return everything in Prometheus' text exposition format 0.0.4."""
        lines = ["# TYPE spillway_answers_total counter"]
        for (model, route, reason, code), count in sorted(self.answers.items()):
            labels = _labels(model=model, route=route, reason=reason, code=code)
            lines.append(f"spillway_answers_total{{{labels}}} {count}")
        lines.append("# TYPE spillway_answer_seconds histogram")
        for route, total_ms in sorted(self._sums.items()):
            reached = 0
            for at, bound in enumerate((*LATENCY_BUCKETS_MS, None)):
                reached += self._buckets[route, at]
                labels = _labels(route=route, le="+Inf" if bound is None else str(bound / 1e3))
                lines.append(f"spillway_answer_seconds_bucket{{{labels}}} {reached}")
            labels = _labels(route=route)
            lines.append(f"spillway_answer_seconds_sum{{{labels}}} {total_ms / 1e3:.6f}")
            lines.append(f"spillway_answer_seconds_count{{{labels}}} {reached}")
        for name, value in sorted(self.gauges.items()):
            lines += [f"# TYPE {name} gauge", f"{name} {value:g}"]
        return "\n".join(lines) + "\n"


def _labels(**labels: str) -> str:
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items())


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
