"""A small fleet in a folder: an admin's home, a repository, model folders, and boxes that sync from it."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import msgspec

from cloud_sync.fleet.cli import main
from cloud_sync.sync_settings import SyncError, SyncEvent, SyncOutcome, SyncSettings, sync_event
from models.manifest import BoxFacts

BOX = BoxFacts("x86_64", {"onnxruntime": "1.32.0"}, memory_mb=4096)


class Fleet:
    """One fleet under `folder`; `repository` defaults to a folder beside it."""

    def __init__(self, folder: Path, repository: str = "", *options: str) -> None:
        self.folder = folder
        self.repository = repository or f"file://{folder}/repository"
        self.options = options
        self.run("init", "--repository", self.repository, *options)

    @property
    def objects(self) -> Path:
        """The repository's folder."""
        return self.folder / "repository"

    def run(self, command: str, *arguments: str, home: str = "home") -> Any:
        """Run a command of `spillway-fleet` and return its report; an error becomes an AssertionError."""
        code, report = self.ask(command, *arguments, home=home)
        assert code == 0, report
        return report

    def ask(self, command: str, *arguments: str, home: str = "home") -> tuple[int, Any]:
        """Run a command of `spillway-fleet` and return its exit code and what it printed."""
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = main([command, "--home", str(self.folder / home), "--json", *arguments])
        return code, json.loads(out.getvalue())

    def model_folder(self, files: dict[str, bytes], name: str = "model") -> Path:
        """Write a model folder that no runtime opens, because it has no golden samples."""
        folder = self.folder / "models" / name
        for path, data in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        (folder / "spillway.toml").write_text('task = "tensors"\nformat = "onnx"\n')
        return folder

    def publish(self, version: str, files: dict[str, bytes], name: str = "digits", home: str = "home") -> str:
        """Publish files as a version and return its digest."""
        folder = self.model_folder(files, f"{name}-{version}")
        report = self.run("publish", str(folder), "--name", name, "--version", version, home=home)
        digest: str = report["digest"]
        return digest

    def settings(self, device: str = "box-1", **changes: Any) -> SyncSettings:
        """What a box's agent would hand to a sync pass."""
        defaults: dict[str, Any] = {
            "device": device,
            "groups": ["all"],
            "state_dir": str(self.folder / device),
            "repository": self.repository,
            "root": str(self.folder / "home" / "root.json"),
            "box": BOX,
            "reserve_bytes": 0,
            "attempts": 2,
            "backoff_s": 0.01,
        }
        return SyncSettings(**{**defaults, **changes})

    def state(self, box: str = "box-1") -> Path:
        """A box's state folder."""
        return self.folder / box


def sync(settings: SyncSettings, **popen: Any) -> tuple[int, list[SyncEvent]]:
    """Run a pass as the agent does and return its exit code and events."""
    ran = subprocess.run(
        [sys.executable, "-m", "cloud_sync.sync"],
        input=msgspec.json.encode(settings),
        stdout=subprocess.PIPE,
        timeout=60,
        check=False,
        **popen,
    )
    return ran.returncode, [sync_event.decode(line) for line in ran.stdout.splitlines()]


def outcome_of(events: list[SyncEvent]) -> SyncOutcome:
    """The last event, which must be an outcome."""
    last = events[-1]
    assert isinstance(last, SyncOutcome), last
    return last


def error_of(events: list[SyncEvent]) -> str:
    """The code of the last event, which must be an error."""
    last = events[-1]
    assert isinstance(last, SyncError), last
    return last.code


def holds(folder: Path, files: dict[str, bytes]) -> bool:
    """Whether a version's folder holds exactly these files beside its manifest."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    whole = all((folder / path).read_bytes() == data for path, data in files.items() if path in found)
    return whole and found == {*files, "manifest.json"}


def digest_of_folder(folder: Path) -> str:
    """The identity that a version's folder claims."""
    return hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
