"""What the agent tells a sync pass and what the pass tells back; light, because the agent imports it.

The settings go in as JSON on standard input. Events come out as JSON lines: `progress`, `error`, and as the
last line of a pass that came so far, `target`.
"""

from __future__ import annotations

from typing import Final

import msgspec

from cloud_sync.deployment import Pool
from models.manifest import BoxFacts

BUILT: Final = "2026-11-22T00:00:00Z"
"""When this release was made: below it no clock is believed (DESIGN 9)."""

EXIT_DONE: Final = 0
EXIT_FAILED: Final = 1
EXIT_LOCKED: Final = 75
EXIT_BAD_SETTINGS: Final = 78


class SyncSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One pass: who the box is, where the repository lies, and what the box runs and refuses."""

    device: str
    groups: list[str]
    state_dir: str
    repository: str
    """`file:///folder` or `s3://bucket/prefix`."""
    root: str
    """Path of the pinned root.json."""
    box: BoxFacts
    endpoint: str = ""
    region: str = ""
    credentials: str = ""
    """Path of an AWS credentials file; empty: the environment."""
    profile: str = "default"
    current: dict[str, str] = {}
    """Model to the version it runs now."""
    keep: list[str] | None = None
    """Digests that must stay; others are pruned after a pass that staged all. None: nothing is pruned."""
    failed: list[str] = []
    """Digests that failed here: they are named in the outcome and not fetched."""
    decided: dict[str, str] = {}
    """Failed digest to the decision under which it failed: under another one it is fetched again."""
    scrub: list[str] = []
    """Digests whose files are read and checked; damaged ones are fetched again."""
    reserve_bytes: int = 64 << 20
    max_artifact_bytes: int = 64 << 30
    min_bytes_s: int = 1024
    slow_window_s: float = 60.0
    attempts: int = 6
    backoff_s: float = 0.5
    built: str = BUILT


class Problem(msgspec.Struct, frozen=True):
    """What went wrong, in a word for machines and a sentence for people."""

    code: str
    message: str


class TargetModel(msgspec.Struct, frozen=True, kw_only=True):
    """A version that this box should run. `staged`: its folder is whole and verified; else `error` says why not."""

    name: str
    version: str
    digest: str = ""
    folder: str = ""
    variant: str = ""
    decision: str = ""
    """Which decision of the admins' asks for this version: another one means that they ask anew. Empty: not known."""
    staged: bool = False
    error: Problem | None = None


class SyncProgress(msgspec.Struct, tag="progress", tag_field="event", frozen=True, kw_only=True):
    """How far a version has come, in bytes of its files."""

    model: str
    version: str
    done_bytes: int
    total_bytes: int


class SyncError(msgspec.Struct, tag="error", tag_field="event", frozen=True):
    """The pass ended without a target: what runs goes on running."""

    code: str
    message: str


class SyncOutcome(msgspec.Struct, tag="target", tag_field="event", frozen=True, kw_only=True):
    """What the admins signed for this box, and how far the box is with it."""

    models: list[TargetModel]
    pools: list[Pool]
    errors: list[Problem] = []
    """Problems that belong to no single model, such as a group without a deployment."""
    bytes_in: int = 0
    pruned: list[str] = []
    repaired: list[str] = []
    metadata_versions: dict[str, int] = {}
    issued: str = ""
    expires: str = ""
    clock_trusted: bool = True


SyncEvent = SyncProgress | SyncError | SyncOutcome
sync_event = msgspec.json.Decoder(SyncEvent)
