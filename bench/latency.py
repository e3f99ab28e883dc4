"""What the box adds to the time of one request over MQTT, and to the rate of many.

`make bench-latency`: a real mosquitto, an agent with its worker, an echo that answers with the same client library, one
asker for both, and the bare runtime in the asker's process. Interleaved: each round asks each of them, so that what
else the machine does falls on all alike.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import statistics
import sys
from pathlib import Path
from typing import Final

import numpy as np
import psutil

from bench.asker import Asker
from bench.bare import Bare, timed
from bench.graphs import FEATURES, TOKENS, texts
from bench.parts import DEVICE, Agent, Program, broker, folder_of, models, p50, percentile, table, verdict

IN_FLIGHT: Final = 32
ECHOES: Final = ("echo-link", "echo-paho")
TEXT: Final = "text/plain"
JSON: Final = "application/json"


class Figures:
    """Seconds of single requests, and messages a second, by who answered."""

    def __init__(self) -> None:
        self.took: dict[str, list[float]] = {}
        self.rates: dict[str, list[float]] = {}

    def add(self, who: str, took: list[float]) -> None:
        self.took.setdefault(who, []).extend(took)

    def add_rate(self, who: str, rate: float) -> None:
        self.rates.setdefault(who, []).append(rate)

    def ms(self, who: str, share: float) -> float:
        return percentile(self.took[who], share) * 1e3

    def p50_ms(self, who: str) -> float:
        return p50(self.took[who]) * 1e3


async def measure(port: int, rounds: int, threads: int) -> tuple[Figures, Figures]:
    """Ask everybody in turn; return the figures of the encoder and of the tiny model."""
    home = models()
    bare, still, small = (
        Bare(home / "encoder", threads=threads),
        Bare(home / "encoder", threads=threads, spinning=False),
        Bare(home / "tiny", threads=1),
    )
    asked = texts(64)
    bodies = [text.encode() for text in asked]
    row = json.dumps({"inputs": [0.25 * number for number in range(FEATURES)]}).encode()
    numbers = np.ones((1, FEATURES), np.float32)
    encoder, tiny = Figures(), Figures()
    async with Asker(port) as asker:
        for turn in range(rounds + 1):  # the first is to warm up
            large, little = (encoder, tiny) if turn else (Figures(), Figures())
            for _ in range(10):
                for who in (*ECHOES, DEVICE):
                    took = await asker.one_by_one(who, "tiny", [row], JSON, 10)
                    little.add("box" if who == DEVICE else who, took)
            for echo in ECHOES:
                large.add(echo, await asker.one_by_one(echo, "encoder", bodies, TEXT, 20))
            little.add("run", timed(lambda: small.rows(numbers), 100))
            text = asked[turn % len(asked)]
            for _ in range(5):
                large.add("box", await asker.one_by_one(DEVICE, "encoder", bodies, TEXT, 1))
                large.add("run", timed(lambda: bare.texts([text]), 1))  # noqa: B023 - called at once
                large.add("run, no spinning", timed(lambda: still.texts([text]), 1))  # noqa: B023 - as above
            for who in (*ECHOES, DEVICE):
                took_s, _ = await asker.at_once(who, "tiny", [row], JSON, 640, IN_FLIGHT)
                little.add_rate("box" if who == DEVICE else who, 640 / took_s)
    return encoder, tiny


def show(encoder: Figures, tiny: Figures) -> None:
    rows = []
    for name, figures in ((f"encoder, {TOKENS} tokens", encoder), ("tiny", tiny)):
        for who, took in figures.took.items():
            rate = f"{statistics.median(figures.rates[who]):.0f}" if who in figures.rates else ""
            rows.append((name, who, len(took), f"{figures.p50_ms(who):.3f}", f"{figures.ms(who, 0.99):.3f}", rate))
    table(("model", "who", "requests", "p50 ms", "p99 ms", f"a second, {IN_FLIGHT} in flight"), rows)
    claims = []
    for echo in ECHOES:
        for run in ("run", "run, no spinning"):
            least, worst = (encoder.p50_ms(echo) + encoder.p50_ms(run), encoder.ms(echo, 0.99) + encoder.ms(run, 0.99))
            name = f"({echo} + {run})"
            claims += [
                (f"encoder p50 / {name}", verdict(encoder.p50_ms("box") / least, 1.25)),
                (f"encoder p99 / {name}", verdict(encoder.ms("box", 0.99) / worst, 2.0)),
            ]
        share = statistics.median(tiny.rates["box"]) / statistics.median(tiny.rates[echo])
        claims += [
            (f"tiny p50 / {echo}", verdict(tiny.p50_ms("box") / tiny.p50_ms(echo), 1.6)),
            (f"tiny a second at {IN_FLIGHT} / {echo}", verdict(share, 0.6, least=True)),
        ]
    table(("claim", "measured"), claims)


def main() -> int:
    """Measure and print; the verdict stands in the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--long", action="store_true", help="ten times as many rounds")
    parser.add_argument("--rounds", type=int, default=0)
    options = parser.parse_args()
    threads = psutil.cpu_count(logical=False) or 2
    with contextlib.ExitStack() as stack:
        folder: Path = stack.enter_context(folder_of("latency"))
        server, port = broker(folder)
        stack.enter_context(server)
        for echo in ECHOES:
            command = (sys.executable, "-m", "bench.echo", str(port), echo.removeprefix("echo-"))
            stack.enter_context(Program(*command, log=folder / f"{echo}.log"))
        stack.enter_context(Agent(folder, port, "everything"))
        gc.freeze()
        rounds = options.rounds or (60 if options.long else 6)
        encoder, tiny = asyncio.run(measure(port, rounds, threads))
    show(encoder, tiny)
    return 0


if __name__ == "__main__":
    sys.exit(main())
