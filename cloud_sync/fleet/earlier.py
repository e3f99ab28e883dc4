"""The earlier versions that a new one is compared with: those that deployments still name, fetched as a box would."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Final

from cloud_sync.deployment import MAX_DEPLOYMENT_BYTES, parse_deployment
from cloud_sync.errors import CloudError
from cloud_sync.fetch import fetch_frames
from cloud_sync.fleet.deltas import Earlier
from cloud_sync.fleet.errors import FleetError
from cloud_sync.fleet.home import Home
from cloud_sync.fleet.packing import earlier_version
from cloud_sync.fleet.progress import Progress
from cloud_sync.fleet.repository import Draft, load
from cloud_sync.objects import Objects
from cloud_sync.retry import Retry
from cloud_sync.sources import MAX_SOURCES_BYTES, parse_sources
from cloud_sync.store import Store
from models.manifest import MAX_MANIFEST_BYTES, parse_manifest

MAX_EARLIER: Final = 4
"""Versions that a new one is compared with, at most: each costs its own delta pack."""


def open_earlier(home: Home, name: str, versions: Iterable[str] | None, progress: Progress) -> dict[str, Earlier]:
    """Return these versions of a model, or those that deployments name; raises FleetError.

    Their files are kept in the fleet's folder under `artifacts/`, verified, so that each is fetched once.
    """
    objects = home.open_objects()
    draft = load(home, objects, now=datetime.now(UTC))
    wanted = list(versions) if versions is not None else named_versions(draft, name)[:MAX_EARLIER]
    store = Store(home.folder / "artifacts", reserve_bytes=0)
    return {version: _open(draft, objects, store, f"{name}/{version}", progress) for version in wanted}


def named_versions(draft: Draft, name: str) -> list[str]:
    """Return the versions of a model that any group's deployment names, current ones before previous ones."""
    current: dict[str, None] = {}
    previous: dict[str, None] = {}
    for path in sorted(draft.targets("deployments")):
        group = path.removeprefix("deployments/").removesuffix(".json")
        rollout = parse_deployment(draft.read_target(path, MAX_DEPLOYMENT_BYTES), group).models.get(name)
        if rollout is not None:
            current[rollout.version] = None
            if rollout.previous:
                previous[rollout.previous] = None
    signed = draft.targets("models")
    return [
        version
        for version in [*current, *previous.keys() - current.keys()]
        if f"models/{name}/{version}.json" in signed
    ]


def _open(draft: Draft, objects: Objects, store: Store, label: str, progress: Progress) -> Earlier:
    path = f"models/{label}.json"
    if path not in draft.targets("models"):
        raise FleetError(f"{label.replace('/', '@')} is not published, so nothing can be compared with it")
    try:
        raw = draft.read_target(path, MAX_MANIFEST_BYTES)
        manifest = parse_manifest(raw)
        digest = draft.targets("models")[path].hashes["sha256"]
        if not store.has(digest, manifest.files) or store.damage(digest):
            _fetch(draft, objects, store, label, raw, progress)
        return earlier_version(store.folder(digest), manifest.files)
    except (CloudError, ValueError) as error:
        raise FleetError(f"{label.replace('/', '@')} cannot be compared with: {error}") from error


def _fetch(draft: Draft, objects: Objects, store: Store, label: str, raw: bytes, progress: Progress) -> None:
    manifest = parse_manifest(raw)
    digest = draft.targets("models")[f"models/{label}.json"].hashes["sha256"]
    sources = parse_sources(draft.read_target(f"models/{label}.sources.json", MAX_SOURCES_BYTES))
    staging = store.begin(digest, manifest.files)
    try:
        staging.take_local()
        missing = staging.missing
        with progress.bar(f"fetching {label.replace('/', '@')}", sum(missing.values())) as advance:
            for sha256, frame in fetch_frames(objects, sources, missing, store.local_files(), Retry()):
                staging.write(sha256, frame)
                advance(len(frame))
        staging.finish(raw)
    finally:
        staging.close()
