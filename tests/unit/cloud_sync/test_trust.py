"""What a box believes of a repository that lies (FAULTS A1-A10, A17, A30, B13-B15)."""

from __future__ import annotations

import copy
import itertools
import time
import tracemalloc
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from securesystemslib.signer import CryptoSigner

from cloud_sync.errors import CloudError, FetchError, StoreError, TrustError
from cloud_sync.retry import Retry
from cloud_sync.trust import MAX_TIMESTAMP_BYTES, Trust, TrustFacts
from cloud_sync.trust_store import TrustStore
from tests.fakes.objects import endless, fails, gives
from tests.fakes.signing import NOW, Signing

BUILT = datetime(2026, 11, 22, tzinfo=UTC)
MODEL = "models/digits/1.0.0.json"
ONCE = Retry(attempts=1, sleep=lambda _: None)


@pytest.fixture
def signing() -> Signing:
    signing = Signing()
    signing.add("models", MODEL, b"manifest one")
    signing.publish("models")
    return signing


def open_trust(signing: Signing, folder: Path, *, now: datetime = NOW) -> Trust:
    return Trust(signing.objects, TrustStore(folder), signing.pinned, now=now, built=BUILT, retry=ONCE)


def refresh(signing: Signing, folder: Path, *, now: datetime = NOW) -> TrustFacts:
    return open_trust(signing, folder, now=now).refresh()


def code_of(signing: Signing, folder: Path, *, now: datetime = NOW) -> str:
    with pytest.raises(CloudError) as caught:
        refresh(signing, folder, now=now)
    return caught.value.code


def test_what_the_admins_signed_is_accepted_and_kept(signing: Signing, tmp_path: Path) -> None:
    trust = open_trust(signing, tmp_path)
    facts = trust.refresh()
    assert facts.versions["models"] == 2
    assert facts.clock_trusted
    assert trust.target(MODEL, 1000) == b"manifest one"
    assert {path.name for path in tmp_path.iterdir()} >= {"timestamp.json", "snapshot.json", "targets.json"}


def test_an_unchanged_repository_costs_two_small_requests(signing: Signing, tmp_path: Path) -> None:
    open_trust(signing, tmp_path).refresh()
    signing.objects.asked.clear()
    refresh(signing, tmp_path)
    assert [key for key, _, _ in signing.objects.asked] == ["metadata/2.root.json", "metadata/timestamp.json"]


def test_a1_other_bytes_under_a_signed_name_are_arbitrary_software(signing: Signing, tmp_path: Path) -> None:
    trust = open_trust(signing, tmp_path)
    trust.refresh()
    key = next(signing.objects.names("targets/models/"))
    signing.objects.held[key] = b"manifest two"
    with pytest.raises(TrustError) as caught:
        trust.target(MODEL, 1000)
    assert caught.value.code == "arbitrary_software"


def test_a1_metadata_signed_by_a_stranger_is_refused(signing: Signing, tmp_path: Path) -> None:
    signing.objects.held["metadata/timestamp.json"] = signing.sign("timestamp", [CryptoSigner.generate_ed25519()])
    assert code_of(signing, tmp_path) == "bad_signature"


def test_a2_an_older_timestamp_is_a_rollback_and_nothing_changes(signing: Signing, tmp_path: Path) -> None:
    old = signing.objects.held["metadata/timestamp.json"]
    signing.publish("models")
    before = refresh(signing, tmp_path)
    signing.objects.held["metadata/timestamp.json"] = old
    assert code_of(signing, tmp_path) == "rollback"
    signing.put_timestamp()
    assert refresh(signing, tmp_path) == before


@pytest.mark.parametrize("role", ["targets", "models", "deployments"])
def test_a2_a_newer_timestamp_over_older_targets_is_a_rollback(signing: Signing, tmp_path: Path, role: str) -> None:
    older = copy.deepcopy(signing.signed(role))
    signing.publish(role)
    refresh(signing, tmp_path)
    signing.signed(role).version = older.version
    signing.publish()
    assert code_of(signing, tmp_path) == "rollback"


def test_a2_a_timestamp_that_names_an_older_snapshot_is_a_rollback(signing: Signing, tmp_path: Path) -> None:
    signing.publish()
    refresh(signing, tmp_path)
    signing.snapshot.version -= 1
    signing.timestamp.version += 1
    signing.put_top()
    assert code_of(signing, tmp_path) == "rollback"


def test_a3_a_frozen_repository_is_named_and_thaws(signing: Signing, tmp_path: Path) -> None:
    refresh(signing, tmp_path)
    late = NOW + timedelta(days=8)
    assert code_of(signing, tmp_path, now=late) == "freeze"
    signing.now = late
    signing.timestamp.expires = late + timedelta(days=7)
    signing.publish()
    assert refresh(signing, tmp_path, now=late).versions["timestamp"] == 3


