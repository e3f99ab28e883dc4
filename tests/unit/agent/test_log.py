from __future__ import annotations

import io
import logging
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.log import JournalFormatter, start_logging


def record(message: str, *, level: int = logging.INFO, error: BaseException | None = None) -> logging.LogRecord:
    exc_info = (type(error), error, error.__traceback__) if error is not None else None
    return logging.LogRecord("agent.test", level, __file__, 1, "%s", (message,), exc_info)


@pytest.mark.parametrize(
    ("level", "prefix"),
    [(logging.DEBUG, "<7>"), (logging.INFO, "<6>"), (logging.WARNING, "<4>"), (logging.ERROR, "<3>")],
)
def test_the_journal_gets_a_priority_and_the_logger_s_name(level: int, prefix: str) -> None:
    line = JournalFormatter(prefix=True).format(record("hello", level=level))
    assert line == f"{prefix}agent.test: hello"


def test_a_terminal_gets_time_and_level_instead() -> None:
    line = JournalFormatter(prefix=False).format(record("hello"))
    assert line.endswith("INFO agent.test: hello")
    assert not line.startswith("<")


@given(st.text(max_size=200))
def test_e18_whatever_an_asker_sent_is_one_line_without_control_characters(text: str) -> None:
    line = JournalFormatter(prefix=True).format(record(text))
    assert len(line.splitlines()) == 1
    assert line.isprintable()


def test_e18_a_line_break_in_a_message_is_shown_and_not_made() -> None:
    line = JournalFormatter(prefix=True).format(record("asked\n<0>agent: the box is on fire\r\n"))
    assert line == r"<6>agent.test: asked\n<0>agent: the box is on fire\r\n"


def test_e18_bidirectional_and_invisible_characters_are_not_written() -> None:
    assert JournalFormatter(prefix=True).format(record("a\u202eb\u200bc\x1b[31m")) == "<6>agent.test: a?b?c?[31m"


def test_a_traceback_follows_on_lines_of_its_own_with_the_same_priority() -> None:
    error = ValueError("bad\n<0>forged: line")
    lines = JournalFormatter(prefix=True).format(record("failed", level=logging.ERROR, error=error)).splitlines()
    assert lines[0] == "<3>agent.test: failed"
    assert any("ValueError: bad" in line for line in lines)
    assert all(line.startswith("<3>") for line in lines)


def test_e18_a_line_break_in_a_message_with_a_traceback_is_not_made_either() -> None:
    lines = JournalFormatter(prefix=True).format(record("a\nb", error=ValueError("x"))).splitlines()
    assert lines[0] == r"<6>agent.test: a\nb"


def test_logging_goes_to_standard_error_in_the_form_that_its_reader_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("JOURNAL_STREAM", "8:1234")
    try:
        start_logging("warning")
        logging.getLogger("agent.x").info("not told")
        logging.getLogger("agent.x").warning("told")
    finally:
        root.handlers[:], root.level = before[0], before[1]
    assert stream.getvalue() == "<4>agent.x: told\n"
