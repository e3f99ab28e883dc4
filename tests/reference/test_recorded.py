"""Every recorded answer of the reference is ours too, within 1e-4."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.reference.case import CASES
from tests.reference.compare import compare

FOLDERS = sorted(path.parent for path in (Path(__file__).parent / "recorded").glob(f"*/{CASES}"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_answers_are_those_of_the_reference(folder: Path) -> None:
    found = compare(folder)
    assert not found.problems
    assert found.cases
