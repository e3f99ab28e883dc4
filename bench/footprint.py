"""What an idle box costs: the agent's start, memory and processor time, its workers' memory, and whether it comes back.

`make bench-footprint`: a real broker, a signed repository made by `spillway-fleet`, the agent as systemd would start
it; then the agent's own supervision in a process of its own, where models are unloaded and loaded again by a request,
50 times, or 1,000 times with `ARGS=--long`. Memory is PSS from /proc/PID/smaps_rollup, in MiB of 2**20 bytes; times are
seconds of the monotonic clock. Exits 1 if a limit is missed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = Path(sys.executable).parent
SAMPLES = ("digits", "digits-int8", "sea-temperature")
STARTS = 5
SETTLE_S = 3.0
IDLE_S = 60.0
ROUNDS, LONG_ROUNDS, WARM_ROUNDS = 50, 1000, 10
PATIENCE_S = 60.0
MAX_READY_S = 2.0
MAX_PSS_MB = 45.0
MAX_IDLE_PERCENT = 0.5
MIN_GIVEN_BACK = 0.95
MAX_GROWTH_MB = 2.0
HEAVY = ("onnxruntime", "ai_edge_litert", "tflite_runtime", "numpy", "tokenizers", "botocore", "PIL")
"""What the agent must not have mapped (DESIGN 2): those of the forbidden packages that are native code."""


@dataclasses.dataclass
class Rounds:
    """What loading and unloading did: the share given back by model, and how much the agent grew over `number`."""

    number: int
    given_back: dict[str, float]
    growth_mb: float
    answer_s: float


@dataclasses.dataclass
class Figures:
    ready_s: float
    agent_mb: float
    agent_serving_mb: float
    worker_mb: list[float]
    idle_cpu_percent: float
    agent_cpu_percent: float
    wakes_s: float
    heavy_modules: list[str]
    rounds: Rounds

    def kept(self) -> bool:
        """Whether every limit is kept."""
        memory_mb = max(self.agent_mb, self.agent_serving_mb)
        light = self.ready_s <= MAX_READY_S and memory_mb <= MAX_PSS_MB and not self.heavy_modules
        back = min(self.rounds.given_back.values()) >= MIN_GIVEN_BACK and self.rounds.growth_mb <= MAX_GROWTH_MB
        return light and back and self.idle_cpu_percent < MAX_IDLE_PERCENT

    def rows(self) -> list[tuple[str, str, str]]:
        """What was measured, the figure, and its limit."""
        return [
            ("from start to READY=1, s, median", f"{self.ready_s}", f"at most {MAX_READY_S}"),
            ("agent, idle, no model, MiB", f"{self.agent_mb}", f"at most {MAX_PSS_MB}"),
            (f"agent, idle, {len(SAMPLES)} models serving, MiB", f"{self.agent_serving_mb}", f"at most {MAX_PSS_MB}"),
            (f"workers ({', '.join(SAMPLES)}), MiB", f"{self.worker_mb}", ""),
            ("agent and workers, idle, % of a core", f"{self.idle_cpu_percent}", f"under {MAX_IDLE_PERCENT}"),
            ("of it the agent; its wake-ups a second", f"{self.agent_cpu_percent}; {self.wakes_s}", ""),
            ("unloading gives back of what loading took", f"{self.rounds.given_back}", f"at least {MIN_GIVEN_BACK}"),
            (
                f"agent after {self.rounds.number} more loads and unloads, MiB",
                f"{self.rounds.growth_mb:+}",
                f"at most +{MAX_GROWTH_MB}",
            ),
            ("from the request for an unloaded model to its answer, s", f"{self.rounds.answer_s}", ""),
            ("runtimes mapped by the agent", ", ".join(self.heavy_modules) or "none", "none"),
        ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def fleet(home: Path, *arguments: str) -> None:
    subprocess.run([SCRIPTS / "spillway-fleet", *arguments, "--home", home], check=True, capture_output=True)


def make_repository(folder: Path) -> Path:
    """Make a fleet that runs the sample models; return its pinned root."""
    home = folder / "fleet"
    url = f"file://{folder / 'repository'}"
    subprocess.run([SCRIPTS / "spillway-fleet", "init", home, "--repository", url], check=True, capture_output=True)
    fleet(home, "deploy", "empty")
    for name in SAMPLES:
        fleet(home, "publish", str(ROOT / "examples" / "models" / name), "--name", name, "--version", "1")
    fleet(home, "deploy", "full", *(f"{name}=1" for name in SAMPLES))
    return home / "root.json"


def write_config(folder: Path, root: Path, port: int, group: str) -> Path:
    config = folder / f"{group}.toml"
    config.write_text(
        f'[device]\nname = "bench"\ngroups = ["{group}"]\n'
        f"[local]\nport = {port}\n"
        f'[repository]\nurl = "file://{folder / "repository"}"\nroot = "{root}"\n'
        f'[state]\ndirectory = "{folder / group}"\n',
        "utf-8",
    )
    return config


class Agent:
    """A running `spillway run`, and what it has told the service manager."""

    def __init__(self, folder: Path, config: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        address = folder / "notify"
        address.unlink(missing_ok=True)
        self._socket.bind(str(address))
        self._socket.settimeout(PATIENCE_S)
        begun = time.monotonic()
        with (folder / "agent.log").open("ab") as log:
            self.process = subprocess.Popen(
                [SCRIPTS / "spillway", "run", "--config", config],
                env=os.environ | {"NOTIFY_SOCKET": str(address)},
                stdout=log,
                stderr=log,
            )
        self.hear(lambda said: "READY=1" in said)
        self.ready_s = time.monotonic() - begun

    def hear(self, wanted: Callable[[str], bool]) -> None:
        """Wait for a message of the agent; raises TimeoutError."""
        ends_at = time.monotonic() + PATIENCE_S
        while not wanted(self._socket.recv(4096).decode()):
            if time.monotonic() > ends_at:  # it says every second that it lives
                raise TimeoutError(f"the agent did not say what it should within {PATIENCE_S:.0f} s")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(PATIENCE_S)
        self._socket.close()

    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(child) for child in children]


def pss_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no Pss of process {pid}")


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wakes(pid: int) -> int:
    """Count how often the threads of a process have gone to sleep, and so been woken."""
    tasks = Path(f"/proc/{pid}/task").glob("*/status")
    lines = [line for task in tasks for line in task.read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))


def heavy_modules(pid: int) -> list[str]:
    maps = Path(f"/proc/{pid}/maps").read_text()
    return [name for name in HEAVY if f"/{name}/" in maps]


def measure(folder: Path, root: Path, port: int, rounds: int) -> Figures:
    """Start agents and look at them."""
    empty, full = (write_config(folder, root, port, group) for group in ("empty", "full"))
    starts: list[float] = []
    idle_mb: list[float] = []
    heavy: set[str] = set()
    for _ in range(STARTS):
        agent = Agent(folder, empty)
        starts.append(agent.ready_s)
        time.sleep(SETTLE_S)
        idle_mb.append(pss_mb(agent.process.pid))
        heavy.update(heavy_modules(agent.process.pid))
        agent.stop()
    agent = Agent(folder, full)
    agent.hear(lambda said: f"{len(SAMPLES)} of {len(SAMPLES)} models serving" in said)
    time.sleep(SETTLE_S)
    pids = [agent.process.pid, *agent.workers()]
    before_s, before_wakes = [cpu_s(pid) for pid in pids], wakes(pids[0])
    time.sleep(IDLE_S)
    spent_s = [cpu_s(pid) - before for pid, before in zip(pids, before_s, strict=True)]
    wakes_s = round((wakes(pids[0]) - before_wakes) / IDLE_S, 1)
    figures = Figures(
        ready_s=round(statistics.median(starts), 2),
        agent_mb=round(statistics.median(idle_mb), 1),
        agent_serving_mb=round(pss_mb(agent.process.pid), 1),
        worker_mb=[round(pss_mb(pid), 1) for pid in agent.workers()],
        idle_cpu_percent=round(sum(spent_s) / IDLE_S * 100, 2),
        agent_cpu_percent=round(spent_s[0] / IDLE_S * 100, 2),
        wakes_s=wakes_s,
        heavy_modules=sorted(heavy.union(heavy_modules(agent.process.pid))),
        rounds=Rounds(0, {}, 0.0, 0.0),
    )
    agent.stop()
    figures.rounds = go_round(full, rounds)
    return figures


def go_round(config: Path, number: int) -> Rounds:
    """Load and unload in a process that holds nothing but the agent's supervision."""
    command = [sys.executable, str(ROOT / "bench" / "rounds.py"), str(config), str(number), str(WARM_ROUNDS)]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    return Rounds(**json.loads(done.stdout))


def main() -> int:
    """Measure, print a table and a line of JSON; return 1 if a limit is missed."""
    rounds = LONG_ROUNDS if "--long" in sys.argv[1:] else ROUNDS
    broker = shutil.which("mosquitto") or "/usr/sbin/mosquitto"
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="spillway-bench-") as name:
        folder = Path(name)
        root = make_repository(folder)
        with subprocess.Popen(
            [broker, "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as server:
            try:
                figures = measure(folder, root, port, rounds)
            finally:
                server.terminate()
    for row in (("", "measured", "bound"), ("---", "---", "---"), *figures.rows()):
        print("| {} | {} | {} |".format(*row))
    print(json.dumps(dataclasses.asdict(figures)))
    return 0 if figures.kept() else 1


if __name__ == "__main__":
    sys.exit(main())
