"""What the speed benchmarks share: a broker, a fleet with the bench's models, an agent, an echo, and figures."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, Self

from bench.graphs import make_encoder, make_tiny, make_wide
from models.manifest import parse_manifest

ROOT: Final = Path(__file__).resolve().parent.parent
KEPT: Final = ROOT / ".run" / "bench"
"""Where the models and the signed repository stay between runs."""
MADE: Final = "3"
"""Raised whenever what lies there would be made otherwise."""
DEVICE: Final = "bench"
PATIENCE_S: Final = 60.0
BROKER: Final = shutil.which("mosquitto") or "/usr/sbin/mosquitto"
MODELS: Final[dict[str, Callable[[Path], None]]] = {"encoder": make_encoder, "tiny": make_tiny, "wide": make_wide}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def until(what: Callable[[], bool], problem: str) -> None:
    ends_at = time.monotonic() + PATIENCE_S
    while not what():
        if time.monotonic() > ends_at:
            raise TimeoutError(problem)
        time.sleep(0.01)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Program:
    """A process that is ended with its `with`."""

    def __init__(self, *command: str | Path, log: Path, env: dict[str, str] | None = None) -> None:
        with log.open("ab") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=env, cwd=ROOT)
        self.pid = self.process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def broker(folder: Path) -> tuple[Program, int]:
    """Start mosquitto with the limits that a box's broker has, and nothing durable."""
    port = free_port()
    settings = folder / "mosquitto.conf"
    settings.write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous true\nmax_queued_messages 20000\nmax_inflight_messages 0\n"
        "set_tcp_nodelay true\n"
    )
    program = Program(BROKER, "-c", settings, log=folder / "mosquitto.log")
    until(lambda: listens(port), "mosquitto does not listen")
    return program, port


def models() -> Path:
    """Return the folder with the models and their repository, made where it is not there yet."""
    home = KEPT / MADE
    if not (home / "done").exists():
        shutil.rmtree(KEPT, ignore_errors=True)
        for name, make in MODELS.items():
            make(home / name)
        fleet(home, "init", "--repository", f"file://{home / 'repository'}")
        for name in MODELS:
            fleet(home, "publish", str(home / name), "--name", name, "--version", "1")
            fleet(home, "deploy", name, f"{name}=1")
        fleet(home, "deploy", "everything", *(f"{name}=1" for name in MODELS))
        (home / "done").touch()
    return home


def fleet(home: Path, command: str, *arguments: str) -> None:
    program = [sys.executable, "-m", "cloud_sync.fleet.cli", command, "--home", str(home / "fleet"), *arguments]
    subprocess.run(program, check=True, capture_output=True, cwd=ROOT)


def manifest_of(model: str) -> tuple[bytes, str]:
    """Return a published model's manifest as the repository has it, and the name of its variant."""
    folder = models() / "repository" / "targets" / "models" / model
    (path,) = (path for path in folder.glob("*.json") if not path.name.endswith("sources.json"))
    raw = path.read_bytes()
    return raw, parse_manifest(raw).variants[0].name


CONFIG: Final = """
[device]
name = "{device}"
groups = ["{group}"]
[local]
port = {port}
max_packet_bytes = {packet}
[repository]
url = "file://{home}/repository"
root = "{home}/fleet/root.json"
[state]
directory = "{folder}/state-{group}"
[http]
port = {http}
[limits]
max_body_bytes = {most}
worker_threads = {threads}
[log]
level = "warning"
"""


class Agent(Program):
    """A running `spillway run` that serves the models of one group; `worker` is the process of its only one."""

    def __init__(self, folder: Path, port: int, group: str, *, threads: int = 0) -> None:
        self.http = free_port()
        config = folder / f"{group}.toml"
        home = models()
        said = CONFIG.format(
            device=DEVICE,
            group=group,
            port=port,
            home=home,
            folder=folder,
            http=self.http,
            most=40 << 20,
            packet=48 << 20,
            threads=threads,
        )
        config.write_text(said)
        address = folder / f"{group}.notify"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ear:
            ear.bind(str(address))
            ear.settimeout(PATIENCE_S / 4)
            environment = os.environ | {"NOTIFY_SOCKET": str(address)}
            command = (sys.executable, "-m", "agent.cli", "run", "--config", config)
            super().__init__(*command, log=folder / f"{group}.log", env=environment)
            served = len(MODELS) if group == "everything" else 1
            while f"{served} of {served} models serving" not in ear.recv(4096).decode():
                if self.process.poll() is not None:
                    raise RuntimeError(f"the agent ended: {(folder / f'{group}.log').read_text()}")
        address.unlink()

    @property
    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        named = {int(child): Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
        return [child for child, command in named.items() if b"models.worker" in command]


@contextlib.contextmanager
def folder_of(name: str) -> Iterator[Path]:
    """Yield a folder for what a run writes; what was logged is kept where the run fails."""
    folder = Path(tempfile.mkdtemp(prefix=f"spillway-{name}-"))
    try:
        yield folder
    except BaseException:
        print(f"the logs are in {folder}", file=sys.stderr)
        raise
    shutil.rmtree(folder)


def pss_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no Pss of process {pid}")


def cpu_s(*pids: int) -> float:
    """Return the processor seconds that these processes have used, by the scheduler's own clock where there is one."""
    return sum(_cpu_s(pid) for pid in pids)


def _cpu_s(pid: int) -> float:
    nanoseconds = 0
    with contextlib.suppress(OSError):  # it or one of its threads has just ended
        for task in Path(f"/proc/{pid}/task").iterdir():
            nanoseconds += int((task / "schedstat").read_text().split()[0])
    return nanoseconds / 1e9


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def p50(values: Sequence[float]) -> float:
    return statistics.median(values)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a markdown table."""
    print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(str(cell) for cell in row)} |")


def verdict(figure: float, bound: float, *, least: bool = False) -> str:
    """Say a ratio and whether it keeps its bound."""
    kept = figure >= bound if least else figure <= bound
    word = "at least" if least else "at most"
    return f"{figure:.2f} ({word} {bound}: {'kept' if kept else 'MISSED'})"
