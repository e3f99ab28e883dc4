"""Opens models that may be hostile, each in a child that confines itself as a worker does, and tells how each ended.

`python -m tests.support.confined` reads JSON from standard input, a list of folders with the task, format and question
of each, and prints the list of their ends. What the runtimes need is imported before the children begin, so that a
child costs milliseconds.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from models.body import parse_body
from models.errors import ModelError, RequestError
from models.manifest import Budget, Manifest, Variant
from models.record import answer_alone
from models.request import Request
from models.sandbox import confine
from models.session import open_session
from tests.fakes.samples import sample

CPU_S = 2
WALL_S = 30
REFUSED = 3
FAILED = 4
RAISED = 5
ANSWERED = "answered"
HUNG = "hung"
EXITS = {0: ANSWERED, REFUSED: "refused", FAILED: "failed", RAISED: "raised"}
"""Exit statuses: it could not be opened; it could, and gave an error for an answer; an error that is not ours."""


class Job(msgspec.Struct):
    """A folder to open, and what to ask of it; no question asks nothing."""

    folder: str
    task: str = "tensors"
    format: str = "onnx"
    question: str = ""


class End(msgspec.Struct):
    """How a child ended: `answered`, `refused`, `failed`, `hung` or a signal's name; and its error's words."""

    end: str
    words: str
    seconds: float


def open_all(jobs: Sequence[Job]) -> list[End]:
    """Open each job's folder in a program of its own that ends before this returns."""
    program = [sys.executable, "-m", "tests.support.confined"]
    one_thread = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    told = subprocess.run(
        program, input=msgspec.json.encode(jobs), capture_output=True, check=True, timeout=120, env=one_thread
    )
    return msgspec.json.decode(told.stdout, type=list[End])


def warm_up(name: str) -> None:
    """Open an example here, which imports what opening others will take; with one thread, none is started."""
    folder, manifest = sample(name)
    open_session(folder, manifest, manifest.variants[0], threads=1, slots=1).close()


def in_child(folder: Path, manifest: Manifest, question: bytes) -> End:
    """Open a folder in a confined child, and ask it one question in JSON (empty: none)."""
    began = time.monotonic()
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        _be_the_child(folder, manifest, question, theirs)
    os.close(theirs)
    with os.fdopen(ours, "rb") as reader:
        words = reader.read(1000).decode("utf-8", "replace")
    status = os.waitpid(child, 0)[1]
    return End(_end(status), words, time.monotonic() - began)


def _end(status: int) -> str:
    if not os.WIFSIGNALED(status):
        return EXITS.get(os.WEXITSTATUS(status), f"exit {os.WEXITSTATUS(status)}")
    number = os.WTERMSIG(status)
    return HUNG if number in {signal.SIGXCPU, signal.SIGALRM} else signal.Signals(number).name


def _be_the_child(folder: Path, manifest: Manifest, question: bytes, told: int) -> None:
    status = 9
    try:
        silence = os.open("/dev/null", os.O_WRONLY)
        for descriptor in (1, 2):
            os.dup2(silence, descriptor)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 1))
        signal.alarm(WALL_S)
        lacking = confine(folder, memory_mb=manifest.budget.memory_mb)
        status, words = (8, str(lacking)) if lacking else _open(folder, manifest, question)
        os.write(told, words.encode()[:1000])
    finally:
        os._exit(status)


def _open(folder: Path, manifest: Manifest, question: bytes) -> tuple[int, str]:
    try:
        session = open_session(folder, manifest, manifest.variants[0], threads=1, slots=1)
    except (ModelError, MemoryError) as error:
        return REFUSED, str(error)
    except Exception as error:  # noqa: BLE001 - told apart, since a worker would tell it as it stands
        return RAISED, f"{type(error).__name__}: {error}"
    if not question:
        return 0, ""
    try:
        body = parse_body("application/json", question) if question.startswith(b"{") else parse_body(None, question)
    except RequestError as error:
        return FAILED, error.message
    request = Request(model="m", content_type=body.content_type, body=body.body, dialect=body.dialect)
    piece = answer_alone(session, request)
    return (FAILED, f"{piece.code}: {piece.message}") if piece.code else (0, "")


def _manifest(folder: Path, job: Job) -> Manifest:
    """Return what a session reads of a manifest; the files themselves may be too large to read."""
    files = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
    return Manifest(
        schema=1,
        name="m",
        version="1",
        task=job.task,
        format=job.format,
        variants=[Variant(name="default", files=files)],
        files=[],
        budget=Budget(memory_mb=100),
    )


def main() -> None:
    """Read the jobs, open each, and tell."""
    for name in ("digits", "digits-int8", "language"):
        warm_up(name)
    ends = []
    for job in msgspec.json.decode(sys.stdin.buffer.read(), type=list[Job]):
        folder = Path(job.folder)
        ends.append(in_child(folder, _manifest(folder, job), job.question.encode()))
    sys.stdout.buffer.write(msgspec.json.encode(ends))


if __name__ == "__main__":
    main()
