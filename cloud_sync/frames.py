"""Frames: how a frame of a file becomes stored bytes, and the stored bytes the frame again (PROTOCOL 6)."""

from __future__ import annotations

import hashlib
import sys
from typing import Final, NamedTuple

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

from cloud_sync.codecs import DELTAS, EXPONENT_BITS, PLANES, apply_difference, difference, join_planes, split_planes
from cloud_sync.errors import TrustError

FRAME_BYTES: Final = 4 << 20
WINDOW_LOG: Final = 23
"""Windows above 8 MiB are refused (RFC 9659)."""
MIN_PREFIX_BYTES: Final = 8
"""zstd takes no shorter prefix."""
WITHOUT_BASE: Final = frozenset({"raw", "zstd", *PLANES})
WITH_BASE: Final = frozenset({"prefix", *DELTAS})
CODECS: Final = WITHOUT_BASE | WITH_BASE

_Options = dict[int, int]
_BEST: Final[_Options] = {zstd.CompressionParameter.compression_level: 19}
"""For text and differences; a hundredth to a tenth smaller than level 9 on real fine-tunes, at 3 to 10 MB/s."""
_QUICK: Final[_Options] = {zstd.CompressionParameter.compression_level: 9}
"""For whole weights, where level 19 gains nothing."""
_PREFIX: Final[_Options] = {**_BEST, zstd.CompressionParameter.window_log: WINDOW_LOG}


class Numbers(NamedTuple):
    """What a frame consists of: numbers of `width` bytes, floats with an exponent of so many bits, 0 for integers."""

    width: int
    exponent_bits: int


class Encoded(NamedTuple):
    """A frame's stored bytes and how to decode them; `exponent_bits` is 0 but for the sorted deltas."""

    codec: str
    stored: bytes
    exponent_bits: int = 0


def encode_frame(frame: bytes, numbers: Numbers | None = None) -> Encoded:
    """Return the smallest encoding that needs nothing else."""
    choices = [Encoded("raw", frame), Encoded("zstd", _squeeze(frame, _QUICK if numbers else _BEST))]
    name = f"planes-{numbers.width}" if numbers else ""
    if numbers and name in PLANES and len(frame) % numbers.width == 0:
        choices.append(Encoded(name, _squeeze(split_planes(frame, numbers.width), _QUICK)))
    return _smallest(choices)


def encode_delta(frame: bytes, base: bytes, numbers: Numbers | None = None) -> Encoded:
    """Return the smallest encoding against a base of at most 4 MiB."""
    choices = []
    if numbers is not None and len(frame) == len(base) and len(frame) % numbers.width == 0:
        choices.append(_difference(frame, base, numbers))
    if len(base) >= MIN_PREFIX_BYTES and (not choices or len(choices[0].stored) * 2 < len(frame)):
        # Where more than that changed in the numbers there is nothing to match, and the search for it is slow.
        choices.append(Encoded("prefix", _squeeze(frame, _PREFIX, base)))
    return _smallest(choices or [encode_frame(frame)])


def decode_frame(codec: str, stored: bytes, length: int, base: bytes = b"", exponent_bits: int = 0) -> bytes:
    """Return exactly `length` bytes; raises TrustError `arbitrary_software` for anything else."""
    if codec not in CODECS:
        raise TrustError("unknown_codec", f"the codec {codec!r} is not known")
    if codec == "raw":
        frame = stored
    elif codec in PLANES:
        frame = join_planes(_unzstd(stored, _whole(length, PLANES[codec])), PLANES[codec])
    elif codec in DELTAS:
        frame = _add(codec, stored, length, base, exponent_bits)
    elif codec == "prefix":
        if len(base) < MIN_PREFIX_BYTES:
            raise TrustError("arbitrary_software", f"a prefix has at least {MIN_PREFIX_BYTES} bytes, not {len(base)}")
        frame = _unzstd(stored, length, base)
    else:
        frame = _unzstd(stored, length)
    if len(frame) != length:
        raise TrustError("arbitrary_software", f"a frame of {length} bytes came as {len(frame)}")
    return frame


def sha256_of(data: bytes) -> str:
    """Return the SHA-256 of `data` in hex."""
    return hashlib.sha256(data).hexdigest()


def _difference(frame: bytes, base: bytes, numbers: Numbers) -> Encoded:
    width, exponent_bits = numbers
    kinds = (("f", 0), ("s", exponent_bits)) if exponent_bits else (("i", 0),)
    tried = []
    for kind, bits in kinds:
        name = f"delta-{kind}{width}"
        if name in DELTAS:
            planes = difference(frame, base, DELTAS[name], bits)
            tried.append((len(_squeeze(planes, _QUICK)) if len(kinds) > 1 else 0, name, planes, bits))
    _, name, planes, bits = min(tried)
    return Encoded(name, _squeeze(planes, _BEST), bits)


def _smallest(choices: list[Encoded]) -> Encoded:
    return min(choices, key=lambda choice: len(choice.stored))


def _squeeze(data: bytes, options: _Options, prefix: bytes = b"") -> bytes:
    if not prefix:
        return zstd.compress(data, options=options)
    return zstd.compress(data, options=options, zstd_dict=zstd.ZstdDict(prefix, is_raw=True).as_prefix)


def _add(codec: str, stored: bytes, length: int, base: bytes, exponent_bits: int) -> bytes:
    delta = DELTAS[codec]
    if len(base) != length:
        raise TrustError("arbitrary_software", f"the base of a frame of {length} bytes has {len(base)}")
    if delta.kind == "s" and exponent_bits not in EXPONENT_BITS[delta.width]:
        raise TrustError("arbitrary_software", f"{codec}: floats have no exponents of {exponent_bits} bits")
    planes = _unzstd(stored, _whole(length, delta.width))
    return apply_difference(planes, base, delta, exponent_bits)


def _whole(length: int, width: int) -> int:
    if length % width:
        raise TrustError("arbitrary_software", f"a frame of {length} bytes holds no whole numbers of {width}")
    return length


def _unzstd(stored: bytes, length: int, prefix: bytes = b"") -> bytes:
    """Return exactly `length` bytes, whatever the stored ones claim to hold."""
    options: _Options = {zstd.DecompressionParameter.window_log_max: WINDOW_LOG}
    base = zstd.ZstdDict(prefix, is_raw=True).as_prefix if prefix else None
    decoder = zstd.ZstdDecompressor(zstd_dict=base, options=options)
    try:
        frame = decoder.decompress(stored, max_length=length)
        # The end of the zstd frame may still be unread when its last byte is out.
        more = b"" if decoder.eof else decoder.decompress(b"", max_length=1)
    except (zstd.ZstdError, EOFError, MemoryError) as error:
        raise TrustError("arbitrary_software", f"a frame does not decode: {error}") from error
    if more or not decoder.eof or decoder.unused_data:
        raise TrustError("arbitrary_software", f"a frame does not end at {length} bytes")
    return frame
