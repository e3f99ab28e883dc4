"""Write docs/vectors/codecs.json: one frame, base and stored bytes for every codec of PROTOCOL 6."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

from cloud_sync.codecs import DELTAS, EXPONENT_BITS, PLANES, difference, split_planes
from cloud_sync.frames import _BEST, _PREFIX, _squeeze

FORMATS = {1: "b", 2: "e", 4: "f", 8: "d"}
OUT = Path(__file__).resolve().parent.parent / "docs" / "vectors" / "codecs.json"


def numbers(width: int, kind: str, seed: int) -> tuple[bytes, bytes]:
    """Return 24 numbers and a version of them that differs a little, the edges of the format among them."""
    source = random.Random(seed)  # noqa: S311 - the vectors are to be the same each time
    if kind == "i":
        whole = 1 << (8 * width)
        base = [0, 1, whole - 1, whole // 2, *(source.randrange(whole) for _ in range(20))]
        tuned = [(number + source.randrange(-3, 4)) % whole for number in base]
        return tuple(b"".join(number.to_bytes(width, "little") for number in part) for part in (tuned, base))  # type: ignore[return-value]
    values = [0.0, -0.0, float("inf"), float("-inf"), *(source.gauss(0, 1) for _ in range(20))]
    tuned_values = [value * (1 + source.gauss(0, 0.01)) if abs(value) < 1e9 else value for value in values]
    return tuple(struct.pack(f"<{len(part)}{FORMATS[width]}", *part) for part in (tuned_values, values))  # type: ignore[return-value]


def vector(
    name: str, codec: str, stored: bytes, frame: bytes, base: bytes = b"", exponent_bits: int = 0
) -> dict[str, object]:
    """Return one vector; bytes in hex."""
    return {
        "name": name,
        "codec": codec,
        "exponent_bits": exponent_bits,
        "base": base.hex(),
        "stored": stored.hex(),
        "frame": frame.hex(),
    }


def main() -> None:
    """Write the file."""
    text, before = b"a frame of text, a frame of text", b"a frame of text"
    vectors = [
        vector("raw", "raw", text, text),
        vector("zstd", "zstd", _squeeze(text, _BEST), text),
        vector("prefix", "prefix", _squeeze(text, _PREFIX, before), text, before),
    ]
    for codec, width in PLANES.items():
        frame, _ = numbers(width, "f", width)
        vectors.append(vector(codec, codec, _squeeze(split_planes(frame, width), _BEST), frame))
    for codec, delta in DELTAS.items():
        frame, base = numbers(delta.width, delta.kind, delta.width)
        for bits in EXPONENT_BITS[delta.width] if delta.kind == "s" else (0,):
            stored = _squeeze(difference(frame, base, delta, bits), _BEST)
            vectors.append(vector(f"{codec}-{bits}" if bits else codec, codec, stored, frame, base, bits))
    OUT.write_text(json.dumps(vectors, indent=1) + "\n")


if __name__ == "__main__":
    main()
