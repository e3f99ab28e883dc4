"""Progress on standard error, where that is a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from tqdm import tqdm


class Progress:
    """Draws bars, unless `quiet` or nobody watches."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._disable = quiet or not sys.stderr.isatty()

    @contextlib.contextmanager
    def bar(self, what: str, total_bytes: int) -> Iterator[Callable[[int], object]]:
        """Give a function to call with the bytes done since the last call."""
        with tqdm(
            total=total_bytes, desc=what, unit="B", unit_scale=True, disable=self._disable, file=sys.stderr, leave=False
        ) as bar:
            yield bar.update
