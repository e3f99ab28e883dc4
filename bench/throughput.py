"""What a request costs in processor time at 32 in flight, beside the same work done directly; and what crossing costs.

`make bench-throughput`: a real mosquitto, an agent with its worker, and the bare tokenizer and runtime in the asker's
process at the batch that the worker forms. Interleaved by rounds. Processor time is the scheduler's own count
(/proc/PID/task/*/schedstat), so that what else the machine does weighs little.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Final

import psutil

from agent.workers import Version, Worker
from bench.asker import Asker
from bench.bare import Bare, own_cpu_s
from bench.graphs import texts
from bench.parts import DEVICE, Agent, broker, cpu_s, folder_of, manifest_of, models, p50, table, verdict
from models.channel import Piece
from models.request import Dialect, Request

IN_FLIGHT: Final = 32
SHORTEST: Final = 8
BARE_BATCH: Final = 8
"""What the worker forms of texts of 128 tokens."""
SIZES: Final = (1 << 10, 64 << 10, 600 << 10, 8 << 20, 32 << 20)


class Cost:
    """Processor ms of each request, and requests a second, round by round."""

    def __init__(self) -> None:
        self.ms: list[float] = []
        self.rates: list[float] = []

    def add(self, cpu: float, took_s: float, number: int) -> None:
        self.ms.append(cpu * 1e3 / number)
        self.rates.append(number / took_s)


def mixed(number: int) -> list[str]:
    """Return texts of 8 to 128 tokens."""
    rng = random.Random(6)
    return [" ".join(text.split()[: rng.randint(SHORTEST, 128) - 2]) for text in texts(number)]


def bare_cost(bare: Bare, asked: list[str], cost: Cost) -> None:
    """Answer the texts directly, in batches of equal lengths."""
    ordered = sorted(asked, key=lambda text: text.count(" "))
    begun, before = time.perf_counter(), own_cpu_s()
    for at in range(0, len(ordered), BARE_BATCH):
        bare.texts(ordered[at : at + BARE_BATCH])
    cost.add(own_cpu_s() - before, time.perf_counter() - begun, len(asked))


async def box_cost(asker: Asker, agent: Agent, asked: list[str], cost: Cost) -> None:
    """Ask the box the same, 32 in flight."""
    pids = (agent.pid, *agent.workers)
    before = cpu_s(*pids)
    took_s, _ = await asker.at_once(
        DEVICE, "encoder", [text.encode() for text in asked], "text/plain", len(asked), IN_FLIGHT
    )
    cost.add(cpu_s(*pids) - before, took_s, len(asked))


async def compare(agent: Agent, port: int, rounds: int, threads: int) -> dict[str, tuple[Cost, Cost]]:
    """Return the costs of the box and of the bare work, for texts of one length and of many."""
    bare = Bare(models() / "encoder", threads=threads, spinning=False)
    kinds = {"128 tokens": texts(64), f"{SHORTEST} to 128 tokens": mixed(64)}
    costs = {kind: (Cost(), Cost()) for kind in kinds}
    async with Asker(port) as asker:
        for turn in range(rounds + 1):  # the first is to warm up
            for kind, asked in kinds.items():
                box, direct = costs[kind] if turn else (Cost(), Cost())
                await box_cost(asker, agent, asked, box)
                bare_cost(bare, asked, direct)
    return costs


async def crossing(rounds: int) -> list[tuple[str, str, str]]:
    """Return what it takes a body of each size to reach the worker and be refused there."""
    raw, variant = manifest_of("tiny")
    worker = Worker(
        Version(name="tiny", version="1", digest="", folder=models() / "tiny", variant=variant, manifest=raw)
    )
    await worker.start(threads=1, slots=1)
    rows = []
    for size in SIZES:
        body = random.Random(size).randbytes(size)
        took = [await _refused(worker, body) for _ in range(rounds)]
        copied = [_timed(lambda: bytearray(body)) for _ in range(rounds)]  # noqa: B023 - called at once
        rows.append((f"{size >> 10} KiB", f"{p50(took) * 1e6:.0f}", f"{p50(copied) * 1e6:.0f}"))
    await worker.stop()
    return rows


async def _refused(worker: Worker, body: bytes) -> float:
    answered: asyncio.Future[Piece] = asyncio.get_running_loop().create_future()
    request = Request(model="m", content_type="image/png", body=body, dialect=Dialect.HUGGINGFACE)
    begun = time.perf_counter()
    worker.ask(request, 60_000, answered.set_result)
    piece = await answered
    assert piece.code == "bad_request", piece
    return time.perf_counter() - begun


def _timed(what: Callable[[], object]) -> float:
    begun = time.perf_counter()
    what()
    return time.perf_counter() - begun


def show(costs: dict[str, tuple[Cost, Cost]], crossings: list[tuple[str, str, str]]) -> None:
    rows, claims = [], []
    for kind, (box, bare) in costs.items():
        for who, cost in (("box", box), (f"bare, batch {BARE_BATCH}, sorted by length", bare)):
            ms, rate = statistics.median(cost.ms), statistics.median(cost.rates)
            rows.append((f"encoder, {kind}", who, f"{ms:.1f}", f"{rate:.1f}"))
        ratio = statistics.median(one / other for one, other in zip(box.ms, bare.ms, strict=True))
        claims.append((f"processor time at {IN_FLIGHT} in flight, {kind}: box / bare", verdict(ratio, 1.25)))
    table(("model", "who", "processor ms a request", "requests/s"), rows)
    table(("body", "to the worker and back, µs", "one copy of it, µs"), crossings)
    table(("claim", "measured"), claims)


def main() -> int:
    """Measure and print; the verdict stands in the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--long", action="store_true", help="ten times as many rounds")
    parser.add_argument("--rounds", type=int, default=0)
    options = parser.parse_args()
    threads = psutil.cpu_count(logical=False) or 2
    rounds = options.rounds or (30 if options.long else 3)
    with folder_of("throughput") as folder:
        crossings = asyncio.run(crossing(max(9, rounds)))
        server, port = broker(folder)
        with server, Agent(folder, port, "encoder", threads=threads) as agent:
            costs = asyncio.run(compare(agent, port, rounds, threads))
    show(costs, crossings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
