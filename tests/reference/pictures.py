"""Images made by code, the same wherever they are made: a name says what is in one.

`smooth-40x30-7` is a coloured PNG of 40 x 30 pixels from the seed 7; before the size may stand `grey`, `alpha`,
`palette`, `deep` (16 bits), `one` (black and white), `animated` or `plain` (one colour). JPEG files differ between
versions of their library, so those are recorded as bytes.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

KINDS = ("grey", "alpha", "palette", "deep", "one", "animated", "greyalpha")


def made(name: str) -> bytes:
    """Return the file that a name stands for."""
    kind, size, seed = name.split("-")
    width, height = (int(side) for side in size.split("x"))
    if width * height > 1 << 20:
        return _large(_colours(width // 10, height // 10, int(seed)).repeat(10, axis=0).repeat(10, axis=1))
    return _file(kind, _colours(width, height, int(seed), plain=kind == "plain"))


def jpegs(seed: int) -> Iterator[bytes]:
    """Give JPEG files of every kind: colour, grey, CMYK, turned by EXIF, progressive, and with odd sampling."""
    image = Image.fromarray(_colours(41, 29, seed))
    yield _saved(image, quality=90)
    yield _saved(image.convert("L"))
    yield _saved(image.convert("CMYK"))
    for orientation in (2, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield _saved(image, exif=exif)
    yield _saved(image, progressive=True, subsampling="4:2:0", quality=60)


def _colours(width: int, height: int, seed: int, *, plain: bool = False) -> NDArray[np.uint8]:
    """Return [height, width, 3]: a few waves and noise, from numpy's legacy generator, whose numbers are frozen."""
    chance = np.random.RandomState(seed)
    if plain:
        return np.full((height, width, 3), chance.randint(0, 256, 3), np.uint8)
    waves = chance.rand(3, 4) * [12, 12, 6, 1]
    down, across = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)
    field = [np.sin(a * down + c) * np.cos(b * across - c) * 110 + 128 * d + 60 for a, b, c, d in waves]
    noise = chance.randint(-20, 21, (height, width, 1))
    return np.clip(np.stack(field, axis=2) + noise, 0, 255).astype(np.uint8)


def _file(kind: str, colours: NDArray[np.uint8]) -> bytes:
    image = Image.fromarray(colours)
    if kind == "grey":
        image = image.convert("L")
    elif kind == "greyalpha":
        image = image.convert("LA")
    elif kind == "one":
        image = image.convert("L").point(lambda level: 255 * (level > 127)).convert("1", dither=Image.Dither.NONE)
    elif kind == "palette":
        image = image.convert("P", palette=Image.Palette.WEB, dither=Image.Dither.NONE)
    elif kind == "deep":
        image = Image.fromarray(colours[:, :, 0].astype(np.uint16) * 3)
    elif kind == "alpha":
        image.putalpha(Image.fromarray(colours[:, :, 0]))
    out = io.BytesIO()
    if kind == "animated":
        image.save(out, "PNG", save_all=True, append_images=[Image.fromarray(255 - colours)])
    else:
        image.save(out, "PNG")
    return out.getvalue()


def _large(colours: NDArray[np.uint8]) -> bytes:
    """Return a PNG quickly: rows without a filter, hardly compressed."""
    height, width, _ = colours.shape
    rows = np.zeros((height, 1 + width * 3), np.uint8)
    rows[:, 1:] = colours.reshape(height, -1)
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    blocks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows.tobytes(), 1)), (b"IEND", b""))
    parts = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in blocks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _saved(image: Image.Image, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return out.getvalue()
