"""A model's files made ready to be packed: weights laid out, golden answers recorded, the manifest written."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from cloud_sync.fleet.description import BACKENDS, TO_BE_FOUND, Question, question
from cloud_sync.fleet.errors import FleetError
from cloud_sync.fleet.samples import OUR_TEXTS, default_questions, tolerance_of
from cloud_sync.fleet.source import Source
from models.errors import ModelError
from models.manifest import (
    SCHEMA,
    FileEntry,
    Golden,
    Limits,
    Manifest,
    ManifestError,
    Variant,
    digest_of,
    manifest_bytes,
    parse_manifest,
)
from models.optimize.graphs import GraphError
from models.optimize.layout import WORTH_BYTES, Laid, lay_out
from models.record import graph_inputs, record_golden

NO_GOLDEN: Final = "none"
_SUFFIXES: Final = {
    ".json": "application/json",
    ".txt": "text/plain",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".wav": "audio/wav",
}
_BY_SHAPE: Final = frozenset({"tensors", "tabular-classification", "tabular-regression", "time-series-forecasting"})
_BASE_MB: Final = 64
"""What a worker takes without weights, about; and weights take more than their bytes once they are packed to be run."""
_WEIGHT_SHARE: Final = 1.3
_FREE_SHARE: Final = 1.1
_EMPTY: Final = digest_of(b"")


class Staged(msgspec.Struct, frozen=True):
    """Files ready to be packed: `paths` of `folder`, and the files of each variant."""

    folder: Path
    paths: list[str]
    variants: list[Variant]


def stage(source: Source, work: Path) -> Staged:
    """Lay large weights out beside their graphs, in a copy under `work` where any has to move; raises FleetError."""
    graphs = [path for path in source.paths if path.endswith(".onnx") and _is_large(source, path)]
    files = {variant.name: list(variant.files) for variant in source.description.variants}
    folder = source.folder
    if graphs:
        folder = work / "staged"
        _check_room(source, work)
        laid = {path: _lay_out(source, path, folder) for path in graphs}
        files = {name: _with_moved(paths, laid) for name, paths in files.items()}
        _copy_rest(source, folder, files)
    variants = [Variant(variant.name, files[variant.name], variant.requires) for variant in source.description.variants]
    return Staged(
        folder, sorted({path for paths in files.values() for path in paths}), _complete(source, variants, folder)
    )


def build_manifest(source: Source, staged: Staged, name: str, version: str) -> Manifest:
    """Return the manifest of staged files, yet without their frames and golden samples; raises FleetError."""
    description = source.description
    manifest = Manifest(
        schema=SCHEMA,
        name=name,
        version=version,
        task=description.task,
        format=description.format,
        variants=staged.variants,
        files=[FileEntry(path, 0, _EMPTY, []) for path in staged.paths],
        limits=description.limits or Limits(),
        budget=description.budget,
        provenance=description.provenance,
    )
    try:
        parse_manifest(manifest_bytes(manifest))
    except ManifestError as error:
        raise FleetError(f"{name}@{version}: {error}") from error
    return manifest


def record(source: Source, staged: Staged, manifest: Manifest, given: Sequence[str], *, threads: int) -> Manifest:
    """Return the manifest with golden answers as each variant gives them on this machine; raises FleetError."""
    questions = [] if list(given) == [NO_GOLDEN] else _questions(source, staged, manifest, given)
    if not questions:
        return manifest
    recorded: list[Golden] = []
    for variant in manifest.variants:
        of = [variant.name] if len(manifest.variants) > 1 else []
        try:
            answered = _answered(staged, manifest, variant, questions, threads)
        except ModelError as error:
            raise FleetError(_not_answered(manifest, variant.name, str(error), source)) from error
        recorded += [_settled(golden, manifest.task, variant.name, manifest.format, of) for golden in answered]
    return msgspec.structs.replace(manifest, golden=recorded)


def _answered(
    staged: Staged, manifest: Manifest, variant: Variant, questions: list[Golden], threads: int
) -> list[Golden]:
    """Return the questions with a variant's answers; of our own, the first alone where the others are too long."""
    asked = msgspec.structs.replace(manifest, golden=questions)
    try:
        return record_golden(staged.folder, asked, variant, threads=threads)
    except ModelError as error:
        if "too_large" not in str(error) or any(golden.body not in OUR_TEXTS for golden in questions):
            raise
    asked = msgspec.structs.replace(manifest, golden=questions[:1])
    return record_golden(staged.folder, asked, variant, threads=threads)


def _settled(golden: Golden, task: str, variant: str, model_format: str, of: list[str]) -> Golden:
    """Return a recorded sample of its variants, with a tolerance where none was given."""
    if golden.tolerance >= 0:
        return msgspec.structs.replace(golden, variants=of)
    precision = "quantized" if model_format == "tflite" else variant
    return msgspec.structs.replace(golden, variants=of, tolerance=tolerance_of(golden.expected, precision, task))


