"""Logging for journald: a priority prefix on each line, and never a body or a secret."""

from __future__ import annotations

import logging
import os
import sys

PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


class JournalFormatter(logging.Formatter):
    """`<6>name: message`, as sd-daemon(3) describes; control characters are never written."""

    def __init__(self, *, prefix: bool) -> None:
        super().__init__("%(name)s: %(message)s" if prefix else "%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._prefix = prefix

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name that logging calls
        """Return the record without its traceback, as one line."""
        return super().formatMessage(record).replace("\r", "\\r").replace("\n", "\\n")

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line, and a traceback on lines of its own; none can pass for another record's."""
        mark = f"<{PRIORITIES.get(record.levelno, 6)}>" if self._prefix else ""
        return "\n".join(mark + _printable(line) for line in super().format(record).split("\n"))


def _printable(line: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in line)


def start_logging(level: str) -> None:
    """Send the log to standard error, in the journal's form where the journal reads it."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JournalFormatter(prefix="JOURNAL_STREAM" in os.environ))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
