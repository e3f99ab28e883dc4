"""The signed description of an artifact: values, parsing and canonical bytes. Pure: no I/O, no clock."""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from typing import Final

import msgspec


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of an artifact; `frames` are (length in bytes, sha256 in hex) in order."""

    path: str
    length: int
    sha256: str
    frames: list[tuple[int, str]]


class Requires(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a box must have to run a variant; an empty field asks nothing."""

    architectures: list[str] = []
    backend: str = ""
    backend_version: str = ""
    memory_mb: int = 0
    accelerator: str = ""


class Variant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One way to run the model: the files it needs and what it asks of the box."""

    name: str
    files: list[str]
    requires: Requires = Requires()


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What one request or batch may hold; `context_tokens` 0 means the model counts no tokens."""

    context_tokens: int = 0
    batch: int = 1


class Golden(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A recorded question and answer; numbers in `expected` may differ by `tolerance`.

    `variants` names those that it was recorded on and is asked of; none means all.
    """

    content_type: str
    body: bytes
    expected: msgspec.Raw
    tolerance: float
    variants: list[str] = []


class Budget(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a version may cost on a box: 95th percentile in ms, memory in MiB; 0 means no bound."""

    p95_ms: float = 0.0
    memory_mb: int = 0


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a version is; the SHA-256 of its bytes is the version's identity (PROTOCOL 6)."""

    schema: int
    name: str
    version: str
    task: str
    format: str
    variants: list[Variant]
    files: list[FileEntry]
    limits: Limits = Limits()
    golden: list[Golden] = []
    budget: Budget = Budget()
    provenance: dict[str, object] = {}


class ManifestError(ValueError):
    """A manifest that breaks PROTOCOL 6; the message names the field."""


class BoxFacts(msgspec.Struct, frozen=True):
    """What a box offers a variant: `backends` maps a backend's name to its version; memory in MiB (0: unknown)."""

    architecture: str
    backends: dict[str, str] = {}
    memory_mb: int = 0
    accelerators: list[str] = []


class _Schema(msgspec.Struct):
    schema: int


SCHEMA: Final = 1
MAX_MANIFEST_BYTES: Final = 4 << 20
MAX_FRAME_BYTES: Final = 4 << 20
MAX_PATH_BYTES: Final = 1024
MAX_PART_BYTES: Final = 255
RESERVED_PATHS: Final = frozenset({"manifest.json"})
"""Names a store keeps for itself beside an artifact's files."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def is_name(text: str) -> bool:
    """Whether `text` names a device, model, client, group or pool (PROTOCOL 0)."""
    return _NAME.fullmatch(text) is not None


def is_version(text: str) -> bool:
    """Whether `text` is a version (PROTOCOL 0)."""
    return _VERSION.fullmatch(text) is not None


def is_sha256(text: str) -> bool:
    """Whether `text` is a SHA-256 in lower-case hex."""
    return _SHA256.fullmatch(text) is not None


def digest_of(raw: bytes) -> str:
    """Return the SHA-256 of `raw` in hex: of a manifest's bytes, the version's identity."""
    return hashlib.sha256(raw).hexdigest()


def manifest_bytes(manifest: Manifest) -> bytes:
    """Return the canonical bytes of a manifest: JSON with sorted keys and no spaces."""
    return msgspec.json.encode(manifest, order="sorted")


def parse_manifest(raw: bytes) -> Manifest:
    """Return the manifest that `raw` holds; raises ManifestError naming the field (PROTOCOL 6)."""
    if len(raw) > MAX_MANIFEST_BYTES:
        raise ManifestError(f"manifest: {len(raw)} bytes are over the limit of {MAX_MANIFEST_BYTES}")
    try:
        schema = msgspec.json.decode(raw, type=_Schema).schema
        if schema != SCHEMA:
            raise ManifestError(f"schema: {schema} is not known")
        manifest = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ManifestError(f"manifest: {error}") from error
    _check(manifest)
    return manifest


def pick_variant(manifest: Manifest, box: BoxFacts) -> Variant:
    """Return the first variant that the box can run; raises ManifestError saying what each one asks for."""
    lacks: list[str] = []
    for variant in manifest.variants:
        lack = _lack(variant.requires, box)
        if lack is None:
            return variant
        lacks.append(f"{variant.name} {lack}")
    raise ManifestError("variants: none runs here: " + "; ".join(lacks))


def variant_files(manifest: Manifest, variant: Variant) -> list[FileEntry]:
    """Return the file entries of a variant, in the manifest's order."""
    wanted = set(variant.files)
    return [entry for entry in manifest.files if entry.path in wanted]


def variant_golden(manifest: Manifest, variant: str) -> list[Golden]:
    """Return the golden samples that a variant must reproduce."""
    return [golden for golden in manifest.golden if not golden.variants or variant in golden.variants]


def _lack(requires: Requires, box: BoxFacts) -> str | None:
    if requires.architectures and box.architecture not in requires.architectures:
        return f"asks for {' or '.join(requires.architectures)}"
    if requires.backend and requires.backend not in box.backends:
        return f"asks for {requires.backend}"
    if _numbers(box.backends.get(requires.backend, "")) < _numbers(requires.backend_version):
        return f"asks for {requires.backend} {requires.backend_version}"
    if box.memory_mb and requires.memory_mb > box.memory_mb:
        return f"asks for {requires.memory_mb} MiB of memory"
    if requires.accelerator and requires.accelerator not in box.accelerators:
        return f"asks for {requires.accelerator}"
    return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:4])


