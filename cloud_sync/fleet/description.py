"""What an admin writes about a model in `spillway.toml`, beside its files."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Iterator
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


TO_BE_FOUND: Final = -1.0
"""A tolerance that nobody has given."""


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A golden question: exactly one of a file in the folder, a text, and JSON (as text or as a table).

    Without a `tolerance` one is found that fits the precision and the answer.
    """

    content_type: str = ""
    tolerance: float = TO_BE_FOUND
    file: str = ""
    text: str = ""
    json: Any = None


class VariantDescription(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One way to run the model; without files it takes all."""

    name: str
    files: list[str] = []
    requires: Requires = Requires()


class Gate(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a variant must score to be published: `least` by measure, and at most `max_drop` below the first."""

    max_drop: float | None = None
    least: dict[str, float] = {}


class Description(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What `spillway.toml` may hold; what it leaves out is taken from the model's own files."""

    task: str = ""
    format: str = ""
    limits: Limits | None = None
    budget: Budget = Budget()
    gate: Gate = Gate()
    provenance: dict[str, Any] = {}
    golden: list[Question] = []
    variants: list[VariantDescription] = []


def load_description(folder: Path) -> Description | None:
    """Read a model folder's `spillway.toml`, None where it has none; raises FleetError naming the field."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        return msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), Description)
    except OSError as error:
        raise FleetError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise FleetError(f"{path}: {error}") from error


def list_files(folder: Path) -> dict[str, int]:
    """Return the bytes of a folder's files by path, sorted, without those that are the admin's own or hidden."""
    found = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts)
        own = parts[0] in {*NOT_SHIPPED, GOLDEN_FOLDER}
        if not hidden and not own and (path.is_symlink() or not path.is_dir()):
            found["/".join(parts)] = path.lstat().st_size
    if not found:
        raise FleetError(f"{folder} holds no files to ship")
    return found


def check_plain(folder: Path, names: Iterable[str]) -> None:
    """Raise FleetError for a link or anything else that is no plain file."""
    for name in names:
        path = folder / name
        if not os.path.lexists(path):
            raise FleetError(f"{path} is not there")
        if path.is_symlink() or not path.is_file() or path.stat().st_nlink > 1:
            hint = "`cp -rL FOLDER COPY` makes a folder of plain files"
            raise FleetError(f"{path} is a link or no plain file; an artifact holds plain files alone: {hint}")
        if not path.resolve().is_relative_to(folder.resolve()):
            raise FleetError(f"{path} lies behind a link that leads out of the folder")


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


def description_toml(description: Description) -> str:
    """Write a description as `spillway.toml` has it."""
    return "\n".join(_toml(_filled(msgspec.to_builtins(description, str_keys=True)), "")) + "\n"


def _filled(table: dict[str, Any]) -> dict[str, Any]:
    """Return a table without what is empty or was never given."""
    inner = {
        name: _filled(value)
        if isinstance(value, dict)
        else [_filled(one) if isinstance(one, dict) else one for one in value]
        if isinstance(value, list)
        else value
        for name, value in table.items()
    }
    return {name: value for name, value in inner.items() if value not in ({}, [], "", None)}


def _toml(table: dict[str, Any], path: str) -> Iterator[str]:
    """Give the lines of a table, its plain members first, then the tables inside it."""
    for name, value in table.items():
        if not _is_table(value):
            yield f"{_toml_key(name)} = {_toml_value(value)}"
    for name, value in table.items():
        inner = f"{path}.{_toml_key(name)}".lstrip(".")
        if isinstance(value, dict):
            yield from ("", f"[{inner}]", *_toml(value, inner))
        elif _is_table(value):
            for one in value:
                yield from ("", f"[[{inner}]]", *_toml(one, inner))


def _is_table(value: object) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def _toml_key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml_value(name)


def _toml_value(value: object) -> str:
    """Write a text, number, truth or list; JSON's strings are TOML's basic strings."""
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(one) for one in value) + "]"
    return msgspec.json.encode(value).decode()
