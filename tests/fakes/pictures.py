"""Image files made by tests."""

from __future__ import annotations

import io

from PIL import Image


def png(image: Image.Image, layout: str = "PNG", **options: object) -> bytes:
    """Return an image as a file."""
    out = io.BytesIO()
    image.save(out, layout, **options)
    return out.getvalue()
