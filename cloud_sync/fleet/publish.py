"""`spillway-fleet publish`: make a version of a folder, judge it here, upload it and sign it."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from cloud_sync.errors import ConflictError
from cloud_sync.fleet.description import (
    BACKENDS,
    Description,
    VariantDescription,
    artifact_files,
    load_description,
    question,
)
from cloud_sync.fleet.errors import FleetError
from cloud_sync.fleet.home import Home
from cloud_sync.fleet.progress import Progress
from cloud_sync.fleet.repository import Draft, edit
from cloud_sync.frames import read_frames
from cloud_sync.packs import PackWriter
from cloud_sync.sources import SCHEMA as SOURCES_SCHEMA
from cloud_sync.sources import Sources, pack_key, sources_bytes
from models.errors import ModelError
from models.manifest import (
    SCHEMA,
    FileEntry,
    Manifest,
    ManifestError,
    Requires,
    Variant,
    digest_of,
    is_name,
    is_version,
    manifest_bytes,
    parse_manifest,
)
from models.record import record_golden


def publish(
    home: Home, folder: Path, name: str, version: str, *, progress: Progress, dry_run: bool = False, threads: int = 1
) -> dict[str, Any]:
    """Publish a folder as `name@version`; raises FleetError. With `dry_run` nothing leaves this machine."""
    if not is_name(name) or not is_version(version):
        raise FleetError(f"{name}@{version}: a name is lower-case, and neither holds anything but [A-Za-z0-9._-]")
    description = load_description(folder)
    paths = artifact_files(folder)
    with tempfile.TemporaryDirectory(prefix="spillway-") as work:
        writer = PackWriter(Path(work) / "pack")
        files = _pack(folder, paths, writer, progress)
        pack, entries = writer.close()
        raw = _manifest(folder, name, version, description, files, threads)
        report = _report(name, version, raw, files, writer.stored_bytes)
        if not dry_run:
            _upload(home, writer.path, pack, progress)
            sources = sources_bytes(Sources(SOURCES_SCHEMA, digest_of(raw), entries))
            report["published"] = edit(home, lambda draft: _sign(draft, name, version, raw, sources))
    return report


def _pack(folder: Path, paths: list[str], writer: PackWriter, progress: Progress) -> list[FileEntry]:
    total_bytes = sum((folder / path).stat().st_size for path in paths)
    with progress.bar("packing", total_bytes) as advance:
        return [_pack_file(folder, path, writer, advance) for path in paths]


def _pack_file(folder: Path, path: str, writer: PackWriter, advance: Callable[[int], object]) -> FileEntry:
    frames: list[tuple[int, str]] = []
    whole = hashlib.sha256()
    for frame in read_frames(folder / path):
        whole.update(frame)
        frames.append((len(frame), writer.add(frame)))
        advance(len(frame))
    return FileEntry(path, sum(length for length, _ in frames), whole.hexdigest(), frames)


def _manifest(
    folder: Path, name: str, version: str, description: Description, files: list[FileEntry], threads: int
) -> bytes:
    """Return the manifest's bytes, its golden answers recorded on this machine; raises FleetError."""
    manifest = Manifest(
        schema=SCHEMA,
        name=name,
        version=version,
        task=description.task,
        format=description.format,
        variants=_variants(description, [entry.path for entry in files]),
        files=files,
        limits=description.limits,
        golden=[question(folder, asked) for asked in description.golden],
        budget=description.budget,
        provenance=description.provenance,
    )
    try:
        parse_manifest(manifest_bytes(manifest))
        if manifest.golden:
            manifest = msgspec.structs.replace(manifest, golden=record_golden(folder, manifest, threads=threads))
        raw = manifest_bytes(manifest)
        parse_manifest(raw)
    except (ManifestError, ModelError) as error:
        raise FleetError(f"{name}@{version}: {error}") from error
    return raw


def _variants(description: Description, paths: list[str]) -> list[Variant]:
    backend = BACKENDS.get(description.format)
    if backend is None:
        raise FleetError(f"the format {description.format!r} is none of {', '.join(sorted(BACKENDS))}")
    described = description.variants or [VariantDescription("default")]
    return [
        Variant(variant.name, variant.files or paths, _requires(variant.requires, backend)) for variant in described
    ]


def _requires(requires: Requires, backend: str) -> Requires:
    return requires if requires.backend else msgspec.structs.replace(requires, backend=backend)


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


def _report(name: str, version: str, raw: bytes, files: list[FileEntry], stored_bytes: int) -> dict[str, Any]:
    return {
        "model": name,
        "version": version,
        "digest": digest_of(raw),
        "files": len(files),
        "bytes": sum(entry.length for entry in files),
        "pack_bytes": stored_bytes,
        "published": False,
    }
