"""Text generation against the best runtimes on the same weights, interleaved: `make bench-generation`.

Speed of one stream and of eight, time to first token of 512, and what a known beginning of 448 tokens saves. Every
figure is a median over rounds in which each runtime had its turn; a ratio is the median of the rounds' own ratios, so
that what else the machine did weighs on both sides. `--processor` counts processor time in place of the clock, for a
machine that has other work. Run by the Python of the benchmark's own environment, which has the peers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import string
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from bench.generation_peers.peers import GenaiEngine, GenaiGenerator, Llama, Peer, PlainLoop, Timing, genai_model
from models.body import parse_body
from models.manifest import FileEntry, Limits, Manifest, Variant
from models.request import Request
from models.session import Session, open_session
from models.tokens import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
STREAMS = 8
SHORT, LONG, KNOWN = 16, 512, 448
MINUTE_TOKENS = 64


class Spillway:
    """A session as its worker drives it: requests in, streamed pieces out."""

    name = "Spillway"

    def __init__(self, folder: Path, threads: int, context: int) -> None:
        self._session = open_whole(folder, threads=threads, slots=STREAMS, context=context)
        self._ticket = 0

    def write(self, texts: Sequence[str], count: int) -> Timing:
        timing = Timing()
        for text in texts:
            self._ticket += 1
            self._session.submit(self._ticket, request_of(text, count))
        firsts: set[int] = set()
        made = early = 0
        while self._session.busy:
            for piece in self._session.step():
                if piece.code:
                    raise RuntimeError(piece.message)
                made += piece.final and piece.tokens_out
                firsts.add(piece.ticket)
                if len(firsts) == len(texts) and not early:
                    timing.first()
                    early = 1
        return timing.end(made - len(texts))


def open_whole(folder: Path, *, threads: int, slots: int, context: int) -> Session:
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    entries = [FileEntry(name, (folder / name).stat().st_size, hashlib.sha256(b"").hexdigest(), []) for name in files]
    manifest = Manifest(
        schema=1,
        name="bench",
        version="1",
        task="text-generation",
        format="genai",
        variants=[Variant("default", files)],
        files=entries,
        limits=Limits(context_tokens=context),
    )
    return open_session(folder, manifest, manifest.variants[0], threads=threads, slots=slots)


def request_of(text: str, count: int) -> Request:
    parameters = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    body = parse_body(None, json.dumps({"inputs": text, "parameters": parameters}).encode())
    return Request(model="bench", content_type=body.content_type, body=body.body, dialect=body.dialect, stream=True)


class Board:
    """Figures by row and runtime, in the order of the rounds."""

    def __init__(self) -> None:
        self._figures: dict[str, dict[str, list[float]]] = {}

    def add(self, row: str, name: str, figure: float) -> None:
        self._figures.setdefault(row, {}).setdefault(name, []).append(figure)

    def median(self, row: str, name: str) -> float:
        return statistics.median(self._figures[row][name])

    def names(self, row: str) -> list[str]:
        return list(self._figures[row])

    def ratio(self, row: str, name: str, other: str) -> float:
        """Return the median of name / other, round by round."""
        pairs = zip(self._figures[row][name], self._figures[row][other], strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)

    @property
    def rows(self) -> list[str]:
        return list(self._figures)


def letters(count: int) -> str:
    return "".join(random.choices(string.ascii_letters, k=count))


def measure(board: Board, ours: Spillway, peers: Sequence[Peer], tokenizer: Tokenizer, *, processor: bool) -> None:
    """One round of every row, the runtimes in turn."""

    def both(row: str, texts: list[str], count: int, *, first: bool) -> None:
        prompts = [tokenizer.encode(text).ids for text in texts]
        runs: list[tuple[str, Callable[[], Timing]]] = [(ours.name, partial(ours.write, texts, count))]
        runs += [(peer.name, partial(peer.write, prompts, count)) for peer in peers]
        random.shuffle(runs)
        for name, run in runs:
            timing = run()
            if first:
                board.add(row, name, 1000 * (timing.cpu_first_s if processor else timing.first_s))
            else:
                board.add(row, name, timing.cpu_rate if processor else timing.rate)

    both("1 stream, tokens/s", [letters(SHORT)], MINUTE_TOKENS, first=False)
    both(f"{STREAMS} streams, tokens/s", [letters(SHORT) for _ in range(STREAMS)], MINUTE_TOKENS, first=False)
    both(f"first token of {LONG}, ms", [letters(LONG)], 1, first=True)


def measure_known(board: Board, ours: Spillway, *, processor: bool) -> None:
    """The next turn of a conversation, and another asker's prompt with the same beginning, against computing anew."""

    def first_ms(text: str, count: int = 1) -> float:
        timing = ours.write([text], count)
        return 1000 * (timing.cpu_first_s if processor else timing.first_s)

    shared = letters(KNOWN)
    anew = first_ms(shared + letters(LONG - KNOWN))
    board.add("shared prefix, ms", "anew", anew)
    board.add("shared prefix, ms", "known", first_ms(shared + letters(LONG - KNOWN)))
    turn = letters(KNOWN)
    first_ms(turn, 8)
    board.add("next turn, ms", "anew", anew)
    board.add("next turn, ms", "known", first_ms(turn + letters(LONG - KNOWN)))


