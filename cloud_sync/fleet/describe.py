"""`python -m cloud_sync.fleet.describe PATH`: print the manifest that a model's folder would be published with.

For programs on a box that open a folder as it lies: files are not hashed, and golden samples have no answers.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import msgspec

from cloud_sync.fleet.description import (
    BACKENDS,
    Description,
    VariantDescription,
    list_files,
    load_description,
    question,
)
from cloud_sync.fleet.errors import FleetError
from cloud_sync.fleet.samples import default_questions
from models.manifest import (
    SCHEMA,
    FileEntry,
    Golden,
    Limits,
    Manifest,
    Variant,
    digest_of,
    manifest_bytes,
    parse_manifest,
)

_EMPTY = digest_of(b"")
_GRAPHS = (".onnx", ".tflite")


def describe(path: Path) -> Manifest:
    """Return the manifest of a folder, or of one graph, as version `0`; raises FleetError that says what to type."""
    folder, description = _read(path)
    backend = BACKENDS.get(description.format)
    if backend is None:
        raise FleetError(f"the format {description.format!r} is none of {', '.join(sorted(BACKENDS))}")
    variants = [
        Variant(
            variant.name,
            variant.files,
            msgspec.structs.replace(variant.requires, backend=variant.requires.backend or backend),
        )
        for variant in description.variants
    ]
    paths = sorted({file for variant in variants for file in variant.files})
    manifest = Manifest(
        schema=SCHEMA,
        name=_name(path),
        version="0",
        task=description.task,
        format=description.format,
        variants=variants,
        files=[FileEntry(file, 0, _EMPTY, []) for file in paths],
        limits=description.limits or Limits(),
        golden=_golden(folder, description),
        budget=description.budget,
    )
    return parse_manifest(manifest_bytes(manifest))


def _read(path: Path) -> tuple[Path, Description]:
    """Return the folder and its whole description."""
    if path.is_dir():
        plain = _plain(path)
        if plain is not None:
            return path, plain
    try:
        from cloud_sync.fleet.source import read_source  # noqa: PLC0415 - needs packages that a box may lack
    except ImportError as error:
        hint = "write a spillway.toml with `task` and `format` beside the files, or `pip install onnx`"
        raise FleetError(f"{path}: what it holds cannot be told without {error.name}: {hint}") from error
    source = read_source(path)
    return source.folder, source.description


def _plain(folder: Path) -> Description | None:
    """Return the description of a folder that says all in its `spillway.toml`; None where files must be looked into."""
    description = load_description(folder)
    if description is None or not (description.task and description.format):
        return None
    files = sorted(list_files(folder))
    if not description.variants and sum(file.endswith(_GRAPHS) for file in files) > 1:
        return None
    variants = description.variants or [VariantDescription("default")]
    whole = [msgspec.structs.replace(variant, files=variant.files or files) for variant in variants]
    return msgspec.structs.replace(description, variants=whole)


def _golden(folder: Path, description: Description) -> list[Golden]:
    given = [question(folder, asked) for asked in description.golden]
    found = given or default_questions(description.task, [], chats=_chats(folder))
    return [msgspec.structs.replace(golden, tolerance=0.0) for golden in found]


def _chats(folder: Path) -> bool:
    if (folder / "chat_template.jinja").exists():
        return True
    settings = folder / "tokenizer_config.json"
    return settings.exists() and b'"chat_template"' in settings.read_bytes()


def _name(path: Path) -> str:
    """Return a model's name made of a folder's or file's."""
    plain = re.sub(
        r"[^a-z0-9._-]+", "-", path.resolve().stem.lower() if path.is_file() else path.resolve().name.lower()
    )
    return plain.strip("._-")[:64] or "model"


def main() -> int:
    """Print the manifest of the one argument; 1 and a line on standard error where it cannot be told."""
    try:
        sys.stdout.buffer.write(manifest_bytes(describe(Path(sys.argv[1]))))
    except (FleetError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
