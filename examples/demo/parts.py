"""The demo's parts, each a real program on a free loopback port: brokers, an S3 server, agents, a gateway."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

BIN = Path(sys.executable).parent
DEVICE = "kitchen"
CLOUD_DEVICE = "cloud-1"
BUCKET = "spillway-demo"
ACCESS = {"AWS_ACCESS_KEY_ID": "demo", "AWS_SECRET_ACCESS_KEY": "demo-secret", "AWS_DEFAULT_REGION": "us-east-1"}


class DemoError(RuntimeError):
    """A part of the demo that could not be started; the message says which and where its log is."""


def free_port() -> int:
    """Return a TCP port of the loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(what: str, holds: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Wait until something holds; raises DemoError naming it."""
    end = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > end:
            raise DemoError(f"{what}: not within {timeout_s:.0f} s")
        time.sleep(0.05)


def listens(port: int) -> bool:
    """Whether something accepts connections on a loopback port."""
    with socket.socket() as probe:
        probe.settimeout(0.2)
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Parts:
    """Starts programs, keeps their logs, and ends them in reverse."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, command: list[str], *, port: int = 0, extra: dict[str, str] | None = None) -> None:
        """Start a program and, where it has a port, wait until it listens."""
        with (self.folder / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env={**os.environ, **ACCESS, **(extra or {})}
            )
        if port:
            wait_for(f"{name} (log: {self.folder / name}.log)", lambda: self._listens(name, port))

    def runs(self, name: str) -> bool:
        """Whether a program has not ended."""
        return self._running[name].poll() is None

    def _listens(self, name: str, port: int) -> bool:
        if not self.runs(name):
            raise DemoError(f"{name} ended at once: see {self.folder / name}.log")
        return listens(port)

    def stop(self, name: str, how: signal.Signals = signal.SIGTERM) -> int:
        """Signal a program and return its exit status."""
        process = self._running.pop(name)
        process.send_signal(how)
        try:
            return process.wait(timeout=40)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def stop_all(self) -> dict[str, int]:
        """End everything in reverse order; return the exit statuses."""
        return {name: self.stop(name) for name in reversed(list(self._running))}


def start_broker(parts: Parts, name: str, port: int) -> None:
    """Start mosquitto with persistence, as the installation guide asks."""
    folder = parts.folder / name
    folder.mkdir(exist_ok=True)
    config = parts.folder / f"{name}.conf"
    lines = [
        f"listener {port} 127.0.0.1",
        "allow_anonymous true",
        "persistence true",
        f"persistence_location {folder}/",
        "max_inflight_messages 0",
        "max_queued_messages 10000",
        "set_tcp_nodelay true",
        "user root" if os.geteuid() == 0 else "",
    ]
    config.write_text("\n".join(lines) + "\n", "utf-8")
    mosquitto = shutil.which("mosquitto") or "/usr/sbin/mosquitto"
    parts.start(name, [mosquitto, "-c", str(config)], port=port)


def start_s3(parts: Parts, port: int) -> None:
    """Start an S3-compatible server in memory."""
    parts.start("s3", [str(BIN / "moto_server"), "-H", "127.0.0.1", "-p", str(port)], port=port)


def start_agent(parts: Parts, name: str, config: str, port: int = 0) -> None:
    """Write an agent's configuration and start it."""
    path = parts.folder / f"{name}.toml"
    path.write_text(config, "utf-8")
    parts.start(name, [str(BIN / "spillway"), "run", "--config", str(path)], port=port)


def start_gateway(parts: Parts, config: str) -> None:
    """Write the gateway's configuration and start it."""
    path = parts.folder / "gateway.toml"
    path.write_text(config, "utf-8")
    parts.start("gateway", [str(BIN / "spillway-gateway"), "--config", str(path)])
    wait_for(f"gateway (log: {parts.folder}/gateway.log)", lambda: _says(parts, "gateway", "is up"))


def _says(parts: Parts, name: str, text: str) -> bool:
    """Whether a program that still runs has written a text to its log."""
    if not parts.runs(name):
        raise DemoError(f"{name} ended at once: see {parts.folder}/{name}.log")
    return text in (parts.folder / f"{name}.log").read_text("utf-8")
