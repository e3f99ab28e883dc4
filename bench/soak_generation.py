"""Sixteen askers at one generating worker, thirty seconds or ten minutes long: `make bench-soak-generation`.

Each asks again as soon as he has his answer; some prompts share a beginning, some are long, one asker in eight turns
away in the middle. Exits 1 where an asker gets less than half of what all get on average, where a stream has a gap or
a piece too much (its text must be the one that the same question gave first), or where the worker's memory grows.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

from models.body import parse_body
from models.channel import Ask, Cancel, Piece
from models.request import Request
from tests.fakes.samples import manifest_of
from tests.fakes.worker_process import WorkerProcess

ROOT = Path(__file__).resolve().parent.parent
ASKERS = 16
SLOTS = 8
LEAST_SHARE = 0.5
MOST_GROWTH = 1.1
QUIT_SHARE = 0.125
MODEL = ROOT / "tests" / "reference" / "recorded" / "llama-genai"
SHARED = "You answer questions about commands in plain and short words. " * 3


def question(number: int) -> Request:
    """One of a few hundred questions; their answers are the same each time, since the model is one of float32."""
    chance = random.Random(number)
    text = SHARED * (chance.random() < 0.5) + "What does ls do? " * chance.choice([1, 1, 2, 8]) + f"Number {number}."
    length = chance.choice([8, 24, 64])
    parameters = {"max_new_tokens": length, "min_new_tokens": length, "temperature": 1.0, "seed": number}
    parsed = parse_body(None, json.dumps({"inputs": text, "parameters": parameters}).encode())
    return Request(model="m", content_type=parsed.content_type, body=parsed.body, dialect=parsed.dialect, stream=True)


class Asker:
    """What one asker has got; his ticket changes with each question."""

    def __init__(self, number: int, chance: random.Random) -> None:
        self.number = number
        self.chance = chance
        self.asked = 0
        self.text = ""
        self.pieces = 0
        self.quits = False
        self.tokens = 0
        self.answers = 0

    def next(self) -> int:
        """Choose the next question."""
        self.asked = self.chance.randrange(200)
        self.text, self.pieces = "", 0
        self.quits = self.chance.random() < QUIT_SHARE
        return self.asked


class Soak:
    """The askers, the worker between them, and what went wrong."""

    def __init__(self, worker: WorkerProcess, seed: int) -> None:
        self._worker = worker
        self._owners: dict[int, Asker] = {}
        self._ticket = 0
        self._first: dict[int, str] = {}
        self.askers = [Asker(number, random.Random(f"{seed} {number}")) for number in range(ASKERS)]
        self.problems: list[str] = []

    def ask(self, asker: Asker) -> None:
        self._ticket += 1
        self._owners[self._ticket] = asker
        self._worker.send(Ask(self._ticket, question(asker.next()), 1e9))

    def take(self, *, more: bool) -> None:
        """Take one piece; an asker who has his answer asks again while `more`."""
        piece = self._worker.receive()
        assert isinstance(piece, Piece)
        asker = self._owners[piece.ticket]
        if piece.code not in {"", "cancelled"}:
            self.problems.append(f"asker {asker.number}: {piece.code}: {piece.message}")
        elif not piece.code:
            self._read(asker, piece)
        if piece.final:
            del self._owners[piece.ticket]
            if not piece.code:
                self._judge(asker)
            asker.tokens += piece.tokens_out
            if more:
                self.ask(asker)
        elif asker.quits and asker.pieces == 3:
            self._worker.send(Cancel(piece.ticket))

    @property
    def open(self) -> bool:
        return bool(self._owners)

    def _read(self, asker: Asker, piece: Piece) -> None:
        asker.pieces += 1
        asker.text += json.loads(piece.body)["outputs"]["generated_text"]

    def _judge(self, asker: Asker) -> None:
        asker.answers += 1
        if asker.text != self._first.setdefault(asker.asked, asker.text):
            self.problems.append(f"question {asker.asked}: {asker.text!r} after {self._first[asker.asked]!r}")


def memory_kb(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--long", action="store_true", help="ten minutes in place of thirty seconds")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    duration_s = 600.0 if options.long else 30.0
    manifest = manifest_of(MODEL, {"task": "text-generation", "format": "genai"})
    with WorkerProcess() as worker:
        worker.open(MODEL, manifest, threads=2, slots=SLOTS)
        soak = Soak(worker, options.seed)
        for asker in soak.askers:
            soak.ask(asker)
        began = time.monotonic()
        samples: list[int] = []
        while (spent_s := time.monotonic() - began) < duration_s:
            soak.take(more=True)
            if spent_s > duration_s / 3 + len(samples) * duration_s / 30:
                samples.append(memory_kb(worker.process.pid))
        while soak.open:
            soak.take(more=False)
    sys.exit(report(soak, samples, duration_s))


def report(soak: Soak, samples: list[int], duration_s: float) -> int:
    """Print what was found; return the exit code."""
    tokens = [asker.tokens for asker in soak.askers]
    share = min(tokens) / statistics.mean(tokens)
    third = max(1, len(samples) // 3)
    growth = statistics.median(samples[-third:]) / statistics.median(samples[:third])
    rows = [
        (f"answers in {duration_s:.0f} s", f"{sum(asker.answers for asker in soak.askers)}", ""),
        ("tokens/s of all", f"{sum(tokens) / duration_s:.0f}", ""),
        ("slowest asker, of the mean", f"{share:.2f}", f"at least {LEAST_SHARE}"),
        ("answers that differ from the first to the same question, errors", f"{len(soak.problems)}", "0"),
        (
            "worker's memory, last third against the first, MiB",
            f"{samples[-1] / 1024:.0f}, {growth:.2f} times",
            f"at most {MOST_GROWTH}",
        ),
    ]
    print("| 16 askers, 8 slots, a small Llama of float32 | figure | limit |\n|---|---|---|")
    print(*(f"| {what} | {figure} | {limit} |" for what, figure, limit in rows), sep="\n")
    print(*soak.problems[:10], sep="\n")
    return int(share < LEAST_SHARE or bool(soak.problems) or growth > MOST_GROWTH)


if __name__ == "__main__":
    main()
