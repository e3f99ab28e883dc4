"""What the agent makes of its sync process: every way in which that can end."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import msgspec
import psutil
import pytest

from agent.sync import run_sync
from cloud_sync.errors import FetchError
from cloud_sync.sync_settings import SyncOutcome, SyncSettings, TargetModel
from models.manifest import BoxFacts

SETTINGS = SyncSettings(
    device="kitchen",
    groups=["all"],
    state_dir="/nowhere",
    repository="file:///nowhere",
    root="/nowhere/root.json",
    box=BoxFacts("x86_64"),
)
OUTCOME = SyncOutcome(models=[TargetModel(name="digits", version="1")], pools=[])


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a script that stands in the interpreter's place, so that it is run as the sync process."""
    path = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(path))
    return path


def write(program: Path, script: str) -> None:
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def line(event: object) -> str:
    return f"echo '{msgspec.json.encode(event).decode()}'"


async def test_the_settings_go_in_and_the_outcome_comes_out(program: Path, tmp_path: Path) -> None:
    told = tmp_path / "told"
    progress = '{"event":"progress","model":"digits","version":"1","done_bytes":1,"total_bytes":2}'
    write(program, f"cat > {told}; echo '{progress}'; {line(OUTCOME)}")
    assert await run_sync(SETTINGS) == OUTCOME
    assert msgspec.json.decode(told.read_bytes(), type=SyncSettings) == SETTINGS


async def test_an_error_is_raised_with_its_code(program: Path) -> None:
    write(program, """cat > /dev/null; echo '{"event":"error","code":"rollback","message":"version 3"}'; exit 1""")
    with pytest.raises(FetchError, match="version 3") as caught:
        await run_sync(SETTINGS)
    assert caught.value.code == "rollback"


async def test_an_end_without_a_word_is_an_error(program: Path) -> None:
    write(program, "exit 0")
    with pytest.raises(FetchError, match="without a word"):
        await run_sync(SETTINGS)


@pytest.mark.parametrize("script", ["echo no json", """echo '{"event":"dance"}'""", "head -c 6000000 /dev/zero"])
async def test_words_that_are_none_are_an_error_that_the_looker_knows_and_leave_no_process(
    program: Path, script: str
) -> None:
    write(program, f"cat > /dev/null; {script}; exec sleep 60")
    with pytest.raises((ValueError, msgspec.MsgspecError)):
        await run_sync(SETTINGS)
    assert not [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]


async def test_a_pass_that_is_given_up_leaves_no_process(program: Path) -> None:
    write(program, "exec sleep 60")
    passing = asyncio.ensure_future(run_sync(SETTINGS))
    async with asyncio.timeout(10):
        while not psutil.Process().children():  # noqa: ASYNC110 - the kernel tells nobody
            await asyncio.sleep(0.01)
    passing.cancel()
    await asyncio.gather(passing, return_exceptions=True)
    assert not [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]


async def test_a_program_that_is_not_there_is_an_error_that_the_looker_knows(program: Path) -> None:
    del program
    with pytest.raises(OSError, match="No such file"):
        await run_sync(SETTINGS)
