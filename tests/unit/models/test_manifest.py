"""The signed description of an artifact: what is accepted, and that nothing else is (FAULTS A12-A14, E12)."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.manifest import (
    MAX_MANIFEST_BYTES,
    BoxFacts,
    Manifest,
    ManifestError,
    Requires,
    Variant,
    digest_of,
    manifest_bytes,
    parse_manifest,
    pick_variant,
    variant_files,
)
from tests.fakes.artifacts import manifest_of

FILES = {"model.onnx": b"m" * 2500, "tokens/vocab.txt": b"a\nb\n"}


def changed(**changes: Any) -> bytes:
    """The manifest's JSON with some fields replaced; a field `a__b` lies in the first element of `a`."""
    plain = json.loads(manifest_bytes(manifest_of(FILES)))
    for name, value in changes.items():
        outer, _, inner = name.partition("__")
        if inner:
            place = plain[outer][0] if isinstance(plain[outer], list) else plain[outer]
            place[inner] = value
        else:
            plain[outer] = value
    return json.dumps(plain).encode()


def test_a_manifest_survives_its_bytes() -> None:
    manifest = manifest_of(FILES)
    assert parse_manifest(manifest_bytes(manifest)) == manifest


def test_equal_manifests_have_equal_bytes_and_digests() -> None:
    raw = manifest_bytes(manifest_of(FILES))
    assert manifest_bytes(parse_manifest(raw)) == raw
    assert digest_of(raw) == digest_of(bytes(raw))
    assert b", " not in raw
    assert raw.index(b'"files"') < raw.index(b'"format"') < raw.index(b'"name"')


BAD_PATHS = [
    "",
    "/etc/passwd",
    "../../x",
    "a/../b",
    "a//b",
    "./a",
    "a/.",
    "a/",
    "a\\b",
    "nul\0byte",
    "bell\a",
    "line\nbreak",
    "right-to-left\u202e",
    "zero\u200bwidth",
    "cafe\u0301",
    "manifest.json",
    "MANIFEST.json",
    "x" * 256,
    "/".join(["deep"] * 300),
    "y" * 4096,
]


@pytest.mark.parametrize("path", BAD_PATHS)
def test_a13_a_path_that_could_leave_the_folder_or_mislead_is_refused(path: str) -> None:
    raw = changed(files__path=path, variants=[{"name": "default", "files": [path]}])
    with pytest.raises(ManifestError, match=r"files\[0\]\.path"):
        parse_manifest(raw)


@pytest.mark.parametrize("twins", [("model.onnx", "Model.ONNX"), ("a/b", "A/B"), ("straße", "STRASSE"), ("a", "a/b")])
def test_a13_paths_that_collide_on_some_file_system_are_refused(twins: tuple[str, str]) -> None:
    with pytest.raises(ManifestError, match="files"):
        parse_manifest(manifest_bytes(manifest_of(dict.fromkeys(twins, b"x"))))


@given(st.text(max_size=40))
def test_a13_an_accepted_path_stays_below_its_folder(path: str) -> None:
    try:
        parse_manifest(manifest_bytes(manifest_of({path: b"x"})))
    except ManifestError:
        return
    assert not path.startswith("/")
    assert not {"", ".", ".."} & set(path.split("/"))
    assert "\0" not in path


@pytest.mark.parametrize(
    ("field", "raw"),
    [
        ("schema", changed(schema=2)),
        ("schema", changed(schema=0)),
        ("name", changed(name="Digits")),
        ("name", changed(name="../digits")),
        ("version", changed(version="1/0")),
        ("task", changed(task="")),
        ("format", changed(format="Pickle!")),
        ("files", changed(files=[])),
        ("files[0].length", changed(files__length=2501)),
        ("files[0].frames", changed(files__frames=[[5 << 20, "0" * 64]])),
        ("files[0].frames", changed(files__frames=[[0, "0" * 64]])),
        ("files[0].frames", changed(files__frames=[[2500, "0" * 63]])),
        ("files[0].sha256", changed(files__sha256="G" * 64)),
        ("variants", changed(variants=[])),
        ("variants[0].files", changed(variants__files=["other.onnx"])),
        ("variants[0].files", changed(variants__files=[])),
        ("variants[0].files", changed(variants__files=["model.onnx", "model.onnx"])),
        ("variants[0].requires.memory_mb", changed(variants__requires={"memory_mb": -1})),
        ("variants[1].name", changed(variants=[{"name": "a", "files": ["model.onnx"]}] * 2)),
        ("limits.batch", changed(limits={"batch": 0})),
        ("limits.context_tokens", changed(limits={"context_tokens": -1})),
        ("budget.p95_ms", changed(budget={"p95_ms": -1.0})),
        ("surprise", changed(surprise=True)),
        ("manifest", b"[1]"),
        ("manifest", b"\xff"),
        ("manifest", b'{"schema": 1, "name": NaN}'),
        ("manifest", b'{"schema": 1, "provenance": ' + b'{"a":' * 200_000),
        ("manifest", b" " * (MAX_MANIFEST_BYTES + 1)),
    ],
)
def test_what_breaks_the_format_is_refused_by_field(field: str, raw: bytes) -> None:
    with pytest.raises(ManifestError) as caught:
        parse_manifest(raw)
    assert field in str(caught.value)


@given(st.binary(max_size=300))
def test_garbage_is_one_kind_of_error(raw: bytes) -> None:
    with pytest.raises(ManifestError):
        parse_manifest(raw)


def with_variants(*requires: Requires) -> Manifest:
    variants = [Variant(f"v{number}", ["model.onnx"], one) for number, one in enumerate(requires)]
    return msgspec.structs.replace(manifest_of(FILES), variants=variants)


BOX = BoxFacts("aarch64", {"onnxruntime": "1.23.0"}, memory_mb=4096, accelerators=["cuda"])


@pytest.mark.parametrize(
    "requires",
    [
        Requires(),
        Requires(architectures=["x86_64", "aarch64"]),
        Requires(backend="onnxruntime", backend_version="1.9"),
        Requires(memory_mb=4096, accelerator="cuda"),
    ],
)
def test_a_box_takes_a_variant_that_asks_for_what_it_has(requires: Requires) -> None:
    assert pick_variant(with_variants(requires), BOX).name == "v0"


@pytest.mark.parametrize(
    "requires",
    [
        Requires(architectures=["x86_64"]),
        Requires(backend="litert"),
        Requires(backend="onnxruntime", backend_version="1.100"),
        Requires(memory_mb=4097),
        Requires(accelerator="npu"),
    ],
)
def test_a12_a_variant_for_other_hardware_is_not_taken(requires: Requires) -> None:
    with pytest.raises(ManifestError, match="v0 asks for"):
        pick_variant(with_variants(requires), BOX)
    assert pick_variant(with_variants(requires, Requires()), BOX).name == "v1"


def test_a_variants_files_are_in_the_manifests_order() -> None:
    manifest = manifest_of(FILES)
    assert [entry.path for entry in variant_files(manifest, manifest.variants[0])] == list(FILES)
    assert [entry.path for entry in variant_files(manifest, Variant("one", ["model.onnx"]))] == ["model.onnx"]
