"""Versions on disk: whole and verified or not visible, resumed, repaired, pruned (FAULTS A6, A21, A24, A29)."""

from __future__ import annotations

import fcntl
import os
import resource
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from cloud_sync.disk import locked, read_whole, write_durably
from cloud_sync.errors import StoreError
from cloud_sync.frames import sha256_of
from cloud_sync.store import Store
from models.manifest import Manifest, digest_of, manifest_bytes
from tests.fakes.artifacts import manifest_of

FILES = {"model.onnx": os.urandom(3500), "tokens/vocab.txt": b"a\nb\n", "empty": b""}


class Shelf:
    """A store in a folder, and one artifact to put there."""

    def __init__(self, state: Path, files: dict[str, bytes] | None = None) -> None:
        self.store = Store(state, reserve_bytes=0)
        self.state = state
        self.files = files or FILES
        self.manifest: Manifest = manifest_of(self.files)
        self.raw = manifest_bytes(self.manifest)
        self.digest = digest_of(self.raw)
        self.frames = {
            sha256: data[offset : offset + 1000]
            for data in self.files.values()
            for offset in range(0, len(data), 1000)
            for sha256 in [sha256_of(data[offset : offset + 1000])]
        }

    def stage(self) -> Path:
        staging = self.store.begin(self.digest, self.manifest.files)
        for sha256 in list(staging.missing):
            staging.write(sha256, self.frames[sha256])
        return staging.finish(self.raw)

    def is_whole(self) -> bool:
        folder = self.store.folder(self.digest)
        return all((folder / path).read_bytes() == data for path, data in self.files.items())


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


def test_a_staged_version_holds_its_files_and_the_signed_manifest(shelf: Shelf) -> None:
    folder = shelf.stage()
    assert folder == shelf.store.folder(shelf.digest)
    assert shelf.is_whole()
    assert (folder / "manifest.json").read_bytes() == shelf.raw
    assert shelf.store.has(shelf.digest, shelf.manifest.files)
    assert shelf.store.digests() == [shelf.digest]
    assert not shelf.store.damage(shelf.digest)
    assert not list((shelf.state / "partial").iterdir())


def test_nothing_is_visible_before_it_is_whole(shelf: Shelf) -> None:
    staging = shelf.store.begin(shelf.digest, shelf.manifest.files)
    first = next(iter(staging.missing))
    staging.write(first, shelf.frames[first])
    staging.close()
    assert not shelf.store.has(shelf.digest, shelf.manifest.files)
    assert not shelf.store.digests()


def test_a_fetch_goes_on_where_it_broke_off(shelf: Shelf) -> None:
    staging = shelf.store.begin(shelf.digest, shelf.manifest.files)
    wanted = dict(staging.missing)
    first = next(iter(wanted))
    staging.write(first, shelf.frames[first])
    staging.close()
    again = shelf.store.begin(shelf.digest, shelf.manifest.files)
    assert set(wanted) - set(again.missing) == {first}


def test_what_a_cut_left_damaged_is_wanted_again(shelf: Shelf) -> None:
    staging = shelf.store.begin(shelf.digest, shelf.manifest.files)
    wanted = dict(staging.missing)
    for sha256 in wanted:
        staging.write(sha256, shelf.frames[sha256])
    staging.close()
    path = shelf.state / "partial" / shelf.digest / "model.onnx"
    path.write_bytes(path.read_bytes()[:1500])
    again = shelf.store.begin(shelf.digest, shelf.manifest.files)
    assert list(again.missing.values()) == [1000, 1000, 500]


def test_a6_a_file_longer_than_signed_is_cut_to_length(shelf: Shelf) -> None:
    folder = shelf.state / "partial" / shelf.digest
    folder.mkdir()
    (folder / "model.onnx").write_bytes(FILES["model.onnx"] + b"more")
    staging = shelf.store.begin(shelf.digest, shelf.manifest.files)
    assert sha256_of(FILES["model.onnx"][:1000]) not in staging.missing
    staging.close()
    assert (folder / "model.onnx").stat().st_size == 3500


def test_a_file_whose_frames_hold_but_whose_hash_does_not_is_never_visible(shelf: Shelf) -> None:
    lying = manifest_of({"model.onnx": b"x" * 1500})
    entry = lying.files[0]
    wrong = type(entry)(entry.path, entry.length, "0" * 64, entry.frames)
    staging = shelf.store.begin("f" * 64, [wrong])
    for (length, sha256), data in zip(entry.frames, (b"x" * 1000, b"x" * 500), strict=True):
        assert len(data) == length
        staging.write(sha256, data)
    with pytest.raises(StoreError) as caught:
        staging.finish(b"{}")
    assert caught.value.code == "corrupt"
    assert not shelf.store.digests()


