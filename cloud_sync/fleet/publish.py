"""`spillway-fleet publish`: make a version of a model's files, judge it here, upload it and sign it."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec

from cloud_sync.errors import ConflictError
from cloud_sync.fleet.deltas import Earlier
from cloud_sync.fleet.description import Gate
from cloud_sync.fleet.earlier import open_earlier
from cloud_sync.fleet.errors import FleetError
from cloud_sync.fleet.evaluate import gate_of, judge
from cloud_sync.fleet.gate import refusals
from cloud_sync.fleet.home import Home
from cloud_sync.fleet.packing import Packed, pack_files
from cloud_sync.fleet.prepare import Staged, build_manifest, record, stage
from cloud_sync.fleet.progress import Progress
from cloud_sync.fleet.repository import Draft, edit, load
from cloud_sync.fleet.source import Source, read_source
from cloud_sync.sources import SCHEMA as SOURCES_SCHEMA
from cloud_sync.sources import Sources, pack_key, sources_bytes
from models.manifest import (
    MAX_MANIFEST_BYTES,
    Manifest,
    Variant,
    digest_of,
    is_name,
    is_version,
    manifest_bytes,
    parse_manifest,
)

_FIRST: Final = "1"


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be published, and how; an empty field is taken from the files or from what is published already.

    `since` names the earlier versions that delta packs are made against; None: those that deployments name.
    """

    path: Path
    name: str = ""
    version: str = ""
    task: str = ""
    variants: Sequence[str] = ()
    golden: Sequence[str] = ()
    data: Path | None = None
    max_drop: float | None = None
    threads: int = 1
    since: list[str] | None = None
    dry_run: bool = False


def publish(home: Home, wanted: Wanted, progress: Progress) -> dict[str, Any]:
    """Publish a model's files as a version; raises FleetError. With `dry_run` nothing leaves this machine."""
    source = read_source(wanted.path, task=wanted.task, variants=wanted.variants)
    name = wanted.name or name_of(wanted.path)
    draft = _load(home, wanted)
    newest = _newest(draft, name)
    version = wanted.version or (str(newest + 1) if newest else _FIRST)
    if not is_name(name) or not is_version(version):
        raise FleetError(f"{name}@{version}: a name is lower-case, and neither holds anything but [A-Za-z0-9._-]")
    with tempfile.TemporaryDirectory(prefix="spillway-") as folder:
        work = Path(folder)
        staged = stage(source, work)
        manifest = build_manifest(source, staged, name, version)
        manifest = _evaluated(source, staged, manifest, wanted, progress)
        manifest = record(source, staged, manifest, wanted.golden, threads=wanted.threads)
        earlier = open_earlier(home, name, wanted.since, progress) if draft else {}
        packed = _pack(staged, work, earlier, progress)
        manifest = msgspec.structs.replace(manifest, files=packed.files)
        report = _report(source, manifest, packed, wanted)
        if draft and not wanted.version and _is_same(draft, manifest, str(newest)):
            report["same_as"] = str(newest)
        elif not wanted.dry_run:
            report["published"] = _send(home, manifest, packed, progress)
    return report


def _evaluated(source: Source, staged: Staged, manifest: Manifest, wanted: Wanted, progress: Progress) -> Manifest:
    """Return the manifest with what its variants scored; raises FleetError for one that falls under the gate."""
    gate = gate_of(source, wanted.max_drop)
    if wanted.data is None:
        if gate != Gate():
            raise FleetError(
                "there is a gate for what may be published; add --data FILE, the labelled set it judges by"
            )
        return manifest
    judged = judge(staged, manifest, wanted.data, threads=wanted.threads, progress=progress)
    if refused := refusals(judged, gate, manifest.budget):
        reasons = "; ".join(f"{name}: {', '.join(problems)}" for name, problems in refused.items())
        raise FleetError(f"{reasons}. Nothing is published; --variants names those that may be")
    scores = {one.name: {**one.scores, "samples": one.samples} for one in judged}
    before = manifest.provenance.get("evaluation")
    evaluation = {**(before if isinstance(before, dict) else {}), "data": wanted.data.name, "variants": scores}
    return msgspec.structs.replace(manifest, provenance={**manifest.provenance, "evaluation": evaluation})


def name_of(path: Path) -> str:
    """Return a model's name by that of its folder or file: `all-MiniLM-L6-v2` gives `all-minilm-l6-v2`."""
    stem = path.resolve().stem if path.is_file() else path.resolve().name
    return re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip("._-")[:64]


