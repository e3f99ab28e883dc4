"""`spillway-fleet evaluate`: each variant on a labelled set, side by side: how right, how fast, how large."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from cloud_sync.fleet.dataset import Sample, load_samples
from cloud_sync.fleet.description import Gate
from cloud_sync.fleet.errors import FleetError
from cloud_sync.fleet.gate import Judged, refusals
from cloud_sync.fleet.plot import plot
from cloud_sync.fleet.prepare import Staged, build_manifest, stage
from cloud_sync.fleet.progress import Progress
from cloud_sync.fleet.source import Source, read_source
from models.accuracy import score
from models.errors import ModelError
from models.evaluate import quantile
from models.manifest import Manifest, Variant, manifest_bytes
from models.measure import Measured, measure


class Trying(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be evaluated, and how."""

    path: Path
    data: Path
    task: str = ""
    variants: Sequence[str] = ()
    max_drop: float | None = None
    plot: Path | None = None
    threads: int = 1


def evaluate(trying: Trying, progress: Progress) -> dict[str, Any]:
    """Measure every variant of a folder; `refused` names those under the gate. Raises FleetError."""
    source = read_source(trying.path, task=trying.task, variants=trying.variants)
    with tempfile.TemporaryDirectory(prefix="spillway-") as work:
        staged = stage(source, Path(work))
        manifest = build_manifest(source, staged, "model", "1")
        judged = judge(staged, manifest, trying.data, threads=trying.threads, progress=progress)
    if trying.plot is not None:
        trying.plot.write_text(plot(judged, manifest.task), encoding="utf-8")
    return {
        "task": manifest.task,
        "data": str(trying.data),
        "samples": judged[0].samples,
        "machine": platform.machine(),
        "threads": trying.threads,
        "variants": {one.name: told(one) for one in judged},
        "refused": refusals(judged, gate_of(source, trying.max_drop), manifest.budget),
    }


def judge(staged: Staged, manifest: Manifest, data: Path, *, threads: int, progress: Progress) -> list[Judged]:
    """Return what each variant of staged files scored and cost; raises FleetError."""
    samples = load_samples(data, labelled=True)
    judged = []
    with progress.bar("evaluating", len(manifest.variants)) as advance:
        for variant in manifest.variants:
            judged.append(_judge(staged, manifest, variant, samples, threads))
            advance(1)
    return judged


def gate_of(source: Source, max_drop: float | None) -> Gate:
    """Return the folder's gate, with what was asked for on the command line in place of its own."""
    gate = source.description.gate
    return gate if max_drop is None else msgspec.structs.replace(gate, max_drop=max_drop)


def told(one: Judged) -> dict[str, Any]:
    """Return a variant's figures by name, rounded to what they are good for."""
    figures: dict[str, Any] = dict(one.scores)
    figures |= {"p50_ms": round(one.p50_ms, 2), "p95_ms": round(one.p95_ms, 2), "cpu_ms": round(one.cpu_ms, 2)}
    figures |= {"open_ms": round(one.open_ms), "memory_mb": round(one.memory_mb), "bytes": one.bytes}
    return figures | ({"failed": one.failed} if one.failed else {})


def _judge(staged: Staged, manifest: Manifest, variant: Variant, samples: Sequence[Sample], threads: int) -> Judged:
    questions = [sample.question for sample in samples]
    try:
        measured = measure(staged.folder, manifest_bytes(manifest), variant, questions, threads=threads)
        answered = [(at, sample) for at, sample in enumerate(samples) if at not in measured.failures]
        if not answered:
            raise ModelError(f"no sample was answered: {next(iter(measured.failures.values()))}")
        pairs = [(_outputs(measured, at), sample.label) for at, sample in answered]
        scores = score(manifest.task, pairs)
    except ModelError as error:
        raise FleetError(f"variant {variant.name}: {error}") from error
    return Judged(
        name=variant.name,
        bytes=sum((staged.folder / path).stat().st_size for path in variant.files),
        scores=scores,
        samples=len(samples),
        failed=len(measured.failures),
        p50_ms=quantile(measured.ms, 0.5),
        p95_ms=quantile(measured.ms, 0.95),
        cpu_ms=measured.cpu_ms,
        open_ms=measured.open_ms,
        memory_mb=measured.memory_mb,
    )


def _outputs(measured: Measured, at: int) -> Any:
    """Return an answer in the task's own shape, whichever form it was asked in."""
    body = msgspec.json.decode(measured.bodies[at], type=dict[str, Any])
    if "choices" in body:
        return [{"generated_text": body["choices"][0]["message"]["content"]}]
    return body["outputs"]
