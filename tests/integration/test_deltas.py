"""An update costs what changed: delta packs from publish to a staged version (FAULTS A16, A29)."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest

from cloud_sync.sources import Sources, parse_sources
from cloud_sync.sync import sync_once
from cloud_sync.sync_settings import SyncOutcome
from tests.fakes.fleets import Fleet, holds

NUMBERS = 40_000


def weights(values: list[float]) -> bytes:
    """Return a safetensors file with one float32 tensor."""
    header = json.dumps(
        {"layer": {"dtype": "F32", "shape": [len(values)], "data_offsets": [0, 4 * len(values)]}}
    ).encode()
    return struct.pack("<Q", len(header)) + header + struct.pack(f"<{len(values)}f", *values)


def versions() -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Return a model and the same a little further trained, with a word more."""
    source = random.Random(4)
    first = [source.gauss(0, 0.05) for _ in range(NUMBERS)]
    tuned = [value * (1 + source.gauss(0, 1e-4)) for value in first]
    words = "".join(f"word{at} {source.random()}\n" for at in range(5000))
    return (
        {"model.safetensors": weights(first), "words.txt": words.encode(), "model.onnx": b"graph"},
        {"model.safetensors": weights(tuned), "words.txt": f"new {words}".encode(), "model.onnx": b"graph"},
    )


ONE, TWO = versions()


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    """A fleet whose boxes run version 1, and version 2 is published."""
    fleet = Fleet(tmp_path)
    fleet.publish("1", ONE)
    fleet.run("deploy", "all", "digits=1")
    return fleet


def publish(fleet: Fleet, version: str, files: dict[str, bytes], *options: str) -> dict[str, Any]:
    """Publish files as a version and return the whole report."""
    folder = fleet.model_folder(files, f"digits-{version}")
    report: dict[str, Any] = fleet.run("publish", str(folder), "--name", "digits", "--version", version, *options)
    return report


def run_pass(fleet: Fleet) -> SyncOutcome:
    return sync_once(fleet.settings(), Path(fleet.settings().state_dir))


def updated(fleet: Fleet) -> SyncOutcome:
    fleet.run("deploy", "all", "digits=2")
    outcome = run_pass(fleet)
    assert outcome.models[0].staged, outcome.models[0].error
    assert holds(fleet.state() / "versions" / outcome.models[0].digest, TWO)
    return outcome


def sources(fleet: Fleet) -> Sources:
    (path,) = (fleet.objects / "targets/models/digits").glob("*.2.sources.json")
    return parse_sources(path.read_bytes())


def described(fleet: Fleet) -> int:
    """Bytes of everything that is signed, the most that a look can cost beside the packs."""
    folders = (fleet.objects / "metadata", fleet.objects / "targets")
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


def test_a_box_with_the_version_before_fetches_what_changed(fleet: Fleet) -> None:
    run_pass(fleet)
    report = publish(fleet, "2", TWO)
    assert report["bytes_from"]["1"] < 0.6 * report["pack_bytes"]
    outcome = updated(fleet)
    assert outcome.bytes_in <= report["bytes_from"]["1"] + described(fleet)
    codecs = {entry.codec for entries in sources(fleet).frames.values() for entry in entries}
    assert {"prefix"} < codecs
    assert any(codec.startswith("delta-") for codec in codecs)


def test_a_box_without_the_version_before_fetches_it_whole(fleet: Fleet) -> None:
    fleet.publish("2", TWO)
    updated(fleet)


def test_a16_a_delta_whose_base_is_damaged_here_falls_back_to_the_whole(fleet: Fleet) -> None:
    before = run_pass(fleet).models[0].digest
    fleet.publish("2", TWO)
    path = fleet.state() / "versions" / before / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-400] ^= 64
    path.write_bytes(bytes(data))
    updated(fleet)


def test_a16_a_base_that_is_cut_short_here_falls_back_to_the_whole(fleet: Fleet) -> None:
    before = run_pass(fleet).models[0].digest
    fleet.publish("2", TWO)
    path = fleet.state() / "versions" / before / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    updated(fleet)


def test_a_delta_is_made_against_versions_that_are_asked_for(fleet: Fleet) -> None:
    fleet.run("deploy", "all", "digits=1")
    assert publish(fleet, "2", TWO, "--since")["bytes_from"] == {}
    assert set(publish(fleet, "3", {**TWO, "new": b"new"}, "--since", "1", "2")["bytes_from"]) == {"1", "2"}


def test_what_deployments_name_is_fetched_once_by_the_admin(fleet: Fleet) -> None:
    fleet.publish("2", TWO)
    kept = sorted(path.name for path in (fleet.folder / "home" / "artifacts/versions").iterdir())
    assert len(kept) == 1
    for pack in (fleet.objects / "packs").rglob("*"):
        if pack.is_file() and pack.name not in {
            entry.pack for entries in sources(fleet).frames.values() for entry in entries
        }:
            pack.unlink()
    fleet.publish("3", {**TWO, "new": b"new"})
