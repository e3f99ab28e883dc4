"""README.md is true: its snippets are run in order, in one shell, as a reader would type them.

A fenced block after `<!-- run -->` is run. In a `console` block a line after `$ ` is a command (a `\\` at its end
continues it) and the lines below are its output, where `…` stands for anything, alone on a line for any lines.
An `sh` block is run whole and must succeed.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PORTS = ("11883", "18080")
"""The ports that the README names; the test takes free ones in their place."""

LIMIT_S = 120
MARK = "@@@ step"
BLOCK = re.compile(r"^<!-- run -->\n```(console|sh)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


PRINTED = re.compile(r"^<!-- printed by make demo -->\n```\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def steps(readme: str) -> list[tuple[str, str]]:
    """Each command with the output that is promised for it, in order."""
    found: list[tuple[str, str]] = []
    for kind, text in BLOCK.findall(readme):
        found += [(text, "")] if kind == "sh" else console_steps(text)
    return found


def console_steps(text: str) -> Iterator[tuple[str, str]]:
    """The commands of a console block, each with what it prints."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        lines = part.splitlines(keepends=True)
        end = next(at for at, line in enumerate(lines, 1) if not line.endswith("\\\n"))
        yield "".join(lines[:end]), "".join(lines[end:])


def pattern_of(promised: str) -> str:
    """A regular expression for a promised output; the last line may end without a newline."""
    lines = [
        r"(?:.*\n)*?" if line == "…" else ".*?".join(map(re.escape, line.split("…"))) + r"\n"
        for line in promised.splitlines()
    ]
    return "".join(lines).removesuffix(r"\n") + r"\n?"


@pytest.fixture
def free_ports() -> list[str]:
    """A free loopback port for each of the README's."""
    with_ports = [socket.socket() for _ in PORTS]
    for one in with_ports:
        one.bind(("127.0.0.1", 0))
    ports = [str(one.getsockname()[1]) for one in with_ports]
    for one in with_ports:
        one.close()
    return ports


def run_all(script: str, folder: Path) -> str:
    """Run a script in a shell whose whole process group is ended afterwards; return what it printed."""
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "LANG": "C.UTF-8"}
    environment.pop("VIRTUAL_ENV", None)
    shell = subprocess.Popen(
        ["bash", "-c", "exec 2>&1\n" + script],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        return shell.communicate(timeout=LIMIT_S)[0]
    except subprocess.TimeoutExpired:
        end_session(shell.pid)
        return shell.communicate()[0] + f"\n(still running after {LIMIT_S} s)\n"
    finally:
        end_session(shell.pid)


def end_session(leader: int) -> None:
    """End every process of a session."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            pid, rest = int(stat.parent.name), stat.read_text("utf-8", "replace").rpartition(")")[2].split()
            if int(rest[3]) == leader:  # proc(5): state, ppid, pgrp, session
                os.kill(pid, signal.SIGKILL)


def test_the_readme_does_what_it_says(tmp_path: Path, free_ports: list[str]) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    promised = steps((ROOT / "README.md").read_text("utf-8"))
    script = "".join(f"{command}\necho '{MARK}'\n" for command, _ in promised)
    for written, free in zip(PORTS, free_ports, strict=True):
        script = script.replace(written, free)
    printed = run_all(script, tmp_path).split(f"{MARK}\n")
    for (command, output), got in zip(promised, printed, strict=False):
        assert re.fullmatch(pattern_of(output), got), f"$ {command}promised:\n{output}\ngot:\n{got}"
    assert len(printed) == len(promised) + 1, printed[-1]


def test_every_block_of_the_readme_is_run_or_names_make_targets() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    rest = PRINTED.sub("", BLOCK.sub("", readme))
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for block in re.findall(r"^```\w*\n(.*?)^```$", rest, re.DOTALL | re.MULTILINE):
        for line in block.splitlines():
            target = re.match(r"make ([a-z-]+)", line)
            assert target, f"not run by any test: {line}"
            assert re.search(rf"^{target[1]}:.*## ", makefile, re.MULTILINE), f"the Makefile has no {target[1]}"


def test_what_the_readme_shows_of_the_demo_is_what_the_demo_asks() -> None:
    shown = PRINTED.search((ROOT / "README.md").read_text("utf-8"))
    assert shown
    scenes = (ROOT / "examples" / "demo" / "scenes.py").read_text("utf-8")
    for row in shown[1].splitlines()[1:]:
        question = re.split(r"  +", row)[0]
        for word in re.findall(r"[^\W\d]{2,}", question):
            assert word in scenes, question