def _require(holds: object, field: str, message: str) -> None:
    if not holds:
        raise ManifestError(f"{field}: {message}")


def _check(manifest: Manifest) -> None:
    _require(is_name(manifest.name), "name", f"{manifest.name!r} is no name")
    _require(is_version(manifest.version), "version", f"{manifest.version!r} is no version")
    _require(is_name(manifest.task), "task", f"{manifest.task!r} is no task")
    _require(is_name(manifest.format), "format", f"{manifest.format!r} is no format")
    _check_files(manifest.files)
    _check_variants(manifest)
    _require(manifest.limits.context_tokens >= 0, "limits.context_tokens", "is below 0")
    _require(manifest.limits.batch >= 1, "limits.batch", "is below 1")
    _require(0 <= manifest.budget.p95_ms < math.inf, "budget.p95_ms", "is no time")
    _require(manifest.budget.memory_mb >= 0, "budget.memory_mb", "is below 0")
    for number, golden in enumerate(manifest.golden):
        _require(0 <= golden.tolerance < math.inf, f"golden[{number}].tolerance", "is no tolerance")
        known = set(golden.variants) <= {variant.name for variant in manifest.variants}
        _require(known, f"golden[{number}].variants", "name a variant that is not there")


def _check_files(files: list[FileEntry]) -> None:
    _require(bool(files), "files", "are none")
    seen: dict[str, str] = {}
    for number, entry in enumerate(files):
        field = f"files[{number}]"
        _check_path(entry.path, f"{field}.path")
        twin = seen.setdefault(entry.path.casefold(), entry.path)
        _require(twin is entry.path, f"{field}.path", f"{entry.path!r} is there twice, as {twin!r}")
        _check_frames(entry, field)
    for folded, path in seen.items():
        parents = ("/".join(folded.split("/")[:depth]) for depth in range(1, folded.count("/") + 1))
        _require(not any(parent in seen for parent in parents), "files", f"{path!r} lies under another file")


def _check_path(path: str, field: str) -> None:
    _require(0 < len(path.encode()) <= MAX_PATH_BYTES, field, f"is empty or over {MAX_PATH_BYTES} bytes")
    _require(unicodedata.is_normalized("NFC", path), field, "is not in NFC")
    _require("\\" not in path, field, "holds a backslash")
    _require(not any(unicodedata.category(sign) in _HIDDEN for sign in path), field, "holds a control character")
    for part in path.split("/"):
        _require(part not in {"", ".", ".."}, field, f"{path!r} is not a plain relative path")
        _require(len(part.encode()) <= MAX_PART_BYTES, field, f"has a part over {MAX_PART_BYTES} bytes")
    _require(path.partition("/")[0].casefold() not in RESERVED_PATHS, field, f"{path!r} is reserved")


def _check_frames(entry: FileEntry, field: str) -> None:
    _require(is_sha256(entry.sha256), f"{field}.sha256", "is no SHA-256")
    for length, sha256 in entry.frames:
        _require(0 < length <= MAX_FRAME_BYTES, f"{field}.frames", f"a frame of {length} bytes")
        _require(is_sha256(sha256), f"{field}.frames", "a SHA-256 is malformed")
    total = sum(length for length, _ in entry.frames)
    _require(entry.length == total, f"{field}.length", f"{entry.length} is not the frames' {total}")


def _check_variants(manifest: Manifest) -> None:
    _require(bool(manifest.variants), "variants", "are none")
    paths = {entry.path for entry in manifest.files}
    names: set[str] = set()
    for number, variant in enumerate(manifest.variants):
        field = f"variants[{number}]"
        _require(is_name(variant.name), f"{field}.name", f"{variant.name!r} is no name")
        _require(variant.name not in names, f"{field}.name", f"{variant.name!r} is there twice")
        names.add(variant.name)
        _require(bool(variant.files), f"{field}.files", "are none")
        _require(len(set(variant.files)) == len(variant.files), f"{field}.files", "name a file twice")
        _require(set(variant.files) <= paths, f"{field}.files", "name a file that is not in files")
        _require(variant.requires.memory_mb >= 0, f"{field}.requires.memory_mb", "is below 0")
