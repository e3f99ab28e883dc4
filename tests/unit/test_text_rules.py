"""`tools/check_text.py` can fail: each rule finds what it forbids, and nothing in plain text."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import check_text


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("# TO" + "DO: later", "unfinished work"),
        ("index = py" + "pi.org", "a registry's host"),
        ("cd /ro" + "ot/box", "a path of one machine"),
        ("@pytest.mark.sk" + "ip", "a test that hides something"),
    ],
)
def test_a_forbidden_text_is_named_with_its_file_and_line(text: str, meaning: str) -> None:
    (fault,) = check_text.text_faults("a.py", f"first line\n{text}\n")
    assert fault.startswith(f"a.py:2: {meaning}: ")


def test_ordinary_text_is_left_alone() -> None:
    assert list(check_text.text_faults("a.md", "A todo list skips nothing; work/main and /var/lib are paths.\n")) == []


def test_a_module_over_the_limit_wants_a_reason() -> None:
    text = '"""Long."""\n' + "x = 1\n" * check_text.MAX_MODULE_LINES
    (fault,) = check_text.module_faults("agent/a.py", text)
    assert "wants `# Long because" in fault
    assert list(check_text.module_faults("agent/a.py", f"# Long because of a table.\n{text}")) == []
    assert list(check_text.module_faults("tests/a.py", text)) == []


def test_a_function_over_the_limit_is_named() -> None:
    text = "def long() -> None:\n" + "    x = 1\n" * check_text.MAX_FUNCTION_LINES
    (fault,) = check_text.module_faults("agent/a.py", text)
    assert fault.startswith("agent/a.py:1: `long` has 61 lines")


def test_sample_models_that_are_too_large_together_are_found(tmp_path: Path) -> None:
    name = "examples/models/big/model.onnx"
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_bytes(b"\xff" * (check_text.MAX_MODELS_BYTES + 1))
    (fault,) = check_text.faults(tmp_path, [name])
    assert "at most 6000000" in fault
