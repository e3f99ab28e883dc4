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
from models.backend_settings import BackendSettings
from models.backends.face import CARRIED, Backend, Tensors
from models.channel import Piece
from models.errors import ModelError, RequestError, failure_of
from models.manifest import Manifest, Variant
from models.request import Dialect, Request
from models.tasks.task import Prepared, Task

MAX_PADDED: Final = 8
"""Tokens of padding that are taken for the sake of a larger batch; a quarter of the longest text where that is more."""
MAX_BATCH_TOKENS: Final = 1024
"""Tokens of one run, padding included: beyond, an encoder's data leave the processor's caches, each text takes longer
and the runtime keeps memory that it does not need otherwise."""
MAX_TAKEN: Final = 64
"""Asks that a session holds between two steps, at most."""

_BACKENDS: Final = {"onnx": "models.backends.onnx", "tflite": "models.backends.tflite"}
_TASKS: Final = {
    "audio-classification": "models.tasks.audio_classification",
    "automatic-speech-recognition": "models.tasks.automatic_speech_recognition",
    "image-classification": "models.tasks.image_classification",
    "image-segmentation": "models.tasks.image_segmentation",
    "object-detection": "models.tasks.object_detection",
    "feature-extraction": "models.tasks.feature_extraction",
    "question-answering": "models.tasks.question_answering",
    "tabular-classification": "models.tasks.tabular",
    "tabular-regression": "models.tasks.tabular",
    "tensors": "models.tasks.tensors",
    "text-classification": "models.tasks.text_classification",
    "time-series-forecasting": "models.tasks.time_series_forecasting",
    "token-classification": "models.tasks.token_classification",
}
_AS_SHIPPED: Final = BackendSettings()
_GENERATION: Final = "models.generation.session"
_SEQ2SEQ: Final = "models.generation.seq2seq"
_SEQ2SEQ_TASKS: Final = frozenset({"summarization", "translation"})


class Session(Protocol):
    """What a worker drives. `count` may be called from another thread while `step` runs; nothing else may."""

    capacity: int
    context_tokens: int
    longest_token_bytes: int
    extra_tokens: int
    default_max_tokens: int
    fallbacks: Sequence[str]

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
    length: int = 0
    """Tokens of one of its items, about; 0 where none are counted."""
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
        self.fallbacks = backend.fallbacks

    @property
    def room(self) -> int:
        """How many more asks can be submitted before the next step."""
        # Of texts more than a batch is looked at, to run together what is of one length.
        return self.capacity * (2 if self.context_tokens else 1) - len(self._jobs)

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
        length = prepared.tokens // max(1, len(prepared.items))
        self._jobs.append(_Job(ticket=ticket, task=task, prepared=prepared, prepare_ms=spent_ms, length=length))

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
        """Take the first request and others of its task whose items fit one batch, those nearest to its length.

        The shorter of a batch are padded to its longest, which costs as much as if they were so long.
        """
        if not self._jobs:
            return []
        first = self._jobs[0]
        near = sorted(self._jobs, key=lambda job: abs(job.length - first.length))
        chosen: list[_Job] = []
        items, shortest, longest = 0, first.length, first.length
        for job in near:
            items += len(job.prepared.items)
            low, high = min(shortest, job.length), max(longest, job.length)
            full = items > self._batch or items * high > MAX_BATCH_TOKENS
            if chosen and (full or high - low > max(MAX_PADDED, high // 4)):
                break
            if job.task is not first.task:
                items -= len(job.prepared.items)
                continue
            chosen.append(job)
            shortest, longest = low, high
        taken = {id(job) for job in chosen}
        jobs = [job for job in self._jobs if id(job) in taken]
        self._jobs = deque(job for job in self._jobs if id(job) not in taken)
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
    return Piece(
        ticket=job.ticket,
        body=job.body,
        content_type=job.prepared.content_type,
        compute_ms=spent_ms,
        batch=batch,
        tokens_in=tokens,
    )


def open_session(
    folder: Path,
    manifest: Manifest,
    variant: Variant,
    *,
    threads: int,
    slots: int,
    backends: BackendSettings = _AS_SHIPPED,
) -> Session:
    """Open an artifact's variant with `threads` for the runtime; raises ModelError. `slots` bounds generations."""
    with Artifact(folder, variant.files) as artifact:
        if manifest.task in _SEQ2SEQ_TASKS and manifest.format == "onnx":
            return _open_seq2seq(artifact, manifest, threads, slots, backends)
        if manifest.format != "genai" and (manifest.format, manifest.task) != ("onnx", "text-generation"):
            return _open_batch(artifact, manifest, threads, backends)
        session: Session = _load(_GENERATION).open_generation(artifact, manifest, threads=threads, slots=slots)
        return session


def open_graph(
    artifact: Artifact, model_format: str, *, threads: int, backends: BackendSettings = _AS_SHIPPED
) -> Backend:
    """Open an artifact's graph on its format's runtime; raises ModelError."""
    if model_format not in _BACKENDS:
        raise ModelError(f"the format {model_format!r} has no backend")
    settings = backends.onnx if model_format == "onnx" else backends.tflite
    backend: Backend = _load(_BACKENDS[model_format]).open_backend(artifact, threads=threads, settings=settings)
    return backend


def _open_seq2seq(
    artifact: Artifact, manifest: Manifest, threads: int, slots: int, backends: BackendSettings
) -> Session:
    def opened(path: str) -> Backend:
        backend: Backend = _load(_BACKENDS["onnx"]).open_backend(
            artifact, threads=threads, settings=backends.onnx, graph=path
        )
        return backend

    session: Session = _load(_SEQ2SEQ).open_seq2seq(artifact, manifest, opened, slots=slots)
    return session


def _open_batch(artifact: Artifact, manifest: Manifest, threads: int, backends: BackendSettings) -> BatchSession:
    if manifest.task not in _TASKS:
        raise ModelError(f"the task {manifest.task!r} cannot be done with the format {manifest.format}")
    return batch_session(artifact, manifest, open_graph(artifact, manifest.format, threads=threads, backends=backends))


def batch_session(artifact: Artifact, manifest: Manifest, backend: Backend) -> BatchSession:
    """Return a session on an opened graph; raises ModelError where the task does not fit it."""
    _check_types(backend)
    try:
        task: Task = _load(_TASKS[manifest.task]).build(artifact, backend, manifest)
    except (LookupError, TypeError, ValueError) as error:  # what a task stumbles over that the graph has not
        raise ModelError(f"the graph does not fit the task {manifest.task!r}: {str(error)[:200]}") from error
    tensors: Task = _load(_TASKS["tensors"]).build(artifact, backend, manifest)
    tasks = {Dialect.HUGGINGFACE: task, Dialect.OPENAI: task, Dialect.OPEN_INFERENCE: tensors}
    return BatchSession(tasks, backend, batch=_batch(manifest, backend))


def _check_types(backend: Backend) -> None:
    """Refuse a graph with an input or output that no request or answer can carry."""
    for kind, specs in (("input", backend.inputs), ("output", backend.outputs)):
        for spec in specs:
            if spec.dtype not in CARRIED:
                remedy = "; convert it with options={'zipmap': False}" if "map(" in spec.dtype else ""
                raise ModelError(f"{kind} {spec.name[:80]!r}: no request can carry {spec.dtype}{remedy}")


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
