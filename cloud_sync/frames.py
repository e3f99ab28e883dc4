"""Frames: how a file is cut, and how a frame's stored bytes become the frame again (PROTOCOL 6)."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

from cloud_sync.errors import TrustError

FRAME_BYTES: Final = 4 << 20
LEVEL: Final = 9
WINDOW_LOG: Final = 23
"""Windows above 8 MiB are refused (RFC 9659)."""
CODECS: Final = frozenset({"raw", "zstd"})


def encode_frame(frame: bytes) -> tuple[str, bytes]:
    """Return the codec and the stored bytes: zstd where it is smaller, else raw."""
    packed = zstd.compress(frame, level=LEVEL)
    return ("zstd", packed) if len(packed) < len(frame) else ("raw", frame)


def decode_frame(codec: str, stored: bytes, length: int) -> bytes:
    """Return exactly `length` bytes; raises TrustError `arbitrary_software` for anything else."""
    if codec == "raw":
        frame = stored
    elif codec == "zstd":
        frame = _unzstd(stored, length)
    else:
        raise TrustError("unknown_codec", f"the codec {codec!r} is not known")
    if len(frame) != length:
        raise TrustError("arbitrary_software", f"a frame of {length} bytes came as {len(frame)}")
    return frame


def _unzstd(stored: bytes, length: int) -> bytes:
    decoder = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: WINDOW_LOG})
    try:
        frame = decoder.decompress(stored, max_length=length)
        # The end of the zstd frame may still be unread when its last byte is out.
        more = b"" if decoder.eof else decoder.decompress(b"", max_length=1)
    except (zstd.ZstdError, EOFError, MemoryError) as error:
        raise TrustError("arbitrary_software", f"a frame does not decode: {error}") from error
    if more or not decoder.eof or decoder.unused_data:
        raise TrustError("arbitrary_software", f"a frame does not end at {length} bytes")
    return frame


def read_frames(path: Path) -> Iterator[bytes]:
    """Yield a file's frames in order, none over 4 MiB."""
    with path.open("rb") as file:
        while frame := file.read(FRAME_BYTES):
            yield frame


def sha256_of(data: bytes) -> str:
    """Return the SHA-256 of `data` in hex."""
    return hashlib.sha256(data).hexdigest()
