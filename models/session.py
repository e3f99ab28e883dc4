"""An artifact opened on a backend, ready to answer: batches of requests through one graph."""

from __future__ import annotations

import importlib
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec

from models.artifact import Artifact
from models.backends.face import Backend, Tensors
from models.channel import Piece
from models.errors import ModelError, RequestError, failure_of
from models.manifest import Manifest, Variant
from models.request import Dialect, Request
from models.tasks.task import Prepared, Task

MAX_TAKEN: Final = 64
"""Asks that a session holds between two steps, at most."""

_BACKENDS: Final = {"onnx": "models.backends.onnx", "tflite": "models.backends.tflite"}
_TASKS: Final = {
    "image-classification": "models.tasks.image_classification",
    "tabular-classification": "models.tasks.tabular",
    "tabular-regression": "models.tasks.tabular",
    "tensors": "models.tasks.tensors",
    "text-classification": "models.tasks.text_classification",
    "time-series-forecasting": "models.tasks.time_series_forecasting",
}
_GENERATION: Final = "models.generation.session"


class Session(Protocol):
    """What a worker drives. `count` may be called from another thread while `step` runs; nothing else may."""

    capacity: int
    context_tokens: int
    longest_token_bytes: int
    extra_tokens: int
    default_max_tokens: int

    def count(self, request: Request) -> tuple[int, int]:
        """Return (tokens of the longest input, tokens it may generate); raises RequestError."""

    @property
    def room(self) -> int:
        """How many more asks can be submitted now."""

    @property
    def busy(self) -> bool:
        """Whether a step has something to do."""

    def submit(self, ticket: int, request: Request) -> None:
        """Take a request; raises RequestError for one that is at fault."""

    def cancel(self, ticket: int) -> bool:
        """Let go of a request; False where none of that ticket is here."""

    def step(self) -> list[Piece]:
        """Run one batch, or one step of every generation, and return what there is to say."""

    def close(self) -> None:
        """Free the model."""


class _Job(msgspec.Struct):
    """A submitted request; `failure` is set once it cannot be answered."""

    ticket: int
    task: Task
    prepared: Prepared
    prepare_ms: float
    body: bytes = b""
    failure: RequestError | None = None


class BatchSession:
    """Runs what was submitted as one batch of at most `batch` items; one bad request costs only itself.

    A request of more items than that runs alone, in several batches.
    """

    default_max_tokens = 0

    def __init__(self, tasks: Mapping[Dialect, Task], backend: Backend, *, batch: int) -> None:
        self._tasks = tasks
        self._backend = backend
        self._batch = max(1, batch)
        self._jobs: deque[_Job] = deque()
        self.capacity = min(self._batch, MAX_TAKEN)
        self.context_tokens = max(task.context_tokens for task in tasks.values())
        self.longest_token_bytes = max(task.longest_token_bytes for task in tasks.values())
        self.extra_tokens = max(task.extra_tokens for task in tasks.values())

    @property
    def room(self) -> int:
        """How many more asks can be submitted before the next step."""
        return self.capacity - len(self._jobs)

    @property
    def busy(self) -> bool:
        """Whether a request waits for a step."""
        return bool(self._jobs)

    def count(self, request: Request) -> tuple[int, int]:
        """Return (tokens of the longest input, 0)."""
        return self._task(request).count(request), 0

    def submit(self, ticket: int, request: Request) -> None:
        """Check and prepare a request for the next step; raises RequestError."""
        started = time.perf_counter()
        task = self._task(request)
        prepared = task.prepare(request)
        spent_ms = (time.perf_counter() - started) * 1000
        self._jobs.append(_Job(ticket=ticket, task=task, prepared=prepared, prepare_ms=spent_ms))

    def cancel(self, ticket: int) -> bool:
        """Let go of a request that no step has taken yet."""
        kept = deque(job for job in self._jobs if job.ticket != ticket)
        found = len(kept) < len(self._jobs)
        self._jobs = kept
        return found

    def step(self) -> list[Piece]:
        """Answer one batch of the requests that wait, in order of arrival."""
        jobs = self._take()
        if not jobs:
            return []
        started = time.perf_counter()
        self._answer(jobs)
        spent_ms = (time.perf_counter() - started) * 1000
        return [_piece(job, spent_ms, len(jobs)) for job in jobs]

    def close(self) -> None:
        """Free the graph."""
        self._backend.close()

    def _task(self, request: Request) -> Task:
        task = self._tasks.get(request.dialect)
        if task is None:
            raise RequestError("bad_request", f"body: this model does not speak the {request.dialect} form")
        return task

    def _take(self) -> list[_Job]:
        """Take requests of one task from the front of the queue while their items fit one batch."""
        jobs: list[_Job] = []
        items = 0
        while self._jobs:
            job = self._jobs[0]
            items += len(job.prepared.items)
            if jobs and (items > self._batch or job.task is not jobs[0].task):
                break
            jobs.append(self._jobs.popleft())
        return jobs

    def _answer(self, jobs: Sequence[_Job]) -> None:
        """Fill in each job's body or failure; if the batch fails, each is tried alone to find whose fault it is."""
        try:
            results = self._run([item for job in jobs for item in job.prepared.items], jobs[0].task)
        except Exception as error:  # noqa: BLE001 - one request, whatever it trips over, must cost only itself
            if len(jobs) == 1:
                jobs[0].failure = failure_of(error)
                return
            for job in jobs:
                self._answer([job])
            return
        at = 0
        for job in jobs:
            mine, at = results[at : at + len(job.prepared.items)], at + len(job.prepared.items)
            _interpret(job, mine)

    def _run(self, items: Sequence[Tensors], task: Task) -> list[Tensors]:
        results: list[Tensors] = []
        for at in range(0, len(items), self._batch):
            results += task.run(items[at : at + self._batch])
        return results


