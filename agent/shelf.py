"""What lies in a box's state folder, read beside a running agent or without one, changing nothing."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import msgspec

from models.manifest import MAX_MANIFEST_BYTES, Manifest, ManifestError, is_sha256, parse_manifest


class ShelfError(Exception):
    """The state folder cannot be read; the message says what to type."""


class Running(msgspec.Struct, frozen=True):
    """Which version of a model runs, and the one before it (empty: none)."""

    version: str
    digest: str
    previous_version: str
    previous_digest: str


class Failed(msgspec.Struct, frozen=True):
    """Why a digest is not tried again."""

    code: str
    message: str


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    """One version that lies whole on the disk; `files_mb` is what its files take there."""

    digest: str
    folder: Path
    manifest: Manifest
    raw: bytes
    files_mb: float


class Shelf(msgspec.Struct, frozen=True):
    """What the state folder holds."""

    running: dict[str, Running]
    failed: dict[str, Failed]
    stored: dict[str, Stored]


def load_shelf(state: Path) -> Shelf:
    """Read a state folder; raises ShelfError."""
    try:
        if not state.is_dir():
            raise ShelfError(f"{state} is not there: has `spillway run` been started with this configuration?")
        running, failed = _load_database(state / "state.db")
        stored = {one.digest: one for path in _folders(state / "versions") if (one := _load_version(path)) is not None}
    except PermissionError as error:
        raise ShelfError(f"{error.filename or state} may not be read: {_as_whom(state)}") from error
    except (OSError, sqlite3.Error) as error:
        raise ShelfError(f"{state} cannot be read: {error}; {_as_whom(state)}") from error
    return Shelf(running, failed, stored)


def _as_whom(state: Path) -> str:
    with contextlib.suppress(OSError, KeyError):
        return f"try `sudo -u {state.owner()} spillway ...`, or sudo alone"
    return "try it with sudo"


def _folders(versions: Path) -> list[Path]:
    return sorted(path for path in versions.iterdir() if is_sha256(path.name)) if versions.is_dir() else []


def _load_version(folder: Path) -> Stored | None:
    try:
        raw = (folder / "manifest.json").read_bytes()[: MAX_MANIFEST_BYTES + 1]
        manifest = parse_manifest(raw)
    except (FileNotFoundError, ManifestError):
        return None
    held = sum(path.stat().st_size for entry in manifest.files if (path := folder / entry.path).is_file())
    return Stored(digest=folder.name, folder=folder, manifest=manifest, raw=raw, files_mb=held / (1 << 20))


def _load_database(file: Path) -> tuple[dict[str, Running], dict[str, Failed]]:
    if not file.exists():
        return {}, {}
    with contextlib.closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True, timeout=2.0)) as database:
        current = database.execute("SELECT model, version, digest, previous_version, previous_digest FROM current")
        running = {model: Running(*rest) for model, *rest in current}
        failed = {
            digest: Failed(*rest) for digest, *rest in database.execute("SELECT digest, code, message FROM failed")
        }
    return running, failed
