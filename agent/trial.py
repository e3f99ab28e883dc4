"""What a new version must show on this box before requests move to it: its golden samples, in time and in memory."""

from __future__ import annotations

import asyncio

from agent.workers import ENDED, Worker
from models.body import parse_body
from models.channel import Piece
from models.errors import ModelError
from models.evaluate import Answered, judge
from models.manifest import Golden, parse_manifest
from models.request import Request

TIMEOUT_MS = 60_000.0


async def run_trial(worker: Worker) -> list[Piece]:
    """Let a started worker answer its golden samples; return the answers, or raise ModelError naming what failed."""
    manifest = parse_manifest(worker.version.manifest)
    answers = []
    for golden in manifest.golden:
        await _sample(worker, golden)  # once to warm, once to measure
        answers.append((golden, await _sample(worker, golden)))
    memory_mb = await asyncio.to_thread(worker.memory_mb)
    verdict = judge(manifest, [_answered(golden, piece) for golden, piece in answers], memory_mb)
    if not verdict.passed:
        raise ModelError("; ".join(verdict.problems))
    return [piece for _, piece in answers]


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
