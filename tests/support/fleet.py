"""A fleet with the example models in a folder repository, made with the admin's own program."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.fakes.samples import MODELS

GROUP = "default"
LONE = "lone"
"""A group whose boxes run digits alone, so that its only worker can be told."""
SAMPLES = ("digits", "sea-temperature", "language")


class Fleet:
    """`spillway-fleet` on a home of its own; boxes read `repository` and trust `root`."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "fleet"
        self.repository = (folder / "repository").as_uri()
        self.root = self.home / "root.json"
        self.run("init", "--repository", self.repository)

    def run(self, *arguments: str) -> str:
        """Run a command and return what it prints; a command that fails is the test's failure."""
        command = [sys.executable, "-m", "cloud_sync.fleet.cli", arguments[0], "--home", str(self.home), *arguments[1:]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(arguments)}: {done.stderr}")
        return done.stdout

    def publish(self, name: str, version: str = "1", folder: Path | None = None) -> None:
        """Publish a folder (or the example of that name) as a version of a model."""
        self.run("publish", str(folder or MODELS / name), "--name", name, "--version", version)

    def deploy(self, group: str, *models: str) -> None:
        """Let a group's boxes run these versions (`digits=1`)."""
        self.run("deploy", group, *models)


def sample_fleet(folder: Path) -> Fleet:
    """Make a fleet that runs version 1 of the small example models."""
    fleet = Fleet(folder)
    for name in SAMPLES:
        fleet.publish(name)
    fleet.deploy(GROUP, *(f"{name}=1" for name in SAMPLES))
    fleet.deploy(LONE, "digits=1")
    return fleet