def test_a4_a_snapshot_of_another_state_is_mix_and_match(signing: Signing, tmp_path: Path) -> None:
    other = signing.objects.held["metadata/1.snapshot.json"]
    signing.objects.held["metadata/2.snapshot.json"] = other
    assert code_of(signing, tmp_path) == "mix_and_match"


def test_a4_targets_of_another_state_are_mix_and_match(signing: Signing, tmp_path: Path) -> None:
    signing.objects.held["metadata/2.models.json"] = signing.objects.held["metadata/1.models.json"]
    trust = open_trust(signing, tmp_path)
    trust.refresh()
    with pytest.raises(TrustError) as caught:
        trust.find(MODEL)
    assert caught.value.code == "mix_and_match"


@pytest.mark.parametrize("key", ["metadata/timestamp.json", "metadata/2.snapshot.json", "metadata/1.targets.json"])
def test_a5_endless_metadata_stops_at_its_limit(signing: Signing, tmp_path: Path, key: str) -> None:
    signing.objects.faults[key] = [endless]
    tracemalloc.start()
    assert code_of(signing, tmp_path) == "endless_data"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_a5_a_signed_timestamp_over_the_limit_is_refused(signing: Signing, tmp_path: Path) -> None:
    signing.timestamp.unrecognized_fields["filler"] = "x" * MAX_TIMESTAMP_BYTES
    signing.put_timestamp()
    assert code_of(signing, tmp_path) == "endless_data"


def test_a6_a_target_longer_than_signed_stops_one_chunk_later(signing: Signing, tmp_path: Path) -> None:
    trust = open_trust(signing, tmp_path)
    trust.refresh()
    key = next(signing.objects.names("targets/models/"))
    signing.objects.faults[key] = [endless]
    with pytest.raises(FetchError) as caught:
        trust.target(MODEL, 1000)
    assert caught.value.code == "endless_data"
    assert not list((tmp_path / "targets").iterdir())


def test_a6_a_target_signed_longer_than_it_may_be_is_not_fetched(signing: Signing, tmp_path: Path) -> None:
    trust = open_trust(signing, tmp_path)
    trust.refresh()
    with pytest.raises(TrustError) as caught:
        trust.target(MODEL, 5)
    assert caught.value.code == "endless_data"


@pytest.mark.parametrize("version", [2**31, 2**63])
def test_a8_a_fast_forward_ends_with_a_rotation_of_keys(signing: Signing, tmp_path: Path, version: int) -> None:
    versions = signing.snapshot.version, signing.timestamp.version
    signing.snapshot.version = signing.timestamp.version = version
    models = signing.delegated["models"].version
    signing.publish("models")
    refresh(signing, tmp_path)
    signing.delegated["models"].version = models
    signing.snapshot.version, signing.timestamp.version = versions
    signing.publish("models")
    assert code_of(signing, tmp_path) == "rollback"
    signing.rotate("snapshot", "timestamp")
    signing.put_top()
    assert refresh(signing, tmp_path).versions["timestamp"] == versions[1] + 1
    signing.publish()
    assert refresh(signing, tmp_path).versions["timestamp"] == versions[1] + 2


def test_a9_fewer_keys_than_the_threshold_sign_nothing(tmp_path: Path) -> None:
    signing = Signing(threshold=3)
    assert refresh(signing, tmp_path).versions["root"] == 1
    signing.timestamp.version += 1
    stolen = signing.keys["timestamp"][:2]
    signing.objects.held["metadata/timestamp.json"] = signing.sign("timestamp", stolen)
    assert code_of(signing, tmp_path) == "bad_signature"


def test_a9_a_new_root_needs_the_old_roots_threshold(tmp_path: Path) -> None:
    signing = Signing(threshold=2)
    refresh(signing, tmp_path)
    signing.root.version += 1
    signing.put_root(signing.keys["root"][:1])
    assert code_of(signing, tmp_path) == "bad_signature"
    assert (TrustStore(tmp_path).load("root") or signing.pinned) == signing.pinned


def test_a10_three_hundred_rotations_are_followed_in_one_pass(signing: Signing, tmp_path: Path) -> None:
    refresh(signing, tmp_path)
    for _ in range(300):
        signing.rotate("root")
    started = time.perf_counter()
    assert refresh(signing, tmp_path).versions["root"] == 301
    assert time.perf_counter() - started < 5


def test_a10_a_chain_that_breaks_keeps_the_last_good_root(signing: Signing, tmp_path: Path) -> None:
    refresh(signing, tmp_path)
    signing.rotate("timestamp")
    signing.put_top()
    good = signing.objects.held["metadata/2.root.json"]
    signing.objects.held["metadata/3.root.json"] = b"{}"
    assert code_of(signing, tmp_path) == "bad_metadata"
    assert TrustStore(tmp_path).load("root") == good


