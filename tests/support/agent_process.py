"""The agent as a box runs it: a process of its own, told and heard only from outside."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Self

import psutil

from tests.support.fleet import GROUP, Fleet
from tests.support.waiting import until

DEVICE = "kitchen"
CONFIG = """
[device]
name = "{device}"
groups = ["{group}"]
[state]
directory = "{folder}/state"
[local]
port = {port}
max_backoff_s = 0.2
[repository]
url = "{repository}"
root = "{root}"
{more}
"""


class AgentProcess:
    """`python -m agent.cli run`; `ready_after_s` is how long READY=1 took."""

    def __init__(self, folder: Path, port: int, fleet: Fleet, more: str = "", *, group: str = GROUP) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.config = folder / "spillway.toml"
        self.config.write_text(
            CONFIG.format(
                device=DEVICE,
                group=group,
                folder=folder,
                port=port,
                repository=fleet.repository,
                root=fleet.root,
                more=more,
            )
        )
        self.log = folder / "log"
        self.ready_after_s = 0.0
        self.told: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None
        self._ear: socket.socket | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self, *, ready: bool = True) -> None:
        """Start it, and wait for READY=1 unless told otherwise."""
        self._listen()
        started = time.monotonic()
        command = [sys.executable, "-m", "agent.cli", "run", "--config", str(self.config)]
        environment = os.environ | {"NOTIFY_SOCKET": str(self.folder / "notify")}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        if ready:
            until(lambda: self.heard("READY=1"), told=self.log.read_text)
            self.ready_after_s = time.monotonic() - started

    def heard(self, word: str) -> bool:
        """Whether the agent told its service manager this since it was started."""
        return word in self.told

    def workers(self) -> list[psutil.Process]:
        """Return the processes that hold a model."""
        return [child for child in psutil.Process(self.pid).children() if "models.worker" in child.cmdline()]

    @property
    def pid(self) -> int:
        """The agent's process id."""
        assert self.process is not None
        return self.process.pid

    def stop(self, timeout_s: float = 20.0) -> int:
        """Send SIGTERM and return the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def wait(self, timeout_s: float = 20.0) -> int:
        """Wait for its own end and return the exit code."""
        assert self.process is not None
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        """End it as a power cut does."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
        self._hush()

    def _listen(self) -> None:
        """Hear what a service manager would; a socket that nobody reads takes only ten messages."""
        self._hush()
        path = self.folder / "notify"
        path.unlink(missing_ok=True)
        self._ear = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._ear.bind(str(path))
        self.told = []
        threading.Thread(target=_hear, args=(self._ear, self.told), daemon=True).start()

    def _hush(self) -> None:
        if self._ear is not None:
            self._ear.shutdown(socket.SHUT_RD)
            self._ear.close()
            self._ear = None


def _hear(ear: socket.socket, told: list[str]) -> None:
    with contextlib.suppress(OSError):
        while data := ear.recv(4096):
            told += data.decode().splitlines()
