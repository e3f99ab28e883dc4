"""A kill or a power cut at every step of a sync pass (FAULTS A17-A20, B4, B12)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cloud_sync.errors import TrustError
from cloud_sync.store import Store
from cloud_sync.sync import sync_once
from cloud_sync.sync_settings import SyncOutcome, SyncSettings
from tests.fakes.fleets import Fleet, holds
from tests.fakes.power import Ended, emptied, halved, lose_unsynced, run_watched, zeroed

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

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


def watched(settings: SyncSettings, at: int = 0) -> Ended:
    """Run a pass that is killed at its n-th step."""
    return run_watched(lambda: run_pass(settings), Path(settings.state_dir), at)


def not_whole(fleet: Fleet) -> set[str]:
    """The visible versions that lack a file or hold a wrong one."""
    store = Store(fleet.state(), reserve_bytes=0)
    found = set()
    for digest in store.digests():
        manifest = store.manifest(digest)
        if manifest is None or not store.has(digest, manifest.files) or store.damage(digest):
            found.add(digest)
    return found


class Saved:
    """A box's state, to begin again from."""

    def __init__(self, fleet: Fleet) -> None:
        self.state = fleet.state()
        self.copy = fleet.folder / "saved"
        shutil.copytree(self.state, self.copy)

    def restore(self) -> None:
        shutil.rmtree(self.state)
        shutil.copytree(self.copy, self.state)


def settings_of(fleet: Fleet, one: str) -> SyncSettings:
    return fleet.settings(keep=[one])


def test_a18_a_kill_at_any_step_leaves_old_or_new_and_the_next_pass_finishes(fleet: Fleet) -> None:
    one = run_pass(fleet.settings()).models[0].digest
    fleet.run("deploy", "all", "digits=2")
    saved = Saved(fleet)
    settings = fleet.settings(keep=[one])
    steps = watched(settings).steps
    assert steps > 40
    for at in range(1, steps + 1):
        saved.restore()
        assert watched(settings, at).killed
        assert not not_whole(fleet), at
        assert holds(fleet.state() / "versions" / one, ONE), at
        outcome = run_pass(settings)
        assert holds(Path(outcome.models[0].folder), TWO), at
        assert not not_whole(fleet), at


@pytest.mark.parametrize("damage", [emptied, zeroed, halved])
def test_a17_b4_a_power_cut_at_any_step_leaves_old_or_new_and_trust_goes_forward_only(
    fleet: Fleet, damage: Callable[[bytes], bytes]
) -> None:
    older = fleet.folder / "older"
    shutil.copytree(fleet.objects, older)
    one = run_pass(fleet.settings()).models[0].digest
    fleet.run("refresh")
    run_pass(fleet.settings())
    fleet.run("deploy", "all", "digits=2")
    saved = Saved(fleet)
    settings = fleet.settings(keep=[one])
    lost = 0
    for at in range(1, watched_steps(saved, settings) + 1):
        saved.restore()
        ended = watched(settings, at)
        assert ended.killed
        lost += lose_unsynced(fleet.state(), ended, damage)
        assert not not_whole(fleet), at
        assert holds(fleet.state() / "versions" / one, ONE), at
        with pytest.raises(TrustError) as caught:
            run_pass(fleet.settings(repository=f"file://{older}"))
        assert caught.value.code == "rollback", at
        assert holds(Path(run_pass(settings).models[0].folder), TWO), at
    assert lost > 10


def watched_steps(saved: Saved, settings: SyncSettings) -> int:
    saved.restore()
    return watched(settings).steps


@pytest.mark.parametrize("damage", [emptied, zeroed])
def test_a17_a_power_cut_after_a_first_pass_loses_nothing_of_it(fleet: Fleet, damage: Callable[[bytes], bytes]) -> None:
    before = fleet.folder / "before"
    shutil.copytree(fleet.objects, before)
    fleet.run("deploy", "all", "digits=2")
    ended = watched(fleet.settings())
    assert ended.code == 0
    lose_unsynced(fleet.state(), ended, damage)
    assert not not_whole(fleet)
    with pytest.raises(TrustError) as caught:
        run_pass(fleet.settings(repository=f"file://{before}"))
    assert caught.value.code == "rollback"
    assert not {Path(folder).relative_to(fleet.state()).as_posix() for folder in ended.folders}


def test_a19_a_kill_at_any_step_of_a_repair_or_a_pruning_leaves_whole_versions(fleet: Fleet) -> None:
    fleet.publish("3", {**ONE, "config.json": b"{ }"})
    digests = []
    for version in ("1", "3", "2"):
        fleet.run("deploy", "all", f"digits={version}")
        digests.append(run_pass(fleet.settings()).models[0].digest)
    one, _, two = digests
    damaged = fleet.state() / "versions" / one / "model.onnx"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    saved = Saved(fleet)
    settings = fleet.settings(keep=[one], scrub=[one])
    steps = watched(settings).steps
    assert steps > 10
    for at in range(1, steps + 1):
        saved.restore()
        assert watched(settings, at).killed
        assert not_whole(fleet) <= {one}, at
        run_pass(settings)
        assert Store(fleet.state()).digests() == sorted([one, two]), at
        assert not not_whole(fleet), at


def test_b12_what_was_fetched_before_a_cut_is_not_fetched_again(fleet: Fleet) -> None:
    files = {f"part-{number}": os.urandom(20_000) for number in range(8)}
    fleet.publish("3", files)
    fleet.run("deploy", "all", "digits=3")
    steps = watched_steps_of_a_copy(fleet)
    assert watched(fleet.settings(), steps - 15).killed
    outcome = run_pass(fleet.settings())
    assert holds(Path(outcome.models[0].folder), files)
    assert outcome.bytes_in < 20_000


def watched_steps_of_a_copy(fleet: Fleet) -> int:
    return watched(fleet.settings("box-2")).steps


@pytest.mark.parametrize("at", range(1, 12, 2))
def test_a20_a_sync_that_fails_is_told_and_not_taken_for_done(fleet: Fleet, at: int) -> None:
    settings = fleet.settings()

    def failing() -> None:
        real, calls = os.fsync, iter(range(1, 1000))

        def fsync(handle: int) -> None:
            if next(calls) == at:
                raise OSError(5, "Input/output error")
            real(handle)

        os.fsync = fsync  # type: ignore[assignment]
        outcome = run_pass(settings)
        assert outcome.models[0].error is None

    assert run_watched(failing, fleet.state()).code == 99
    assert not not_whole(fleet)
    assert run_pass(settings).models[0].staged