def test_a11_a_key_that_signs_twice_counts_once(tmp_path: Path) -> None:
    signing = Signing(threshold=2)
    once = msgspec.json.decode(signing.sign("timestamp", signing.keys["timestamp"][:1]))
    once["signatures"] *= 2
    signing.objects.held["metadata/timestamp.json"] = msgspec.json.encode(once)
    assert code_of(signing, tmp_path) == "bad_metadata"


def test_a11_one_key_under_two_names_counts_once(tmp_path: Path) -> None:
    signing = Signing(threshold=2)
    key = signing.keys["timestamp"][0]
    twin = copy.deepcopy(key)
    twin.public_key.keyid = "f" * 64
    signing.root.revoke_key(signing.keys["timestamp"][1].public_key.keyid, "timestamp")
    signing.root.add_key(twin.public_key, "timestamp")
    signing.keys["timestamp"] = [key, twin]
    signing.root.version += 1
    signing.put_root()
    signing.put_top()
    assert code_of(signing, tmp_path) == "bad_signature"


def test_a_role_signs_nothing_outside_its_paths(signing: Signing, tmp_path: Path) -> None:
    signing.add("deployments", "models/digits/2.0.0.json", b"not theirs to sign")
    signing.publish("deployments")
    trust = open_trust(signing, tmp_path)
    trust.refresh()
    assert trust.find("models/digits/2.0.0.json") is None


@pytest.mark.parametrize("garbage", [b"", b"{", b"[]", b"null", b"\xff", b'{"a":' * 100_000, b'{"signed": 1}'])
@pytest.mark.parametrize("key", ["metadata/2.root.json", "metadata/timestamp.json", "metadata/2.snapshot.json"])
def test_garbage_in_place_of_metadata_is_an_error_of_ours(
    signing: Signing, tmp_path: Path, key: str, garbage: bytes
) -> None:
    signing.objects.held[key] = garbage
    assert code_of(signing, tmp_path) in {"bad_metadata", "mix_and_match", "endless_data"}


def test_a_repository_out_of_reach_changes_nothing(signing: Signing, tmp_path: Path) -> None:
    refresh(signing, tmp_path)
    kept = {path: path.read_bytes() for path in tmp_path.glob("*.json")}
    signing.objects.held["metadata/2.root.json"] = b""
    signing.objects.faults["metadata/2.root.json"] = [fails(FetchError("unreachable", "no route"))]
    assert code_of(signing, tmp_path) == "unreachable"
    assert {path: path.read_bytes() for path in tmp_path.glob("*.json")} == kept


def test_a_bucket_that_forbids_what_is_not_there_ends_the_chain_of_roots(signing: Signing, tmp_path: Path) -> None:
    signing.objects.held["metadata/2.root.json"] = b""
    signing.objects.faults["metadata/2.root.json"] = [fails(FetchError("forbidden", "403"))]
    assert refresh(signing, tmp_path).versions["root"] == 1


FILES = ["timestamp.json", "snapshot.json", "targets.json", "models.json", "floor.a", "floor.b"]
DAMAGE = {"empty": b"", "garbage": b"\0" * 700, "gone": None}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("lost", [*itertools.combinations(FILES, 1), FILES[:4], [*FILES[:4], "floor.a"]])
def test_a17_a30_after_a_cut_no_older_version_is_accepted(tmp_path: Path, lost: list[str], kind: str) -> None:
    signing = Signing()
    old = dict(signing.objects.held)
    signing.add("models", MODEL, b"manifest one")
    signing.publish("models", "deployments", "targets")
    trust = open_trust(signing, tmp_path)
    acknowledged = trust.refresh()
    trust.target(MODEL, 1000)
    for name in lost:
        damage(tmp_path / name, DAMAGE[kind])
    new, signing.objects.held = signing.objects.held, old
    assert code_of(signing, tmp_path) == "rollback"
    signing.objects.held = new
    assert refresh(signing, tmp_path) == acknowledged


def test_a30_floors_come_back_from_the_metadata_where_both_copies_are_lost(signing: Signing, tmp_path: Path) -> None:
    refresh(signing, tmp_path)
    for name in ("floor.a", "floor.b"):
        damage(tmp_path / name, b"")
    refresh(signing, tmp_path)
    assert TrustStore(tmp_path).floors("timestamp")[0].version == 2


def test_a30_a_trust_folder_that_is_all_gone_begins_at_the_pinned_root(signing: Signing, tmp_path: Path) -> None:
    refresh(signing, tmp_path / "one")
    assert refresh(signing, tmp_path / "two").versions["models"] == 2