def test_frames_that_another_version_holds_need_no_fetch(shelf: Shelf) -> None:
    shelf.stage()
    newer = Shelf(shelf.state, {**FILES, "config.json": b"{}"})
    staging = newer.store.begin(newer.digest, newer.manifest.files)
    assert staging.take_local() == 3504
    staging.close()
    assert set(staging.missing) == {sha256_of(b"{}")}


def test_a_damaged_version_gives_no_frames(shelf: Shelf) -> None:
    folder = shelf.stage()
    flip(folder / "model.onnx", 10)
    newer = Shelf(shelf.state, {**FILES, "config.json": b"{}"})
    staging = newer.store.begin(newer.digest, newer.manifest.files)
    staging.take_local()
    staging.close()
    assert set(staging.missing) == {sha256_of(b"{}"), sha256_of(FILES["model.onnx"][:1000])}


@pytest.mark.parametrize("name", ["model.onnx", "tokens/vocab.txt", "manifest.json"])
def test_a29_a_flipped_bit_is_found_and_its_frame_alone_fetched_again(shelf: Shelf, name: str) -> None:
    folder = shelf.stage()
    flip(folder / name, 1)
    assert shelf.store.damage(shelf.digest) == [name]
    staging = shelf.store.begin(shelf.digest, shelf.manifest.files)
    if name != "manifest.json":
        staging.take_local()
        assert len(staging.missing) == 1
    for sha256 in list(staging.missing):
        staging.write(sha256, shelf.frames[sha256])
    held = (folder / "model.onnx").open("rb")
    before = held.read()
    staging.finish(shelf.raw)
    assert not shelf.store.damage(shelf.digest)
    assert shelf.is_whole()
    held.seek(0)
    assert held.read() == before, "a worker's open file changed under it"
    held.close()


def test_a_version_that_lacks_a_file_of_the_variant_is_not_there(shelf: Shelf) -> None:
    folder = shelf.stage()
    (folder / "empty").unlink()
    assert not shelf.store.has(shelf.digest, shelf.manifest.files)
    shelf.stage()
    assert shelf.store.has(shelf.digest, shelf.manifest.files)


def test_a21_space_is_asked_for_before_anything_is_written(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    shelf.store = Store(tmp_path, reserve_bytes=1 << 62)
    with pytest.raises(StoreError) as caught:
        shelf.store.begin(shelf.digest, shelf.manifest.files)
    assert caught.value.code == "no_space"
    assert not list((tmp_path / "partial").iterdir())


def in_child(work: Callable[[], int]) -> int:
    """Run work in a process of its own and return its exit code."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("limit", [0, 500, 2000, 3499])
def test_a21_a_disk_that_fills_up_gives_the_room_back(shelf: Shelf, limit: int) -> None:
    def work() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            shelf.stage()
        except StoreError as error:
            return 7 if error.code == "no_space" else 8
        return 9

    assert in_child(work) == 7
    assert not (shelf.state / "partial" / shelf.digest).exists()
    assert not shelf.store.digests()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a21_a_file_that_cannot_be_replaced_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_durably(path, b"old")

    def work() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        try:
            write_durably(path, b"new" * 100)
        except StoreError as error:
            return 7 if error.code == "no_space" else 8
        return 9

    assert in_child(work) == 7
    assert path.read_bytes() == b"old"
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_pruning_keeps_what_is_named_and_gives_the_rest_back(shelf: Shelf) -> None:
    shelf.stage()
    other = Shelf(shelf.state, {"model.onnx": b"other"})
    other.stage()
    shelf.store.begin("e" * 64, shelf.manifest.files).close()
    assert shelf.store.prune({shelf.digest}) == [other.digest]
    shelf.store.prune_partial(set())
    assert shelf.store.digests() == [shelf.digest]
    assert not list((shelf.state / "partial").iterdir())
    assert shelf.is_whole()


def test_a24_a_lock_has_one_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path), pytest.raises(StoreError) as caught, locked(path):
        pass
    assert caught.value.code == "locked"
    with locked(path):
        assert fcntl.LOCK_EX


def test_a_secret_is_written_for_its_owner_alone(tmp_path: Path) -> None:
    write_durably(tmp_path / "key", b"secret", mode=0o600)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


def test_reading_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_whole(tmp_path / "file", 5) == b"12345"
    assert read_whole(tmp_path / "file", 4) is None
    assert read_whole(tmp_path / "nothing", 4) is None
    assert read_whole(tmp_path, 4) is None


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.unlink()
    path.write_bytes(bytes(data))
