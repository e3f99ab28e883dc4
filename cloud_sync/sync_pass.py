"""What one sync pass does between its settings and its outcome; every error of one model stays with that model."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import msgspec

from cloud_sync.deployment import (
    MAX_DEPLOYMENT_BYTES,
    Deployment,
    decisions_of,
    parse_deployment,
    pools_of,
    targets_for,
)
from cloud_sync.errors import CloudError, StoreError, TrustError
from cloud_sync.fetch import fetch_frames
from cloud_sync.objects import Objects
from cloud_sync.retry import Retry
from cloud_sync.sources import MAX_SOURCES_BYTES, parse_sources
from cloud_sync.store import Staging, Store
from cloud_sync.sync_settings import Problem, SyncOutcome, SyncProgress, SyncSettings, TargetModel
from cloud_sync.trust import Trust
from models.manifest import (
    MAX_MANIFEST_BYTES,
    FileEntry,
    ManifestError,
    Variant,
    parse_manifest,
    pick_variant,
    variant_files,
)

PROGRESS_S: Final = 0.5


class SyncPass:
    """One pass for one box over an opened repository, trust and store."""

    def __init__(
        self,
        settings: SyncSettings,
        objects: Objects,
        trust: Trust,
        store: Store,
        retry: Retry,
        emit: Callable[[SyncProgress], None],
    ) -> None:
        self._settings = settings
        self._objects = objects
        self._trust = trust
        self._store = store
        self._retry = retry
        self._emit = emit
        self._damaged: set[str] = set()
        self._repaired: list[str] = []
        self._problems: list[Problem] = []
        self._decisions: dict[tuple[str, str], str] = {}

    def run(self) -> SyncOutcome:
        """Return the outcome; raises CloudError where nothing new can be trusted."""
        facts = self._trust.refresh()
        deployments = self._deployments()
        self._damaged = {digest for digest in self._settings.scrub if self._store.damage(digest)}
        self._decisions = decisions_of(deployments)
        targets = targets_for(deployments, self._settings.device, self._settings.current)
        models = [self._model(name, version) for name, version in sorted(targets.items())]
        self._repair_others()
        pruned = self._prune(models)
        self._trust.forget_unused()
        return SyncOutcome(
            models=models,
            pools=pools_of(deployments),
            errors=self._problems,
            pruned=pruned,
            repaired=self._repaired,
            metadata_versions=facts.versions,
            issued=facts.issued,
            expires=facts.expires,
            clock_trusted=facts.clock_trusted,
        )

    def _deployments(self) -> list[Deployment]:
        deployments: list[Deployment] = []
        for group in self._settings.groups:
            path = f"deployments/{group}.json"
            if self._trust.find(path) is None:
                self._problems.append(Problem("no_deployment", f"nothing is deployed to the group {group}"))
                continue
            deployment = parse_deployment(self._trust.target(path, MAX_DEPLOYMENT_BYTES), group)
            self._trust.accept_sequence(path, deployment.sequence)
            deployments.append(deployment)
        return deployments

    def _model(self, name: str, version: str) -> TargetModel:
        target = TargetModel(name=name, version=version, decision=self._decisions.get((name, version), ""))
        try:
            return self._stage(target)
        except CloudError as error:
            return _failed(target, error)

    def _stage(self, target: TargetModel) -> TargetModel:
        path = f"models/{target.name}/{target.version}.json"
        signed = self._trust.find(path)
        if signed is None:
            raise TrustError("missing_target", f"{path} was not signed by those who may sign it")
        digest = signed.file.hashes.get("sha256", "")
        target = _with(target, digest=digest)
        try:
            return self._stage_digest(target, path)
        except CloudError as error:
            return _failed(target, error)

    def _stage_digest(self, target: TargetModel, path: str) -> TargetModel:
        raw = self._trust.target(path, MAX_MANIFEST_BYTES)
        variant, files = self._fitting(raw, target)
        target = _with(target, variant=variant.name, folder=str(self._store.folder(target.digest)))
        if not self._store.has(target.digest, files) or target.digest in self._damaged:
            if target.digest in self._settings.failed and not self._asked_anew(target):
                raise TrustError("failed_before", f"{target.name}@{target.version} failed on this box")
            self._fetch(target, path, files, raw)
        return _with(target, staged=True)

    def _asked_anew(self, target: TargetModel) -> bool:
        """Whether admins have decided for a version once more since it failed here."""
        before = self._settings.decided.get(target.digest, "")
        return bool(before and target.decision) and before != target.decision

    def _fitting(self, raw: bytes, target: TargetModel) -> tuple[Variant, list[FileEntry]]:
        try:
            manifest = parse_manifest(raw)
        except ManifestError as error:
            code = "unknown_schema" if str(error).startswith("schema:") else "bad_metadata"
            raise TrustError(code, f"{target.name}@{target.version}: {error}") from error
        if (manifest.name, manifest.version) != (target.name, target.version):
            raise TrustError("wrong_software", f"{target.name}@{target.version} is {manifest.name}@{manifest.version}")
        try:
            variant = pick_variant(manifest, self._settings.box)
        except ManifestError as error:
            raise TrustError("wrong_software", f"{target.name}@{target.version}: {error}") from error
        files = variant_files(manifest, variant)
        total_bytes = sum(entry.length for entry in files)
        if total_bytes > self._settings.max_artifact_bytes:
            raise StoreError("too_large", f"{target.name}@{target.version} holds {total_bytes} bytes")
        return variant, files

    def _fetch(self, target: TargetModel, path: str, files: list[FileEntry], raw: bytes) -> None:
        staging = self._store.begin(target.digest, files)
        try:
            staging.take_local()
            if staging.missing:
                self._fetch_missing(staging, target, path, sum(entry.length for entry in files))
            staging.finish(raw)
        finally:
            staging.close()
        if target.digest in self._damaged:
            self._damaged.discard(target.digest)
            self._repaired.append(target.digest)

    def _fetch_missing(self, staging: Staging, target: TargetModel, path: str, total_bytes: int) -> None:
        sources = parse_sources(self._trust.target(path.removesuffix(".json") + ".sources.json", MAX_SOURCES_BYTES))
        if sources.manifest != target.digest:
            raise TrustError("mix_and_match", f"the sources of {target.name}@{target.version} are for another manifest")
        told_s = time.monotonic()
        for sha256, frame in fetch_frames(
            self._objects, sources, staging.missing, self._store.local_files(), self._retry
        ):
            staging.write(sha256, frame)
            if time.monotonic() - told_s >= PROGRESS_S:
                told_s = time.monotonic()
                self._tell(target, total_bytes - sum(staging.missing.values()), total_bytes)
        self._tell(target, total_bytes, total_bytes)

    def _tell(self, target: TargetModel, done_bytes: int, total_bytes: int) -> None:
        self._emit(
            SyncProgress(model=target.name, version=target.version, done_bytes=done_bytes, total_bytes=total_bytes)
        )

    def _repair_others(self) -> None:
        """Fetch damaged versions again that are no target now, such as the one that still runs."""
        for digest in sorted(self._damaged):
            manifest = self._store.manifest(digest)
            if manifest is None:
                self._problems.append(Problem("corrupt", f"version {digest} is damaged beyond what can be fetched"))
                continue
            repaired = self._model(manifest.name, manifest.version)
            if repaired.error or repaired.digest != digest:
                message = repaired.error.message if repaired.error else "it is published under another digest"
                self._problems.append(Problem("corrupt", f"{manifest.name}@{manifest.version} is damaged: {message}"))

    def _prune(self, models: list[TargetModel]) -> list[str]:
        """Give room back; versions go only after everything that should run is staged."""
        targets = {model.digest for model in models}
        pruned: list[str] = []
        if self._settings.keep is not None and all(model.staged for model in models):
            pruned = self._store.prune(targets | set(self._settings.keep))
        self._store.prune_partial(targets)
        return pruned


def _with(target: TargetModel, **changes: str | bool) -> TargetModel:
    return msgspec.structs.replace(target, **changes)


def _failed(target: TargetModel, error: CloudError) -> TargetModel:
    return msgspec.structs.replace(target, error=Problem(error.code, error.message))
