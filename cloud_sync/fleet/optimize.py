"""`spillway-fleet optimize`: a folder with smaller and faster variants of a model, ready to be judged and published."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from cloud_sync.fleet.dataset import load_samples
from cloud_sync.fleet.description import FILE, GOLDEN_FOLDER, Question, VariantDescription, description_toml
from cloud_sync.fleet.errors import FleetError
from cloud_sync.fleet.plan import DEFAULT
from cloud_sync.fleet.prepare import Staged, build_manifest, default_golden
from cloud_sync.fleet.progress import Progress
from cloud_sync.fleet.source import Source, read_source, weights_of
from models.errors import ModelError
from models.manifest import Variant
from models.optimize.feeds import Feeds, record_feeds
from models.optimize.recipes import needs_calibration, parse_recipe
from models.optimize.steps import apply

MAX_CALIBRATION: Final = 512
"""Samples that the ranges of activations are found with, at most; more change them little."""
_ENDINGS: Final = {"text/plain": ".txt", "image/png": ".png", "audio/wav": ".wav"}
_ELSEWHERE: Final = (
    "a .tflite file is compressed where it is made, since its weights cannot be told from its arithmetic afterwards: "
    "with ai-edge-quantizer or LiteRT's converter (`optimizations`, `representative_dataset`); publish its output"
)


def optimize(
    path: Path, out: Path, recipes: Sequence[str], *, calibration: Path | None, task: str, progress: Progress
) -> dict[str, Any]:
    """Write a model and its variants to a new folder; raises FleetError."""
    source = _source(path, task, out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
        work = Path(folder) / "made"
        try:
            made, steps = _make(source, work, recipes, calibration, progress)
        except ModelError as error:
            raise FleetError(str(error)) from error
        _describe(source, work, made, steps)
        work.rename(out)
    sizes = {variant.name: {"bytes": _bytes_of(out, variant)} for variant in made}
    return {"out": str(out), "task": source.description.task, "variants": sizes, "steps": steps, "next": _next(out)}


def _make(
    source: Source, out: Path, recipes: Sequence[str], calibration: Path | None, progress: Progress
) -> tuple[list[VariantDescription], list[str]]:
    """Return the variants made, the model as it is the first, and the steps done; raises ModelError and FleetError."""
    wanted = {recipe: parse_recipe(recipe) for recipe in recipes}
    feeds = _feeds(source, calibration) if any(map(needs_calibration, wanted.values())) else []
    steps: list[str] = []
    made = [_as_it_is(source, out)]
    with progress.bar("optimising", len(wanted)) as advance:
        for name, recipe in wanted.items():
            made.append(_variant(source, out, name, recipe, feeds, steps))
            advance(1)
    return made, steps


def _source(path: Path, task: str, out: Path) -> Source:
    source = read_source(path, task=task)
    if source.description.format == "tflite":
        raise FleetError(_ELSEWHERE)
    if source.description.format != "onnx":
        raise FleetError(f"{source.description.format}: its builder quantises as it exports (`-p int4`)")
    if out.exists():
        raise FleetError(f"{out} is there already; name a new folder")
    return source


def _graphs(source: Source) -> list[str]:
    """Return the graphs of the first variant, the one that others are made from."""
    return [path for path in source.description.variants[0].files if path.endswith(".onnx")]


def _as_it_is(source: Source, out: Path) -> VariantDescription:
    first = source.description.variants[0]
    for path in first.files:
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.folder / path, out / path)
    return msgspec.structs.replace(first, name=DEFAULT)


def _variant(
    source: Source, out: Path, name: str, recipe: Sequence[str], feeds: Sequence[Feeds], steps: list[str]
) -> VariantDescription:
    """Make one variant's graphs; what was done is added to `steps`."""
    first = source.description.variants[0]
    graphs = _graphs(source)
    weights = {path for paths in weights_of(source.folder, graphs).values() for path in paths}
    shared = [path for path in first.files if path not in weights and path not in graphs]
    made = []
    for graph in graphs:
        path = f"{graph.removesuffix('.onnx')}_{name.replace('+', '_')}.onnx"
        done = apply(recipe, source.folder / graph, out / path, feeds)
        where = f"{graph}: " if len(graphs) > 1 else ""
        steps += [where + (step if len(recipe) == 1 else f"{name}: {step}") for step in done]
        made.append(path)
    accelerator = "cuda" if "float16" in recipe else ""
    requires = msgspec.structs.replace(first.requires, accelerator=accelerator or first.requires.accelerator)
    return VariantDescription(name.replace("+", "-"), sorted([*shared, *made]), requires)


def _feeds(source: Source, calibration: Path | None) -> list[Feeds]:
    """Return what the first variant's graph is fed for the calibration set; raises FleetError and ModelError."""
    if calibration is None:
        raise FleetError("int8-static asks for examples; add --calibration FILE")
    if len(_graphs(source)) != 1:
        raise FleetError(
            "int8-static is for models of one graph; int8-dynamic and int4 take an encoder with its decoder"
        )
    questions = [sample.question for sample in load_samples(calibration, labelled=False)[:MAX_CALIBRATION]]
    first = source.description.variants[0]
    variant = Variant(first.name, first.files, first.requires)
    manifest = build_manifest(source, Staged(source.folder, source.paths, [variant]), "model", "1")
    return record_feeds(source.folder, manifest, variant, questions)


def _describe(source: Source, out: Path, made: list[VariantDescription], steps: list[str]) -> None:
    """Write `spillway.toml` with what is known of the model, its golden questions beside it."""
    given = source.description
    before = given.provenance.get("steps")
    provenance = {**given.provenance, "steps": [*(before if isinstance(before, list) else []), *steps]}
    golden = given.golden or ([] if source.described else _default_golden(source, out))
    if (source.folder / GOLDEN_FOLDER).is_dir():
        shutil.copytree(source.folder / GOLDEN_FOLDER, out / GOLDEN_FOLDER, dirs_exist_ok=True)
    described = msgspec.structs.replace(given, variants=made, provenance=provenance, golden=golden)
    (out / FILE).write_text(description_toml(described), encoding="utf-8")


def _default_golden(source: Source, out: Path) -> list[Question]:
    """Write the questions that fit the task, and name them."""
    variant = Variant(source.description.variants[0].name, source.description.variants[0].files)
    staged = Staged(source.folder, source.paths, [variant])
    questions = default_golden(source, staged, build_manifest(source, staged, "model", "1"))
    named = []
    for number, golden in enumerate(questions, 1):
        name = f"{GOLDEN_FOLDER}/{number}{_ENDINGS.get(golden.content_type, '.json')}"
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(golden.body)
        named.append(Question(content_type=golden.content_type, file=name))
    return named


def _bytes_of(out: Path, variant: VariantDescription) -> int:
    return sum((out / path).stat().st_size for path in variant.files)


def _next(out: Path) -> str:
    return f"spillway-fleet evaluate {out} --data FILE, then spillway-fleet publish {out} --data FILE --max-drop 0.01"
