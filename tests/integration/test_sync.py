"""A box's sync pass against a folder: staged whole or not at all, whatever happens (FAULTS A1, A12, A18-A30, B12)."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cloud_sync.disk import locked
from cloud_sync.errors import CloudError
from cloud_sync.store import Store
from cloud_sync.sync import sync_once
from cloud_sync.sync_settings import SyncOutcome, SyncProgress, SyncSettings
from models.manifest import BoxFacts
from tests.fakes.fleets import Fleet, digest_of_folder, error_of, holds, outcome_of, sync

ONE = {"model.onnx": bytes(range(256)) * 40, "vocab/words.txt": b"one two three\n" * 50, "config.json": b"{}"}
TWO = {**ONE, "model.onnx": bytes(range(255, -1, -1)) * 44}


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    """A fleet that has published two versions and deployed the first."""
    fleet = Fleet(tmp_path)
    fleet.publish("1", ONE)
    fleet.publish("2", TWO)
    fleet.run("deploy", "all", "digits=1")
    return fleet


def run_pass(settings: SyncSettings) -> SyncOutcome:
    return sync_once(settings, Path(settings.state_dir))


def version_folder(fleet: Fleet, outcome: SyncOutcome) -> Path:
    model = outcome.models[0]
    assert model.staged, model.error
    return fleet.state() / "versions" / model.digest


def test_a_pass_stages_what_is_deployed_and_tells_how_far_it_is(fleet: Fleet) -> None:
    code, events = sync(fleet.settings())
    assert code == 0
    assert any(isinstance(event, SyncProgress) for event in events)
    outcome = outcome_of(events)
    folder = version_folder(fleet, outcome)
    assert holds(folder, ONE)
    assert digest_of_folder(folder) == outcome.models[0].digest
    assert outcome.bytes_in > 0
    assert outcome.clock_trusted


def test_a_second_pass_costs_the_timestamp_alone(fleet: Fleet) -> None:
    first = run_pass(fleet.settings())
    second = run_pass(fleet.settings())
    assert second.models == first.models
    assert second.bytes_in == (fleet.objects / "metadata/timestamp.json").stat().st_size


def test_files_that_did_not_change_are_not_fetched_again(fleet: Fleet) -> None:
    files = {"weights": os.urandom(50_000), "config.json": b"{}"}
    fleet.publish("3", files)
    fleet.publish("4", {**files, "config.json": b"{ }"})
    fleet.run("deploy", "all", "digits=3")
    run_pass(fleet.settings())
    fleet.run("deploy", "all", "digits=4")
    outcome = run_pass(fleet.settings())
    assert holds(version_folder(fleet, outcome), {**files, "config.json": b"{ }"})
    assert outcome.bytes_in < 20_000


def test_a_pass_prunes_what_nobody_names_after_it_staged_all(fleet: Fleet) -> None:
    one = run_pass(fleet.settings()).models[0].digest
    fleet.run("deploy", "all", "digits=2")
    outcome = run_pass(fleet.settings(keep=[one]))
    two = outcome.models[0].digest
    assert sorted(Store(fleet.state()).digests()) == sorted([one, two])
    assert run_pass(fleet.settings(keep=[])).pruned == [one]
    assert Store(fleet.state()).digests() == [two]


def test_a_model_that_cannot_be_had_stops_no_other(fleet: Fleet) -> None:
    fleet.publish("1", {"other.onnx": b"other"}, name="broken")
    fleet.run("deploy", "all", "broken=1")
    for path in (fleet.objects / "targets/models/broken").iterdir():
        path.unlink()
    code, events = sync(fleet.settings())
    broken, digits = outcome_of(events).models
    assert code == 1
    assert broken.error is not None
    assert broken.error.code == "not_found"
    assert digits.staged


def test_a1_a_pack_with_other_bytes_is_refused_and_what_ran_stays(fleet: Fleet) -> None:
    before = version_folder(fleet, run_pass(fleet.settings()))
    fleet.run("deploy", "all", "digits=2")
    for path in (fleet.objects / "packs").rglob("*"):
        if path.is_file():
            path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))
    outcome = run_pass(fleet.settings())
    assert outcome.models[0].error is not None
    assert outcome.models[0].error.code == "arbitrary_software"
    assert holds(before, ONE)
    assert not (fleet.state() / "versions" / outcome.models[0].digest).exists()


@pytest.mark.parametrize("box", [BoxFacts("x86_64"), BoxFacts("x86_64", {"litert": "2.0"})])
def test_a12_a_model_for_another_runtime_is_wrong_software(fleet: Fleet, box: BoxFacts) -> None:
    outcome = run_pass(fleet.settings(box=box))
    assert outcome.models[0].error is not None
    assert outcome.models[0].error.code == "wrong_software"
    assert not (fleet.state() / "partial").exists() or not list((fleet.state() / "partial").iterdir())


def test_a_version_that_failed_here_is_not_fetched_again(fleet: Fleet) -> None:
    digest = fleet.publish("3", {"model.onnx": b"bad"})
    fleet.run("deploy", "all", "digits=3")
    outcome = run_pass(fleet.settings(failed=[digest]))
    assert outcome.models[0].error is not None
    assert outcome.models[0].error.code == "failed_before"
    assert not Store(fleet.state()).digests()


def test_a_version_that_failed_here_is_fetched_again_once_admins_decide_for_it_anew(fleet: Fleet) -> None:
    digest = fleet.publish("3", {"model.onnx": b"bad"})
    fleet.run("deploy", "all", "digits=3")
    (told,) = run_pass(fleet.settings(failed=[digest])).models
    assert told.decision
    again = fleet.settings(failed=[digest], decided={digest: told.decision})
    assert [one.error.code for one in run_pass(again).models if one.error] == ["failed_before"]
    fleet.run("deploy", "all", "digits=1")
    fleet.run("deploy", "all", "digits=3")
    (anew,) = run_pass(again).models
    assert (anew.staged, anew.decision == told.decision) == (True, False)


def test_a_group_without_a_deployment_is_told_and_the_others_decide(fleet: Fleet) -> None:
    outcome = run_pass(fleet.settings(groups=["canary", "all"]))
    assert [problem.code for problem in outcome.errors] == ["no_deployment"]
    assert outcome.models[0].staged


def test_an_artifact_over_the_limit_is_not_begun(fleet: Fleet) -> None:
    outcome = run_pass(fleet.settings(max_artifact_bytes=1000))
    assert outcome.models[0].error is not None
    assert outcome.models[0].error.code == "too_large"


def test_a24_a_second_pass_at_the_same_time_ends_cleanly(fleet: Fleet) -> None:
    fleet.state().mkdir()
    with locked(fleet.state() / "sync.lock"):
        code, events = sync(fleet.settings())
    assert (code, error_of(events)) == (75, "locked")
    assert sync(fleet.settings())[0] == 0


def test_settings_that_do_not_parse_are_a_bad_configuration() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "cloud_sync.sync"], input=b"{}", stdout=subprocess.PIPE, check=False, timeout=60
    )
    assert ran.returncode == 78
    assert msgspec.json.decode(ran.stdout)["code"] == "bad_settings"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"root": "/nowhere/root.json"}, "no_root"),
        ({"repository": "ftp://example"}, "bad_address"),
        ({"repository": "file:///nowhere"}, "not_found"),
    ],
)
def test_what_keeps_a_pass_from_beginning_is_named(fleet: Fleet, changes: dict[str, Any], code: str) -> None:
    assert error_of(sync(fleet.settings(**changes))[1]) == code


def test_a27_of_versions_that_come_faster_than_they_are_fetched_the_latest_is_staged(fleet: Fleet) -> None:
    for number in range(3, 8):
        fleet.publish(str(number), {"model.onnx": os.urandom(3000)})
        fleet.run("deploy", "all", f"digits={number}")
        if number < 6:
            break_off(fleet)
    outcome = run_pass(fleet.settings(keep=[]))
    assert outcome.models[0].version == "7"
    assert Store(fleet.state()).digests() == [outcome.models[0].digest]
    assert not list((fleet.state() / "partial").iterdir())


def break_off(fleet: Fleet) -> None:
    """A pass that loses its repository in the middle."""
    packs = fleet.objects / "packs"
    packs.rename(fleet.folder / "away")
    run_pass(fleet.settings())
    (fleet.folder / "away").rename(packs)


def test_a29_a_damaged_version_is_found_and_its_frame_fetched_again(fleet: Fleet) -> None:
    outcome = run_pass(fleet.settings())
    folder = version_folder(fleet, outcome)
    digest = outcome.models[0].digest
    flip(folder / "model.onnx")
    assert not run_pass(fleet.settings()).repaired
    assert run_pass(fleet.settings(scrub=[digest])).repaired == [digest]
    assert holds(folder, ONE)


def test_a29_a_damaged_version_that_is_no_target_is_repaired_too(fleet: Fleet) -> None:
    one = run_pass(fleet.settings()).models[0].digest
    fleet.run("deploy", "all", "digits=2")
    flip(fleet.state() / "versions" / one / "vocab/words.txt")
    outcome = run_pass(fleet.settings(scrub=[one], keep=[one]))
    assert outcome.repaired == [one]
    assert holds(fleet.state() / "versions" / one, ONE)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", ["timestamp.json", "snapshot.json", "models.json", "floor.a", "floor.b"])
def test_a30_trust_that_is_damaged_is_rebuilt(fleet: Fleet, name: str) -> None:
    first = run_pass(fleet.settings())
    (fleet.state() / "trust" / name).write_bytes(b"")
    second = run_pass(fleet.settings())
    assert second.metadata_versions == first.metadata_versions
    assert (fleet.state() / "trust" / name).stat().st_size > 0


def limited(settings: SyncSettings, file_bytes: int) -> tuple[int, str]:
    """Run a pass in a process that may write no file longer than this; return its exit code and first problem."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    code, events = sync(settings, preexec_fn=limit)
    last = events[-1]
    if isinstance(last, SyncOutcome):
        error = last.models[0].error
        return code, error.code if error else ""
    return code, error_of(events)


