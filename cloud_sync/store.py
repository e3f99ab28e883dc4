"""The artifacts on this box: `partial/` what a fetch has so far, `versions/{digest}/` whole and verified ones.

A version becomes visible by one rename after every byte was checked and made durable. Its folder holds the
files of the variant that the box runs, and `manifest.json`, the signed bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from cloud_sync.disk import free_bytes, make_folder, read_whole, store_error, sync_file, sync_folder, write_durably
from cloud_sync.errors import StoreError
from models.manifest import (
    MAX_MANIFEST_BYTES,
    FileEntry,
    Manifest,
    ManifestError,
    digest_of,
    is_sha256,
    parse_manifest,
)

MANIFEST: Final = "manifest.json"
FLUSH_BYTES: Final = 32 << 20
"""How much a fetch may write before it is made durable, so that a power cut costs no more."""


class Store:
    """The folders `versions/` and `partial/` under a state folder; methods raise StoreError."""

    def __init__(self, state: Path, *, reserve_bytes: int = 64 << 20) -> None:
        self._versions = state / "versions"
        self._partial = state / "partial"
        self._reserve_bytes = reserve_bytes
        for folder in (self._versions, self._partial):
            make_folder(folder)

    def folder(self, digest: str) -> Path:
        """Return where a version lies, or would lie."""
        return self._versions / digest

    def digests(self) -> list[str]:
        """Return the digests of the versions that are staged."""
        return sorted(path.name for path in self._versions.iterdir() if is_sha256(path.name))

    def manifest(self, digest: str) -> Manifest | None:
        """Return the manifest of a staged version, checked against its digest, or None."""
        raw = read_whole(self.folder(digest) / MANIFEST, MAX_MANIFEST_BYTES)
        if raw is None or digest_of(raw) != digest:
            return None
        try:
            return parse_manifest(raw)
        except ManifestError:
            return None

    def has(self, digest: str, files: list[FileEntry]) -> bool:
        """Whether a version is staged with these files, by name and length alone."""
        if self.manifest(digest) is None:
            return False
        return all(_length(self.folder(digest) / entry.path) == entry.length for entry in files)

    def damage(self, digest: str) -> list[str]:
        """Return the files of a staged version whose bytes are not what was signed; reads them all."""
        manifest = self.manifest(digest)
        if manifest is None:
            return [MANIFEST]
        folder = self.folder(digest)
        present = [entry for entry in manifest.files if (folder / entry.path).exists()]
        return [entry.path for entry in present if _sha256(folder / entry.path) != entry.sha256]

    def begin(self, digest: str, files: list[FileEntry]) -> Staging:
        """Open or resume the staging of a version; raises StoreError `no_space` before it writes."""
        return Staging(self, digest, files, self._partial / digest)

    def room_for(self, wanted_bytes: int) -> None:
        """Raise StoreError `no_space` unless so much may be written and the reserve stays."""
        free = free_bytes(self._partial)
        if free < wanted_bytes + self._reserve_bytes:
            raise StoreError(
                "no_space", f"{wanted_bytes} bytes and a reserve of {self._reserve_bytes} are over the {free} free"
            )

    def publish(self, partial: Path, digest: str, files: list[FileEntry]) -> None:
        """Make a whole, durable folder visible; into a version that is there, file by file."""
        folder = self.folder(digest)
        try:
            if folder.exists():
                _replace_files(partial, folder, [*(entry.path for entry in files), MANIFEST])
                shutil.rmtree(partial)
            else:
                partial.rename(folder)
            sync_folder(self._versions)
            sync_folder(self._partial)
        except OSError as error:
            raise store_error(error, folder) from error

    def local_frames(self) -> dict[str, tuple[Path, int, int]]:
        """Return where staged versions hold frames: SHA-256 to file, offset and length; unverified."""
        found: dict[str, tuple[Path, int, int]] = {}
        for digest in self.digests():
            manifest = self.manifest(digest)
            for entry in manifest.files if manifest else []:
                for sha256, offset, length in _places(entry):
                    found.setdefault(sha256, (self.folder(digest) / entry.path, offset, length))
        return found

    def local_files(self) -> dict[str, Path]:
        """Return where staged versions hold files, by the SHA-256 that was signed; unverified."""
        found: dict[str, Path] = {}
        for digest in self.digests():
            manifest = self.manifest(digest)
            for entry in manifest.files if manifest else []:
                path = self.folder(digest) / entry.path
                if path.exists():
                    found.setdefault(entry.sha256, path)
        return found

    def prune(self, keep: set[str]) -> list[str]:
        """Remove the versions that nobody wants; return their digests. `prune_partial` gives the room back."""
        removed = [digest for digest in self.digests() if digest not in keep]
        for digest in removed:
            gone = self._partial / f"{digest}.pruned"
            with contextlib.suppress(OSError):
                shutil.rmtree(gone, ignore_errors=True)
                # Renamed away first: a cut in the middle of the removal must not leave half a version visible.
                self.folder(digest).rename(gone)
                sync_folder(self._versions)
        return removed

    def prune_partial(self, keep: set[str]) -> None:
        """Remove what unfinished fetches and prunings left that nobody wants."""
        for path in self._partial.iterdir():
            if path.name not in keep:
                shutil.rmtree(path, ignore_errors=True)


class Staging:
    """An artifact while it is fetched: files of the right length, filled frame by frame."""

    def __init__(self, store: Store, digest: str, files: list[FileEntry], folder: Path) -> None:
        self._store = store
        self._digest = digest
        self._files = files
        self._folder = folder
        self._wanted: dict[str, list[tuple[Path, int, int]]] = {}
        self._open: dict[Path, int] = {}
        self._unflushed = 0
        self._prepare()

    @property
    def missing(self) -> dict[str, int]:
        """The frames still wanted: SHA-256 to length in bytes."""
        return {sha256: places[0][2] for sha256, places in self._wanted.items()}

    def write(self, sha256: str, frame: bytes) -> None:
        """Put a verified frame in every place that wants it."""
        for path, offset, _ in self._wanted.get(sha256, []):
            self._write_at(path, offset, frame)
        self._wanted.pop(sha256, None)

    def take_local(self) -> int:
        """Copy the frames that staged versions already hold; return the bytes that need no fetch."""
        taken = 0
        local = self._store.local_frames() if self._wanted else {}
        for sha256 in [name for name in self._wanted if name in local]:
            path, offset, length = local[sha256]
            frame = _read_at(path, offset, length)
            if hashlib.sha256(frame).hexdigest() == sha256:
                self.write(sha256, frame)
                taken += length
        return taken

    def finish(self, manifest: bytes) -> Path:
        """Check every file, make all durable and visible, and return the version's folder."""
        try:
            self._flush()
        except OSError as error:
            self.discard()
            raise store_error(error, self._folder) from error
        self.close()
        for entry in self._files:
            path = self._folder / entry.path
            if _sha256(path) != entry.sha256:
                path.unlink(missing_ok=True)
                raise StoreError("corrupt", f"{entry.path} is not what was signed though its frames are")
        try:
            for entry in self._files:
                sync_file(self._folder / entry.path)
            write_durably(self._folder / MANIFEST, manifest)
            for folder in {self._folder, *_folders(self._folder, self._files)}:
                sync_folder(folder)
        except OSError as error:
            raise store_error(error, self._folder) from error
        self._store.publish(self._folder, self._digest, self._files)
        return self._store.folder(self._digest)

    def close(self) -> None:
        """Close the files; what they hold stays for the next time."""
        for file in self._open.values():
            with contextlib.suppress(OSError):
                os.close(file)
        self._open.clear()

    def discard(self) -> None:
        """Give the room back."""
        self.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _prepare(self) -> None:
        for entry in self._files:
            path = self._folder / entry.path
            have = _frames_held(path, entry)
            for sha256, offset, length in _places(entry):
                if (sha256, offset) not in have:
                    self._wanted.setdefault(sha256, []).append((path, offset, length))
        new_bytes = sum(entry.length - _allocated(self._folder / entry.path) for entry in self._files)
        self._store.room_for(max(new_bytes, 0))
        try:
            for entry in self._files:
                _allocate(self._folder / entry.path, entry.length)
        except OSError as error:
            self.discard()
            raise store_error(error, self._folder) from error

    def _write_at(self, path: Path, offset: int, frame: bytes) -> None:
        try:
            file = self._open.get(path)
            if file is None:
                file = self._open[path] = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            view = memoryview(frame)
            while view:
                written = os.pwrite(file, view, offset)
                view, offset = view[written:], offset + written
            self._unflushed += len(frame)
            if self._unflushed >= FLUSH_BYTES:
                self._flush()
        except OSError as error:
            self.discard()
            raise store_error(error, path) from error

    def _flush(self) -> None:
        for file in self._open.values():
            os.fdatasync(file)
        self._unflushed = 0


