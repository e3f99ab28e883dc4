"""The versions that lie whole on this box's disk, read off the event loop: a manifest may have megabytes."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import msgspec

from agent.workers import Version
from models.manifest import (
    BoxFacts,
    Budget,
    Golden,
    ManifestError,
    parse_manifest,
    pick_variant,
    variant_files,
    variant_golden,
)

log = logging.getLogger(__name__)


class Installed(msgspec.Struct, frozen=True, kw_only=True):
    """A version on the disk, and what its manifest says that the agent needs to know."""

    version: Version
    task: str
    budget: Budget
    golden: list[Golden]
    files_mb: float

    @property
    def digest(self) -> str:
        """The version's identity."""
        return self.version.digest

    @property
    def label(self) -> str:
        """`name@version`."""
        return self.version.label


class Versions:
    """The folder `versions/` as the agent reads it; `box` decides which variant runs here."""

    def __init__(self, folder: Path, box: BoxFacts) -> None:
        self.box = box
        self._folder = folder

    async def installed(self, name: str, version: str, digest: str) -> Installed | None:
        """Return a version that is whole on this disk and can run here, or None."""
        return await asyncio.to_thread(self._read, name, version, digest)

    def _read(self, name: str, version: str, digest: str) -> Installed | None:
        folder = self._folder / digest
        try:
            raw = (folder / "manifest.json").read_bytes()
        except OSError:
            return None
        try:
            manifest = parse_manifest(raw)
            variant = pick_variant(manifest, self.box)
        except ManifestError as error:
            log.warning("%s@%s cannot run here: %s", name, version, error)
            return None
        return Installed(
            version=Version(
                name=name, version=version, digest=digest, folder=folder, variant=variant.name, manifest=raw
            ),
            task=manifest.task,
            budget=manifest.budget,
            golden=variant_golden(manifest, variant.name),
            files_mb=sum(entry.length for entry in variant_files(manifest, variant)) / (1 << 20),
        )