def _load(home: Home, wanted: Wanted) -> Draft | None:
    """Return what is published so far; None for a dry run of somebody who has no fleet yet."""
    if wanted.dry_run and not home.exists:
        return None
    return load(home, home.open_objects(), now=datetime.now(UTC))


def _newest(draft: Draft | None, name: str) -> int:
    """Return the highest version of a model that is a plain number, 0 where none is."""
    found = (re.fullmatch(rf"models/{re.escape(name)}/([0-9]+)\.json", path) for path in _targets(draft))
    return max((int(match[1]) for match in found if match), default=0)


def _targets(draft: Draft | None) -> Sequence[str]:
    return list(draft.targets("models")) if draft else []


def _is_same(draft: Draft, manifest: Manifest, version: str) -> bool:
    """Whether a version that was published holds all that this one does."""
    path = f"models/{manifest.name}/{version}.json"
    if path not in _targets(draft):
        return False
    before = parse_manifest(draft.read_target(path, MAX_MANIFEST_BYTES))
    return _unanswered(before) == _unanswered(msgspec.structs.replace(manifest, version=version))


def _unanswered(manifest: Manifest) -> Manifest:
    """Return a manifest without its golden answers, which may name the version."""
    golden = [msgspec.structs.replace(golden, expected=msgspec.Raw(b"null")) for golden in manifest.golden]
    return msgspec.structs.replace(manifest, golden=golden)


def _pack(staged: Staged, work: Path, earlier: dict[str, Earlier], progress: Progress) -> Packed:
    total_bytes = sum((staged.folder / path).stat().st_size for path in staged.paths)
    with progress.bar("packing", total_bytes) as advance:
        return pack_files(staged.folder, staged.paths, work, earlier, advance)


def _send(home: Home, manifest: Manifest, packed: Packed, progress: Progress) -> bool:
    """Upload the packs and sign the version; whether it is new."""
    raw = manifest_bytes(manifest)
    parse_manifest(raw)
    for pack, path in packed.packs.items():
        _upload(home, path, pack, progress)
    sources = sources_bytes(Sources(SOURCES_SCHEMA, digest_of(raw), packed.frames))
    return edit(home, lambda draft: _sign(draft, manifest.name, manifest.version, raw, sources))


def _upload(home: Home, path: Path, pack: str, progress: Progress) -> None:
    objects = home.open_objects()
    with progress.bar("uploading", path.stat().st_size) as advance:
        if not objects.exists(pack_key(pack)):
            with contextlib.suppress(ConflictError):  # Named by its content: somebody uploaded the same.
                objects.put(pack_key(pack), path, only_new=True)
        advance(path.stat().st_size)


def _sign(draft: Draft, name: str, version: str, raw: bytes, sources: bytes) -> bool:
    path = f"models/{name}/{version}.json"
    known = draft.targets("models").get(path)
    if known is not None and known.hashes.get("sha256") != digest_of(raw):
        raise FleetError(f"{name}@{version} is published already with other content; a version never changes")
    draft.add_target("models", path, raw)
    draft.add_target("models", f"models/{name}/{version}.sources.json", sources)
    return known is None


def _report(source: Source, manifest: Manifest, packed: Packed, wanted: Wanted) -> dict[str, Any]:
    sizes = {entry.path: entry.length for entry in packed.files}
    asked = {(golden.content_type, golden.body) for golden in manifest.golden}
    return {
        "model": manifest.name,
        "version": manifest.version,
        "task": manifest.task,
        "task_from": source.why,
        "variants": {variant.name: _variant(variant, sizes, listed=wanted.dry_run) for variant in manifest.variants},
        "limits": msgspec.to_builtins(manifest.limits),
        "golden": len(asked),
        "evaluation": manifest.provenance.get("evaluation", {}),
        "left_out": source.left_out,
        "digest": digest_of(manifest_bytes(manifest)),
        "files": len(packed.files),
        "bytes": sum(sizes.values()),
        "pack_bytes": packed.complete_bytes,
        "bytes_from": packed.bytes_from,
        "published": False,
    }


def _variant(variant: Variant, sizes: dict[str, int], *, listed: bool) -> dict[str, Any]:
    """Return what the report says of a variant, with its files where they are `listed`."""
    facts: dict[str, Any] = {"bytes": sum(sizes[path] for path in variant.files)}
    facts |= {"files": {path: sizes[path] for path in variant.files}} if listed else {}
    return facts | {"requires": msgspec.to_builtins(variant.requires)}