def _places(entry: FileEntry) -> Iterator[tuple[str, int, int]]:
    """Yield the frames of a file as SHA-256, offset and length."""
    offset = 0
    for length, sha256 in entry.frames:
        yield sha256, offset, length
        offset += length


def _frames_held(path: Path, entry: FileEntry) -> set[tuple[str, int]]:
    """Return the frames, with their offsets, that an unfinished file already holds."""
    if not path.is_file():
        return set()
    return {
        (sha256, offset)
        for sha256, offset, length in _places(entry)
        if hashlib.sha256(_read_at(path, offset, length)).hexdigest() == sha256
    }


def _read_at(path: Path, offset: int, length: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(length)
    except OSError:
        return b""


def _length(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _allocated(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0


def _allocate(path: Path, length: int) -> None:
    """Make a file of exactly this length with its room taken."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        os.ftruncate(file.fileno(), length)
        if length:
            os.posix_fallocate(file.fileno(), 0, length)


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def _folders(root: Path, files: list[FileEntry]) -> Iterator[Path]:
    for entry in files:
        path = (root / entry.path).parent
        while path != root:
            yield path
            path = path.parent


def _replace_files(partial: Path, folder: Path, names: list[str]) -> None:
    """Move files into a visible version one by one: each rename leaves the old file or the new one."""
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (partial / name).replace(target)
        sync_folder(target.parent)
