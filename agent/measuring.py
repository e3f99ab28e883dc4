"""`spillway bench`: latency, throughput and memory of a model on this very board, and whether to believe them."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import logging
import sys
import time
from collections.abc import Sequence
from typing import Final

import msgspec

from agent import board
from agent.exits import EXIT_FAILED, EXIT_OK, config_if_there, config_option
from agent.infer import describe, read_input
from agent.opening import Found, Opened, OpenError, find_model, opened
from agent.telling import table
from models.body import Body, parse_body
from models.channel import Piece
from models.errors import RequestError
from models.evaluate import quantile
from models.manifest import variant_golden
from models.request import Request

EXAMPLES: Final = """\
examples:
  spillway bench digits                        a model of this box, 20 s
  spillway bench ./digits --seconds 60         a folder, longer
  spillway bench sea-temperature --input @months.json --threads 1 2 4
  spillway bench digits --json > before.json

It asks the model's golden samples (or --input) in a worker of its own, confined as the agent's are, one at a time and
8 and 32 at a time, with one thread and with as many as there are cores. Latency is from the question's leaving to the
answer's coming back, and `of it the model` the part inside the model. What else kept the board busy, and whether it
grew hot, is told below the table: figures of a busy or throttled board say little.
"""
IN_FLIGHT: Final = (1, 8, 32)
WARM_S: Final = 0.3
LOOK_S: Final = 0.5
GRACE_S: Final = 10.0
"""How long answers under way may take after their time is over."""
DEADLINE_MS: Final = 600_000.0
BUSY_SHARE: Final = 0.15
HOT_CELSIUS: Final = 80.0
SLOW_CLOCK: Final = 0.8
FEW: Final = 20
HEADS: Final = (
    "THREADS",
    "IN FLIGHT",
    "P50 MS",
    "P95 MS",
    "P99 MS",
    "OF IT THE MODEL",
    "ANSWERS/S",
    "BATCH",
    "TOKENS/S",
    "N",
)


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured with so many threads and questions in flight; times in ms, rates in one second."""

    threads: int
    in_flight: int
    answers: int
    errors: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    model_p50_ms: float
    answers_per_s: float
    mean_batch: float
    tokens_out_per_s: float


