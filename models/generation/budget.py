"""How much memory the cache of a generating model may take. Pure but for the size of the box."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Final

from models.manifest import Manifest

RUNTIME_BYTES: Final = 128 << 20
"""What a worker takes beside weights and cache: Python, ONNX Runtime, the tokenizer, a part's intermediate values."""
LEAST_BYTES: Final = 16 << 20
MOST_BYTES: Final = 1 << 30
BOX_SHARE: Final = 8
"""The part of the box's memory that a model without a budget may take for its cache: one in so many."""


def cache_bytes(manifest: Manifest, files: Iterable[str]) -> int:
    """Return the bytes for the cache: what weights and runtime leave of the budget, else a share of the box."""
    if not manifest.budget.memory_mb:
        box_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return max(LEAST_BYTES, min(MOST_BYTES, box_bytes // BOX_SHARE))
    wanted = set(files)
    weights = sum(entry.length for entry in manifest.files if entry.path in wanted)
    return max(LEAST_BYTES, (manifest.budget.memory_mb << 20) - weights - RUNTIME_BYTES)