def test_a30_a_damaged_root_is_walked_again_from_the_pinned_one(signing: Signing, tmp_path: Path) -> None:
    signing.rotate("timestamp")
    signing.put_top()
    refresh(signing, tmp_path)
    damage(tmp_path / "root.json", b"\0" * 100)
    assert refresh(signing, tmp_path).versions["root"] == 2


def test_a30_a_withheld_root_is_a_rollback_where_the_kept_one_is_damaged(signing: Signing, tmp_path: Path) -> None:
    before = dict(signing.objects.held)
    signing.rotate("timestamp")
    signing.put_top()
    refresh(signing, tmp_path)
    damage(tmp_path / "root.json", None)
    signing.objects.held = before
    assert code_of(signing, tmp_path) == "rollback"


def test_a_cut_between_the_two_copies_of_the_floor_loses_neither(signing: Signing, tmp_path: Path) -> None:
    refresh(signing, tmp_path)
    older = (tmp_path / "floor.b").read_bytes()
    signing.publish("models")
    refresh(signing, tmp_path)
    (tmp_path / "floor.b").write_bytes(older)
    assert {floor.version for floor in TrustStore(tmp_path).floors("timestamp")} == {2, 3}
    refresh(signing, tmp_path)
    assert (tmp_path / "floor.a").read_bytes() == (tmp_path / "floor.b").read_bytes()


def test_a_deployments_sequence_only_grows(signing: Signing, tmp_path: Path) -> None:
    path = "deployments/all.json"
    signing.add("deployments", path, b"{}")
    signing.publish("deployments")
    trust = open_trust(signing, tmp_path)
    trust.refresh()
    trust.accept_sequence(path, 7)
    trust.accept_sequence(path, 7)
    with pytest.raises(TrustError) as caught:
        trust.accept_sequence(path, 6)
    assert caught.value.code == "rollback"


def test_b13_a_clock_at_1970_accepts_what_is_newer_and_says_that_it_is_not_trusted(
    signing: Signing, tmp_path: Path
) -> None:
    facts = refresh(signing, tmp_path, now=datetime(1970, 1, 1, tzinfo=UTC))
    assert not facts.clock_trusted
    assert facts.issued == "2027-01-10T00:00:00Z"


def test_b13_a_clock_at_1970_does_not_accept_what_the_floor_shows_expired(signing: Signing, tmp_path: Path) -> None:
    signing.timestamp.expires = BUILT - timedelta(days=1)
    signing.issued = False
    del signing.timestamp.unrecognized_fields["issued"]
    signing.put_timestamp()
    assert code_of(signing, tmp_path, now=datetime(1970, 1, 1, tzinfo=UTC)) == "freeze"


def test_b13_a_signed_time_raises_the_floor_for_the_next_pass(signing: Signing, tmp_path: Path) -> None:
    refresh(signing, tmp_path)
    signing.timestamp.expires = NOW - timedelta(days=1)
    signing.timestamp.version += 1
    signing.issued = False
    signing.put_timestamp()
    assert code_of(signing, tmp_path, now=datetime(1970, 1, 1, tzinfo=UTC)) == "freeze"


def test_b15_a_clock_ten_years_ahead_freezes_and_recovers_when_corrected(signing: Signing, tmp_path: Path) -> None:
    refresh(signing, tmp_path)
    assert code_of(signing, tmp_path, now=NOW + timedelta(days=3650)) == "freeze"
    assert refresh(signing, tmp_path).clock_trusted


def test_a_root_that_is_no_root_is_refused(signing: Signing, tmp_path: Path) -> None:
    with pytest.raises(TrustError):
        Trust(signing.objects, TrustStore(tmp_path), b"{}", now=NOW, built=BUILT)


def test_a_store_that_cannot_be_written_is_told(signing: Signing, tmp_path: Path) -> None:
    store = TrustStore(tmp_path)
    (tmp_path / ".timestamp.json.new").mkdir()
    with pytest.raises(StoreError):
        Trust(signing.objects, store, signing.pinned, now=NOW, built=BUILT).refresh()


def test_a_network_error_is_tried_again(signing: Signing, tmp_path: Path) -> None:
    slow_down = fails(FetchError("slow_down", "503"))
    signing.objects.faults["metadata/timestamp.json"] = [slow_down, slow_down]
    pauses: list[float] = []
    retry = Retry(attempts=3, base_s=1.0, sleep=pauses.append, random=lambda: 0.5)
    trust = Trust(signing.objects, TrustStore(tmp_path), signing.pinned, now=NOW, built=BUILT, retry=retry)
    trust.refresh()
    assert pauses == [0.5, 1.0]


def test_bytes_that_are_wrong_once_are_not_tried_again(signing: Signing, tmp_path: Path) -> None:
    signing.objects.faults["metadata/timestamp.json"] = [gives(b"{}")]
    assert code_of(signing, tmp_path) == "bad_metadata"


def damage(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