class Loaded(msgspec.Struct, frozen=True, kw_only=True):
    """What it took to open the model with so many threads: seconds; MiB held by its worker before and after."""

    threads: int
    load_s: float
    idle_mb: float
    used_mb: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that one bench found; `doubts` is why its figures may not be this board's best."""

    model: str
    task: str
    format: str
    variant: str
    seconds: float
    cells: list[Cell]
    loads: list[Loaded]
    heat_before: board.Heat
    heat_after: board.Heat
    others_share: float
    doubts: list[str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.add_argument("model", metavar="MODEL", help="a model's name on this box, a folder, or a graph's file")
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="INPUT",
        help="a text or `@FILE` to ask, may be repeated\n(default: the golden samples)",
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="how long to measure in all (20)")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[], help="threads to try (default: 1 and the number of cores)"
    )
    parser.add_argument("--variant", default="", help="one of the model's variants (default: the first that fits)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    config_option(parser)


def run(options: argparse.Namespace) -> int:
    """Measure and print; 1 where the model cannot be opened or answers nothing but errors."""
    logging.getLogger("agent.workers").setLevel(logging.CRITICAL)  # what a person needs to know is said below
    try:
        report = asyncio.run(_run(options))
    except (OpenError, RequestError, OSError) as error:
        print(f"spillway: {error}", file=sys.stderr)
        return EXIT_FAILED
    print(msgspec.json.encode(report).decode() if options.json else render(report))
    return EXIT_OK


async def _run(options: argparse.Namespace) -> Report:
    config = config_if_there(options.config)
    threads = options.threads or sorted({1, board.cores()})
    if min(threads) < 1 or options.seconds <= 0:
        raise OpenError("--threads and --seconds are above 0")
    found = await find_model(options.model, config, options.variant)
    bodies = questions(found, options.input)
    heat_before, before = board.heat(), board.load()
    await asyncio.sleep(LOOK_S)
    quiet = busy_share(before, board.load(), 0.0)
    began, own_s, worker_s = board.load(), time.process_time(), 0.0
    cells: list[Cell] = []
    loads: list[Loaded] = []
    slice_s = options.seconds / len(threads) / len(IN_FLIGHT)
    for number in threads:
        async with opened(found, config, threads=number) as model:
            idle_mb = await asyncio.to_thread(model.worker.memory_mb)
            requests = [model.request(body) for body in bodies]
            await _warm(model, requests)
            cells += [await measure(model, requests, number, in_flight, slice_s) for in_flight in IN_FLIGHT]
            used_mb = await asyncio.to_thread(model.worker.memory_mb)
            worker_s += board.process_s(model.worker.pid)
        loads.append(Loaded(threads=number, load_s=model.load_s, idle_mb=idle_mb, used_mb=used_mb))
    ended, heat_after = board.load(), board.heat()
    meanwhile = busy_share(began, ended, worker_s + time.process_time() - own_s)
    return Report(
        model=found.version.label,
        task=found.manifest.task,
        format=found.manifest.format,
        variant=found.variant.name,
        seconds=options.seconds,
        cells=cells,
        loads=loads,
        heat_before=heat_before,
        heat_after=heat_after,
        others_share=round(max(quiet, meanwhile), 3),
        doubts=doubts(cells, (began, ended), (heat_before, heat_after), max(quiet, meanwhile)),
    )


def questions(found: Found, inputs: Sequence[str]) -> list[Body]:
    """Return what is asked: the given inputs, else the golden samples; raises OpenError where there are none."""
    if inputs:
        return [parse_body(kind or None, raw) for raw, kind in map(read_input, inputs)]
    golden = variant_golden(found.manifest, found.variant.name)
    if not golden:
        raise OpenError(f"{found.version.label} has no golden samples to ask: give it an --input\n{describe(found)}")
    return [parse_body(one.content_type, one.body) for one in golden]


async def _warm(model: Opened, requests: Sequence[Request]) -> None:
    """Ask everything once, and on for a moment; raises OpenError where an answer is an error."""
    ends_at = time.monotonic() + WARM_S
    first = True
    while first or time.monotonic() < ends_at:
        for request in requests:
            async with contextlib.aclosing(model.pieces(request, DEADLINE_MS)) as pieces:
                async for piece in pieces:
                    if piece.code:
                        told = f"{piece.code}: {piece.message}"
                        raise OpenError(f"{model.found.version.label} cannot be measured with this input: {told}")
        first = False


async def measure(model: Opened, requests: Sequence[Request], threads: int, in_flight: int, seconds: float) -> Cell:
    """Keep so many questions in flight for so long, each asker with its next as soon as it has an answer."""
    tally = _Tally()
    started = time.monotonic()
    asked = list(requests)
    askers = [
        asyncio.ensure_future(
            _ask(model, asked[at % len(asked) :] + asked[: at % len(asked)], tally, started + seconds)
        )
        for at in range(in_flight)
    ]
    done, late = await asyncio.wait(askers, timeout=seconds + GRACE_S)
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    for task in done:
        task.result()
    return tally.cell(threads, in_flight, max(tally.ended_at - started, 1e-9))


async def _ask(model: Opened, requests: Sequence[Request], tally: _Tally, ends_at: float) -> None:
    for request in itertools.cycle(requests):
        if time.monotonic() >= ends_at:
            return
        began = time.perf_counter()
        async with contextlib.aclosing(model.pieces(request, DEADLINE_MS)) as pieces:
            async for piece in pieces:
                if piece.final:
                    tally.add(piece, (time.perf_counter() - began) * 1e3)


class _Tally:
    """The answers of one cell."""

    def __init__(self) -> None:
        self.ms: list[float] = []
        self.inside_ms: list[float] = []
        self.batches = 0
        self.tokens = 0
        self.errors = 0
        self.ended_at = 0.0

    def add(self, piece: Piece, ms: float) -> None:
        """Take in an answer that took `ms`."""
        self.ended_at = time.monotonic()
        self.ms.append(ms)
        self.inside_ms.append(piece.compute_ms)
        self.batches += piece.batch
        self.tokens += piece.tokens_out
        self.errors += bool(piece.code)

    def cell(self, threads: int, in_flight: int, seconds: float) -> Cell:
        """Return what was measured in so many seconds."""
        return Cell(
            threads=threads,
            in_flight=in_flight,
            answers=len(self.ms),
            errors=self.errors,
            p50_ms=round(quantile(self.ms, 0.5), 3),
            p95_ms=round(quantile(self.ms, 0.95), 3),
            p99_ms=round(quantile(self.ms, 0.99), 3),
            model_p50_ms=round(quantile(self.inside_ms, 0.5), 3),
            answers_per_s=round(len(self.ms) / seconds, 1),
            mean_batch=round(self.batches / max(1, len(self.ms)), 1),
            tokens_out_per_s=round(self.tokens / seconds, 1),
        )


def busy_share(before: board.Load, after: board.Load, ours_s: float) -> float:
    """Return the share of all processors that others used between two looks. Pure."""
    total_s = max(1e-9, after.total_s - before.total_s)
    return max(0.0, min(1.0, (after.busy_s - before.busy_s - ours_s) / total_s))


def doubts(
    cells: Sequence[Cell], loads: tuple[board.Load, board.Load], heats: tuple[board.Heat, board.Heat], others: float
) -> list[str]:
    """Return why the figures may not be what this board can do. Pure."""
    told = []
    (before, after), (cool, warm) = loads, heats
    if others > BUSY_SHARE:
        told.append(f"other programs used {others:.0%} of the processors: stop them and measure again")
    stolen = (after.stolen_s - before.stolen_s) / max(1e-9, after.total_s - before.total_s)
    if stolen > BUSY_SHARE / 5:
        told.append(f"the hypervisor took {stolen:.0%} of the processors' time")
    if after.swapped > before.swapped:
        told.append("memory was swapped: the model and what else runs do not fit this board together")
    if warm.throttled:
        told.append(f"the board says: {', '.join(warm.throttled)}")
    if warm.throttle_events > cool.throttle_events:
        told.append("processors were throttled for heat meanwhile")
    if warm.celsius is not None and warm.celsius >= HOT_CELSIUS:
        told.append(f"the board has {warm.celsius:.0f} °C: it may be slower in the long run than here")
    if warm.max_mhz and warm.mhz < SLOW_CLOCK * warm.max_mhz:
        told.append(f"the clock stood at {warm.mhz} of {warm.max_mhz} MHz when it ended: look at the cpufreq governor")
    few = [f"{cell.threads}x{cell.in_flight}" for cell in cells if cell.answers < FEW]
    if few:
        told.append(f"fewer than {FEW} answers in {', '.join(few)} (threads x in flight): give it more --seconds")
    if any(cell.errors for cell in cells):
        told.append(f"{sum(cell.errors for cell in cells)} answers were errors")
    return told


def render(report: Report) -> str:
    """Return the report for people."""
    lines = [f"{report.model}: {report.task}, {report.format} {report.variant}", ""]
    lines += [table(HEADS, [_cells(cell) for cell in report.cells]), ""]
    for loaded in report.loads:
        memory = f"{loaded.idle_mb:.0f} MiB, after the work {loaded.used_mb:.0f} MiB"
        lines.append(f"{loaded.threads} threads: loaded and warm in {loaded.load_s:.2f} s; worker's memory {memory}")
    before, after = report.heat_before, report.heat_after
    if before.celsius is not None and after.celsius is not None:
        lines.append(f"temperature {before.celsius:.0f} °C before, {after.celsius:.0f} °C after")
    lines.append(f"other programs used {report.others_share:.0%} of the processors")
    lines += [f"doubt: {doubt}" for doubt in report.doubts] or ["nothing speaks against these figures"]
    return "\n".join(lines)


def _cells(cell: Cell) -> list[str]:
    return [
        str(cell.threads),
        str(cell.in_flight),
        f"{cell.p50_ms:.2f}",
        f"{cell.p95_ms:.2f}",
        f"{cell.p99_ms:.2f}",
        f"{cell.model_p50_ms:.2f}",
        f"{cell.answers_per_s:.1f}",
        f"{cell.mean_batch:.1f}",
        f"{cell.tokens_out_per_s:.0f}" if cell.tokens_out_per_s else "-",
        str(cell.answers),
    ]
