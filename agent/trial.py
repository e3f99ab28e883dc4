"""What a new version must show on this box before requests move to it: its golden samples, in time and in memory.

What else runs on a box can only add to a time, never take from it; so a version that is over its budget is measured
again, and the best of three rounds counts.
"""

from __future__ import annotations

import asyncio
import itertools
import time

import msgspec

from agent.versions import Installed
from agent.workers import ENDED, Worker
from models.body import parse_body
from models.channel import Piece
from models.errors import ModelError
from models.evaluate import Answered, judge_answer, judge_cost, quantile
from models.manifest import Golden
from models.request import Request

TIMEOUT_MS = 60_000.0
ROUNDS = 3
ROUND_ANSWERS = 20
ROUND_S = 2.0


class Trial(msgspec.Struct, frozen=True):
    """What a version that passed has shown: its answers, and what they cost."""

    pieces: list[Piece]
    p95_ms: float
    memory_mb: float


async def run_trial(worker: Worker, installed: Installed) -> Trial:
    """Let a started worker answer its golden samples; raises ModelError naming each thing that is wrong."""
    problems: list[str] = []
    for number, golden in enumerate(installed.golden):
        problem = judge_answer(installed.task, _answered(golden, await _sample(worker, golden)))
        problems += [f"golden[{number}]: {problem}"] if problem is not None else []
    pieces = await timed(worker, installed.golden) if not problems else []
    p95_ms = _p95_ms(pieces)
    for _ in range(1, ROUNDS):
        if judge_cost(installed.budget, p95_ms, 0.0):
            pieces = await timed(worker, installed.golden)
            p95_ms = min(p95_ms, _p95_ms(pieces))
    memory_mb = await asyncio.to_thread(worker.memory_mb)
    problems += judge_cost(installed.budget, p95_ms, memory_mb)
    if problems:
        raise ModelError("; ".join(problems))
    return Trial(pieces, p95_ms, memory_mb)


async def timed(worker: Worker, samples: list[Golden]) -> list[Piece]:
    """Ask each golden question at least once and go round while there is time; return the answers."""
    pieces: list[Piece] = []
    ends_at = time.monotonic() + ROUND_S
    for golden in itertools.cycle(samples):
        pieces.append(await _sample(worker, golden))
        enough = len(pieces) >= ROUND_ANSWERS or time.monotonic() >= ends_at
        if enough and len(pieces) >= len(samples):
            break
    return pieces


def _p95_ms(pieces: list[Piece]) -> float:
    return quantile([piece.compute_ms for piece in pieces], 0.95)


async def _sample(worker: Worker, golden: Golden) -> Piece:
    """Ask one golden question; raises ModelError where nothing comes back."""
    done: asyncio.Future[Piece] = asyncio.get_running_loop().create_future()

    def on_piece(piece: Piece) -> None:
        if piece.final and not done.done():
            done.set_result(piece)

    body = parse_body(golden.content_type, golden.body)
    request = Request(model=worker.version.name, content_type=body.content_type, body=body.body, dialect=body.dialect)
    worker.ask(request, TIMEOUT_MS, on_piece)
    try:
        async with asyncio.timeout(TIMEOUT_MS / 1e3):
            piece = await done
    except TimeoutError as error:
        raise ModelError(f"a golden sample had no answer within {TIMEOUT_MS / 1e3:.0f} s") from error
    if piece.code == ENDED:
        raise ModelError(f"the worker ended over a golden sample: {piece.message}")
    return piece


def _answered(golden: Golden, piece: Piece) -> Answered:
    return Answered(golden=golden, body=piece.body, ms=piece.compute_ms, code=piece.code, message=piece.message)