@pytest.mark.parametrize("file_bytes", [0, 300, 1500, 5000])
def test_a21_a_full_disk_ends_the_pass_and_what_ran_stays(fleet: Fleet, file_bytes: int) -> None:
    before = version_folder(fleet, run_pass(fleet.settings()))
    fleet.run("deploy", "all", "digits=2")
    assert limited(fleet.settings(), file_bytes) == (1, "no_space")
    assert holds(before, ONE)
    assert not any((fleet.state() / "partial").iterdir())
    assert not list(fleet.state().rglob("*.new"))
    assert run_pass(fleet.settings()).models[0].staged


def test_a21_the_reserve_is_left_alone(fleet: Fleet) -> None:
    outcome = run_pass(fleet.settings(reserve_bytes=1 << 62))
    assert outcome.models[0].error is not None
    assert outcome.models[0].error.code == "no_space"


def test_a_state_folder_that_cannot_be_made_is_told(fleet: Fleet) -> None:
    (fleet.folder / "in-the-way").write_text("")
    code, events = sync(fleet.settings(state_dir=str(fleet.folder / "in-the-way" / "state")))
    assert (code, error_of(events)) == (1, "disk")


def test_a_pass_lowers_its_own_priority(fleet: Fleet) -> None:
    script = "import os, sys; from cloud_sync.sync import main; main(); print(os.nice(0))"
    ran = subprocess.run(
        [sys.executable, "-c", script],
        input=msgspec.json.encode(fleet.settings()),
        stdout=subprocess.PIPE,
        check=True,
        timeout=60,
    )
    assert int(ran.stdout.splitlines()[-1]) >= 10


def test_every_error_of_a_pass_has_a_code(fleet: Fleet) -> None:
    with pytest.raises(CloudError) as caught:
        run_pass(fleet.settings(built="2099-01-01T00:00:00Z"))
    assert caught.value.code == "freeze"