def show(board: Board, form: str) -> None:
    print(f"\n| {form} | " + " | ".join(NAMES) + " | best runtime's part reached | llama.cpp's part reached |")
    print("|---|" + "---|" * (len(NAMES) + 2))
    for row in board.rows:
        if "known" in board.names(row):
            continue
        cells = [f"{board.median(row, name):.1f}" for name in NAMES]
        slow = row.endswith("ms")
        pick = min if slow else max
        best = pick((name for name in NAMES[1:4]), key=lambda name: board.median(row, name))
        parts = [
            board.ratio(row, *((name, "Spillway") if slow else ("Spillway", name))) for name in (best, "llama.cpp")
        ]
        print(f"| {row} | " + " | ".join(cells) + f" | {parts[0]:.2f} of {best} | {parts[1]:.2f} |")
    for row in board.rows:
        if "known" in board.names(row):
            part = board.ratio(row, "known", "anew")
            print(
                f"\n{form}, {row}: {board.median(row, 'known'):.1f} of {board.median(row, 'anew'):.1f} anew: {part:.2f}"
            )


NAMES = ["Spillway", "genai Generator", "genai Engine", "plain onnxruntime loop", "llama.cpp"]


def make_models(folder: Path) -> dict[str, int]:
    made = folder / "made.json"
    if not made.exists():
        subprocess.run([sys.executable, ROOT / "bench" / "generation_peers" / "make_models.py", folder], check=True)
    facts: dict[str, int] = json.loads(made.read_text(encoding="utf-8"))
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, default=ROOT / ".run" / "bench-generation")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processor", action="store_true", help="count processor time, not the clock's")
    parser.add_argument("--long", action="store_true", help="15 rounds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--forms", nargs="+", default=["int4", "float32"])
    options = parser.parse_args()
    facts = make_models(options.models)
    for form in options.forms:
        folder = options.models / form
        tokenizer = Tokenizer((folder / "tokenizer.json").read_bytes())
        context = facts["context"]
        ours = Spillway(folder, options.threads, context)
        model = genai_model(folder, options.threads, STREAMS)
        peers: list[Peer] = [
            GenaiGenerator(model),
            GenaiEngine(model),
            PlainLoop(folder, options.threads, STREAMS, context),
            Llama(options.models / f"{form}.gguf", options.threads, STREAMS, context, facts["vocabulary"]),
        ]
        board = Board()
        for number in range(1 + (15 if options.long else options.rounds)):
            board = Board() if number == 1 else board  # the first round warms up
            measure(board, ours, peers, tokenizer, processor=options.processor)
            measure_known(board, ours, processor=options.processor)
            time.sleep(0.2)
        show(board, f"{form}, {options.threads} threads, {'processor' if options.processor else 'clock'}")


if __name__ == "__main__":
    main()
