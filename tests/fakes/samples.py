"""The example models as artifacts: their folders, with the manifests of a publication before it is recorded."""

from __future__ import annotations

import hashlib
import tomllib
from pathlib import Path
from typing import Any

import msgspec

from models.manifest import Budget, FileEntry, Golden, Limits, Manifest, Variant

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MODELS = EXAMPLES / "models"
INPUTS = EXAMPLES / "inputs"
FRAME_BYTES = 4 << 20


def sample(name: str) -> tuple[Path, Manifest]:
    """Return an example's folder and its manifest."""
    folder = MODELS / name
    return folder, manifest_of(folder, tomllib.loads((folder / "spillway.toml").read_text()), name)


def manifest_of(folder: Path, description: dict[str, Any], name: str = "test") -> Manifest:
    """Return the manifest of a folder's files, with a variant `default` of them all."""
    files = [_entry(folder, path) for path in sorted(folder.rglob("*")) if _belongs(folder, path)]
    return Manifest(
        schema=1,
        name=name,
        version="1",
        task=description["task"],
        format=description["format"],
        variants=[Variant(name="default", files=[entry.path for entry in files])],
        files=files,
        limits=msgspec.convert(description.get("limits", {}), Limits),
        golden=[_golden(folder, entry) for entry in description.get("golden", [])],
        budget=msgspec.convert(description.get("budget", {}), Budget),
    )


def _belongs(folder: Path, path: Path) -> bool:
    relative = path.relative_to(folder)
    outside = relative.parts[0] == "golden" or relative.name in {"spillway.toml", "README.md"}
    return not outside and (path.is_symlink() or path.is_file())


def _entry(folder: Path, path: Path) -> FileEntry:
    data = path.read_bytes()
    cuts = [data[at : at + FRAME_BYTES] for at in range(0, len(data), FRAME_BYTES)]
    frames = [(len(cut), hashlib.sha256(cut).hexdigest()) for cut in cuts]
    return FileEntry(str(path.relative_to(folder)), len(data), hashlib.sha256(data).hexdigest(), frames)


def _golden(folder: Path, entry: dict[str, Any]) -> Golden:
    body = (
        (folder / entry["file"]).read_bytes() if "file" in entry else entry.get("text", entry.get("json", "")).encode()
    )
    return Golden(entry["content_type"], body, msgspec.Raw(b"null"), entry["tolerance"])