def _interpret(job: _Job, results: Sequence[Tensors]) -> None:
    try:
        job.body = job.task.interpret(job.prepared, results)
    except Exception as error:  # noqa: BLE001 - as in _answer
        job.failure = failure_of(error)


def _piece(job: _Job, batch_ms: float, batch: int) -> Piece:
    spent_ms = job.prepare_ms + batch_ms
    if job.failure is not None:
        failure = job.failure
        return Piece(ticket=job.ticket, code=failure.code, message=failure.message, compute_ms=spent_ms, batch=batch)
    tokens = job.prepared.tokens
    return Piece(ticket=job.ticket, body=job.body, compute_ms=spent_ms, batch=batch, tokens_in=tokens)


def open_session(folder: Path, manifest: Manifest, variant: Variant, *, threads: int, slots: int) -> Session:
    """Open an artifact's variant with `threads` for the runtime; raises ModelError. `slots` bounds generations."""
    with Artifact(folder, variant.files) as artifact:
        if manifest.format != "genai":
            return _open_batch(artifact, manifest, threads)
        session: Session = _load(_GENERATION).open_generation(artifact, manifest, threads=threads, slots=slots)
        return session


def _open_batch(artifact: Artifact, manifest: Manifest, threads: int) -> BatchSession:
    if manifest.format not in _BACKENDS:
        raise ModelError(f"the format {manifest.format!r} has no backend")
    if manifest.task not in _TASKS:
        raise ModelError(f"the task {manifest.task!r} cannot be done with the format {manifest.format}")
    backend: Backend = _load(_BACKENDS[manifest.format]).open_backend(artifact, threads=threads)
    task: Task = _load(_TASKS[manifest.task]).build(artifact, backend, manifest)
    tensors: Task = _load(_TASKS["tensors"]).build(artifact, backend, manifest)
    tasks = {Dialect.HUGGINGFACE: task, Dialect.OPENAI: task, Dialect.OPEN_INFERENCE: tensors}
    return BatchSession(tasks, backend, batch=_batch(manifest, backend))


def _batch(manifest: Manifest, backend: Backend) -> int:
    """Return the most items of one run: the manifest's, or the graph's own where it is fixed."""
    sizes = {spec.shape[0] for spec in backend.inputs if spec.shape}
    fixed = [size for size in sizes if size is not None]
    if not fixed or manifest.task == "tensors":
        return manifest.limits.batch
    if fixed != [1]:
        raise ModelError(f"the graph's batch is fixed to {min(fixed)}; it must be free or 1")
    return 1


def _load(module: str) -> Any:
    """Import a module by name, so that nobody needs the runtimes of formats that he does not open."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ModelError(f"a runtime is not installed: {error}") from error
