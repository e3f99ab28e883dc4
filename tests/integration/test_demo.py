"""The demo is the longest test: every part of Spillway, as real programs, asked by an outside client."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_row_of_the_demo_comes_out_as_it_must() -> None:
    demo = [sys.executable, "-m", "examples.demo"]
    done = subprocess.run(demo, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WRONG" not in done.stdout
    assert "Everything came out as it must" in done.stdout
