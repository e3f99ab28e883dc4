"""One variant measured in a process of its own: its answers, the time of each, and the memory that all of it took."""

from __future__ import annotations

import multiprocessing
import re
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Final

import msgspec

from models.errors import ModelError, RequestError
from models.manifest import Golden, Variant, parse_manifest
from models.record import answer_alone, golden_request
from models.session import open_session

_PSS: Final = re.compile(r"^Pss:\s+(\d+) kB", re.MULTILINE)
_LOOK_EVERY: Final = 50
_REST: Final = 20
"""Answers that are timed at least, so that a 95th percentile means something."""


class Measured(msgspec.Struct, frozen=True):
    """What a variant did: a body for each question or the error in its place, milliseconds, and MiB at the most.

    `cpu_ms` is the processor time of an answer, which tells more than `ms` where other programs run.
    """

    bodies: list[bytes]
    failures: dict[int, str]
    ms: list[float]
    cpu_ms: float
    open_ms: float
    memory_mb: float


def measure(
    folder: Path, manifest: bytes, variant: Variant, questions: Sequence[Golden], *, threads: int = 1
) -> Measured:
    """Ask a variant every question, one after the other, in a fresh process; raises ModelError."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        try:
            return pool.submit(_measure, folder, manifest, variant, list(questions), threads).result()
        except BrokenProcessPool as error:
            raise ModelError(
                f"{variant.name}: the process that answered has ended; is there too little memory?"
            ) from error


def _measure(folder: Path, raw: bytes, variant: Variant, questions: list[Golden], threads: int) -> Measured:
    manifest = parse_manifest(raw)
    try:
        requests = [golden_request(manifest, question) for question in questions]
    except RequestError as error:
        raise ModelError(f"a sample is no request: {error.message}") from error
    started = time.perf_counter()
    session = open_session(folder, manifest, variant, threads=threads, slots=1)
    answer_alone(session, requests[0])  # the first answer pays for memory and caches
    open_ms = (time.perf_counter() - started) * 1e3
    memory_mb = _pss_mb()
    bodies: list[bytes] = []
    failures: dict[int, str] = {}
    spent_ms: list[float] = []
    cpu_began = time.process_time()
    for number in range(max(len(requests), _REST)):
        began = time.perf_counter()
        piece = answer_alone(session, requests[number % len(requests)])
        spent_ms.append((time.perf_counter() - began) * 1e3)
        if number < len(requests):
            bodies.append(piece.body)
        if piece.code:
            failures[number % len(requests)] = f"{piece.code}: {piece.message}"
        if number % _LOOK_EVERY == 0:
            memory_mb = max(memory_mb, _pss_mb())
    cpu_ms = (time.process_time() - cpu_began) * 1e3 / len(spent_ms)
    memory_mb = max(memory_mb, _pss_mb())
    session.close()
    return Measured(bodies, failures, spent_ms, cpu_ms, open_ms, memory_mb)


def _pss_mb() -> float:
    """Return this process's memory in MiB, what it shares with others by its part."""
    found = _PSS.search(Path("/proc/self/smaps_rollup").read_text(encoding="ascii"))
    return int(found[1]) / 1024 if found else 0.0