def _questions(source: Source, staged: Staged, manifest: Manifest, given: Sequence[str]) -> list[Golden]:
    """Return what is to be asked."""
    described = [question(source.folder, asked) for asked in source.description.golden]
    described += [_from_file(Path(path)) for path in given]
    if described or source.described:
        return described
    return default_golden(source, staged, manifest)


def default_golden(source: Source, staged: Staged, manifest: Manifest) -> list[Golden]:
    """Return golden questions that fit the task, their answers and tolerances still to be found; raises FleetError."""
    try:
        by_shape = manifest.task in _BY_SHAPE
        inputs = graph_inputs(staged.folder, manifest, staged.variants[0]) if by_shape else []
    except ModelError as error:
        raise FleetError(f"{manifest.name}@{manifest.version}: {error}") from error
    chats = "chat_template" in source.clues.tokenizer or "chat_template.jinja" in staged.paths
    return [
        msgspec.structs.replace(golden, tolerance=TO_BE_FOUND)
        for golden in default_questions(manifest.task, inputs, chats=chats)
    ]


def _from_file(path: Path) -> Golden:
    kind = _SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise FleetError(f"--golden {path}: is none of {', '.join(_SUFFIXES)}, nor {NO_GOLDEN!r}")
    golden = question(path.parent, Question(content_type=kind, file=path.name))
    return msgspec.structs.replace(golden, tolerance=TO_BE_FOUND)


def _not_answered(manifest: Manifest, variant: str, problem: str, source: Source) -> str:
    label = f"{manifest.name}@{manifest.version}"
    where = f"{label}, variant {variant}" if len(manifest.variants) > 1 else label
    if source.description.golden or source.described:
        return f"{where}: {problem}"
    hint = "--task names another task, --golden FILE a question that fits, --golden none publishes without one"
    return f"{where}: {problem}; {hint}"


def _is_large(source: Source, path: str) -> bool:
    """Whether a graph may have weights to move: its own, or those that lie outside it already."""
    beside = any(other.startswith(path) and other != path for other in source.paths)
    return (source.folder / path).stat().st_size >= WORTH_BYTES or beside


def _lay_out(source: Source, path: str, folder: Path) -> Laid:
    try:
        return lay_out(source.folder, path, folder)
    except GraphError as error:
        if not source.described or source.description.golden:
            raise FleetError(str(error)) from error
        # Nobody asked that it be tried, so it is published as it lies.
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.folder / path, folder / path)
        return Laid([path])
    except ModelError as error:
        raise FleetError(str(error)) from error


def _with_moved(paths: Sequence[str], laid: dict[str, Laid]) -> list[str]:
    """Return a variant's files once the weights of its graphs lie elsewhere."""
    mine = [laid[path] for path in paths if path in laid]
    now = {file for one in mine for file in one.files}
    left = {file for one in mine for file in one.left} - now
    return sorted({path for path in paths if path not in left} | now)


def _copy_rest(source: Source, folder: Path, files: dict[str, list[str]]) -> None:
    for path in {path for paths in files.values() for path in paths}:
        if not (folder / path).exists():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.folder / path, folder / path)


def _check_room(source: Source, work: Path) -> None:
    needed_bytes = int(sum((source.folder / path).stat().st_size for path in source.paths) * _FREE_SHARE)
    free_bytes = shutil.disk_usage(work).free
    if free_bytes < needed_bytes:
        raise FleetError(
            f"{work.parent} has {free_bytes >> 20} MiB free and {needed_bytes >> 20} MiB are needed to lay the weights "
            "out; TMPDIR names another folder"
        )


def _complete(source: Source, variants: list[Variant], folder: Path) -> list[Variant]:
    """Return the variants with the backend that they need and, where a box has a choice, about how much memory."""
    backend = BACKENDS.get(source.description.format)
    if backend is None:
        raise FleetError(f"the format {source.description.format!r} is none of {', '.join(sorted(BACKENDS))}")
    completed = []
    for variant in variants:
        requires = variant.requires
        memory_mb = _memory_mb(folder, variant) if len(variants) > 1 else 0
        completed.append(
            msgspec.structs.replace(
                variant,
                requires=msgspec.structs.replace(
                    requires,
                    backend=requires.backend or backend,
                    memory_mb=requires.memory_mb or memory_mb,
                ),
            )
        )
    return completed


def _memory_mb(folder: Path, variant: Variant) -> int:
    weights_bytes = sum((folder / path).stat().st_size for path in variant.files)
    return _BASE_MB + math.ceil(weights_bytes * _WEIGHT_SHARE / (1 << 20))
