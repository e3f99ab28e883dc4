"""Small made-up artifacts: files, their manifest, their pack and its sources."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from cloud_sync.frames import encode_frame, sha256_of
from cloud_sync.packs import PackWriter
from cloud_sync.sources import Sources, pack_key, sources_bytes
from models.manifest import FileEntry, Manifest, Requires, Variant, digest_of, manifest_bytes
from tests.fakes.objects import MemoryObjects


def entry_of(path: str, data: bytes, frame_bytes: int = 1000) -> FileEntry:
    """A file's entry, cut into small frames."""
    frames = [data[at : at + frame_bytes] for at in range(0, len(data), frame_bytes)]
    return FileEntry(path, len(data), hashlib.sha256(data).hexdigest(), [(len(f), sha256_of(f)) for f in frames])


def manifest_of(
    files: dict[str, bytes],
    *,
    name: str = "digits",
    version: str = "1.0.0",
    requires: Requires | None = None,
    frame_bytes: int = 1000,
) -> Manifest:
    """A manifest with one variant that takes all files."""
    return Manifest(
        schema=1,
        name=name,
        version=version,
        task="tensors",
        format="onnx",
        variants=[Variant("default", list(files), requires or Requires())],
        files=[entry_of(path, data, frame_bytes) for path, data in files.items()],
    )


def pack_of(objects: MemoryObjects, files: dict[str, bytes], manifest: bytes, frame_bytes: int = 1000) -> Sources:
    """Put a pack of the files into a repository and return the sources."""
    with tempfile.TemporaryDirectory() as work:
        writer = PackWriter(Path(work) / "pack")
        for data in files.values():
            for at in range(0, len(data), frame_bytes):
                frame = data[at : at + frame_bytes]
                writer.add(sha256_of(frame), encode_frame(frame))
        pack, frames = writer.close()
        objects.held[pack_key(pack)] = writer.path.read_bytes()
    return Sources(1, digest_of(manifest), {name: [entry] for name, entry in frames.items()})


def signed_files(manifest: Manifest, objects: MemoryObjects, files: dict[str, bytes]) -> tuple[bytes, bytes]:
    """The bytes of a manifest and of its sources, the pack being put."""
    raw = manifest_bytes(manifest)
    return raw, sources_bytes(pack_of(objects, files, raw))
