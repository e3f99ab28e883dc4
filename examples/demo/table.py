"""The demo's table: one line a question, and whether it came out as it must."""

from __future__ import annotations

import sys
import unicodedata

from examples.demo.asker import Reply

COLUMNS = (("question", 40), ("answer", 44), ("route", 6), ("reason", 11), ("model", 18), ("ms", 6))


class Table:
    """Prints rows as they come and remembers what failed."""

    def __init__(self) -> None:
        self.failures: list[str] = []
        self._colour = sys.stdout.isatty()

    def head(self) -> None:
        """Print the column names."""
        print("\n" + "  ".join(_fit(name, width) for name, width in COLUMNS))
        print("  ".join("-" * width for _, width in COLUMNS), flush=True)

    def row(self, question: str, answer: str, reply: Reply | None, *, right: bool, note: str = "") -> None:
        """Print one row; `right` says whether it came out as it must."""
        facts = reply.facts if reply is not None else {}
        cells = [question, answer, *(facts.get(name, "") for name in ("route", "reason", "model"))]
        cells.append(f"{reply.ms:.0f}" if reply is not None else "")
        mark = "ok" if right else "WRONG"
        if self._colour:
            mark = f"\033[{32 if right else 31}m{mark}\033[0m"
        line = "  ".join(_fit(cell, width) for cell, (_, width) in zip(cells, COLUMNS, strict=True))
        print(f"{line}  {mark}{'  ' + note if note else ''}", flush=True)
        if not right:
            self.failures.append(question)


def _fit(text: str, width: int) -> str:
    """Return the text in exactly `width` terminal columns; East Asian wide characters take two."""
    shown, used = "", 0
    for character in " ".join(text.split()):
        takes = 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if used + takes > width - 1 and used < width:
            shown, used = shown + "…", used + 1
            break
        shown, used = shown + character, used + takes
    return shown + " " * max(0, width - used)
