"""What an admin writes about a model in `spillway.toml`, beside its files."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Final

import msgspec

from cloud_sync.fleet.errors import FleetError
from models.manifest import Budget, Golden, Limits, Requires

FILE: Final = "spillway.toml"
BACKENDS: Final = {"onnx": "onnxruntime", "tflite": "litert", "genai": "genai"}
"""The backend that each format needs."""
NOT_SHIPPED: Final = frozenset({FILE, "README.md"})
GOLDEN_FOLDER: Final = "golden"


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A golden question: exactly one of a file in the folder, a text, and JSON (as text or as a table)."""

    content_type: str = ""
    tolerance: float = 0.0
    file: str = ""
    text: str = ""
    json: Any = None


class VariantDescription(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One way to run the model; without files it takes all."""

    name: str
    files: list[str] = []
    requires: Requires = Requires()


class Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What `spillway.toml` may hold."""

    task: str
    format: str
    limits: Limits = Limits()
    budget: Budget = Budget()
    provenance: dict[str, Any] = {}
    golden: list[Question] = []
    variants: list[VariantDescription] = []


def load_description(folder: Path) -> Description:
    """Read a model folder's `spillway.toml`; raises FleetError naming the field."""
    path = folder / FILE
    try:
        return msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), Description)
    except OSError as error:
        raise FleetError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise FleetError(f"{path}: {error}") from error


def artifact_files(folder: Path) -> list[str]:
    """Return the files to ship, sorted; raises FleetError for a link or anything that is no plain file."""
    found: list[str] = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name in NOT_SHIPPED or name.split("/")[0] == GOLDEN_FOLDER or (path.is_dir() and not path.is_symlink()):
            continue
        if path.is_symlink() or not path.is_file() or path.stat().st_nlink > 1:
            raise FleetError(f"{path} is a link or no plain file; an artifact holds plain files alone")
        found.append(name)
    if not found:
        raise FleetError(f"{folder} holds no files to ship")
    return found


def question(folder: Path, asked: Question) -> Golden:
    """Return a golden sample whose answer is yet to be recorded; raises FleetError."""
    given = [asked.file != "", asked.text != "", asked.json is not None]
    if sum(given) != 1:
        raise FleetError(f"{folder / FILE}: a golden sample has one of file, text and json")
    return Golden(_content_type(folder, asked), _body(folder, asked), msgspec.Raw(b"null"), asked.tolerance)


def _content_type(folder: Path, asked: Question) -> str:
    if asked.content_type:
        return asked.content_type
    if asked.file:
        raise FleetError(f"{folder / FILE}: the golden sample {asked.file} names no content_type")
    return "text/plain" if asked.text else "application/json"


def _body(folder: Path, asked: Question) -> bytes:
    if asked.text:
        return asked.text.encode()
    if asked.json is not None:
        return asked.json.encode() if isinstance(asked.json, str) else msgspec.json.encode(asked.json)
    path = (folder / asked.file).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise FleetError(f"the golden sample {asked.file} lies outside the folder")
    try:
        return path.read_bytes()
    except OSError as error:
        raise FleetError(f"{path} cannot be read: {error.strerror}") from error
