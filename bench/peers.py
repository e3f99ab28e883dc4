"""The same model behind Spillway and behind other servers: requests a second, p99, memory, first answer.

`make bench-peers` makes each peer's environment first. One load generator for all over HTTP with kept-alive
connections, Spillway over MQTT beside it; every server runs alone, its turns interleaved with the others' by rounds.
Other servers are stopped (SIGSTOP) while one is asked, and the runtime's own best batch is measured in between.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final

import psutil

from agent.workers import Version, Worker
from bench import http_load
from bench.asker import Asker
from bench.bare import Bare
from bench.graphs import texts
from bench.parts import (
    DEVICE,
    ROOT,
    Agent,
    Program,
    broker,
    folder_of,
    free_port,
    manifest_of,
    models,
    percentile,
    pss_mb,
    table,
    verdict,
)
from models.channel import Piece
from models.request import Dialect, Request

HERE: Final = ROOT / "bench" / "peers"
VENVS: Final = ROOT / ".run" / "peers"
IN_FLIGHT: Final = 32
REQUESTS: Final = 96
"""Of each server in each round."""
BATCHES: Final = (1, 4, 8, 16, 32)
FIRST_S: Final = 120.0
TEXTS: Final = texts(64)
Ask = Callable[[int], Awaitable[tuple[float, list[float]]]]


class Server:
    """A server under test: its processes, and how it is asked `number` times."""

    def __init__(self, name: str, program: Program, ask: Ask) -> None:
        self.name = name
        self.program = program
        self.ask = ask
        self.rates: list[float] = []
        self.p99_ms: list[float] = []
        self.cpu_ms: list[float] = []
        self.pss_mb = 0.0
        self.first_s = 0.0

    def processes(self) -> list[psutil.Process]:
        own = psutil.Process(self.program.pid)
        return [own, *own.children(recursive=True)]

    def signal(self, number: signal.Signals) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    async def wait_first(self, begun: float) -> None:
        """Ask until there is an answer; note how long after `begun` it was there."""
        while True:
            try:
                await asyncio.wait_for(self.ask(1), 10)
            except (OSError, TimeoutError, ExceptionGroup):
                if time.perf_counter() - begun > FIRST_S or self.program.process.poll() is not None:
                    raise
                await asyncio.sleep(0.02)
            else:
                self.first_s = time.perf_counter() - begun
                return

    async def measure(self, number: int) -> None:
        processes = self.processes()
        before = used_s(processes)
        took_s, each = await self.ask(number)
        self.cpu_ms.append((used_s(processes) - before) * 1e3 / number)
        self.rates.append(number / took_s)
        self.p99_ms.append(percentile(each, 0.99) * 1e3)

    def row(self, best: float) -> tuple[str, ...]:
        rate = statistics.median(self.rates)
        p99_ms = statistics.median(self.p99_ms)
        return (
            self.name,
            f"{rate:.1f}",
            f"{rate / best:.2f}",
            f"{p99_ms:.0f}",
            f"{statistics.median(self.cpu_ms):.1f}",
            f"{self.pss_mb:.0f}",
            f"{self.first_s:.1f}",
        )


def used_s(processes: list[psutil.Process]) -> float:
    """Return the processor seconds of processes, of their threads that have ended too."""
    used = 0.0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            used += process.cpu_times().user + process.cpu_times().system
    return used


def held_mb(processes: list[psutil.Process]) -> float:
    """Return the memory of processes, those that have just ended left out."""
    held = 0.0
    for process in processes:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            held += pss_mb(process.pid)
    return held


def by_http(port: int, path: str, bodies: list[bytes], content_type: str) -> Ask:
    async def ask(number: int) -> tuple[float, list[float]]:
        return await http_load.at_once(port, path, bodies, content_type, number, min(IN_FLIGHT, number))

    return ask


def bodies_of(peer: str) -> tuple[str, list[bytes], str]:
    """Return path, bodies and content type of the same questions as a peer wants them."""
    if peer == "mlserver":
        asked = [{"inputs": [{"name": "t", "shape": [1], "datatype": "BYTES", "data": [text]}]} for text in TEXTS]
        return "/v2/models/encoder/infer", [json.dumps(one).encode() for one in asked], "application/json"
    if peer == "litserve":
        return "/infer", [json.dumps({"text": text}).encode() for text in TEXTS], "application/json"
    return "/infer", [text.encode() for text in TEXTS], "text/plain"


def command_of(peer: str, folder: Path, port: int) -> list[str | Path]:
    python = VENVS / peer / "bin" / "python"
    if peer != "mlserver":
        return [python, HERE / f"{peer}_server.py", str(port)]
    made = folder / "mlserver"
    made.mkdir()
    ports = {"http_port": port, "grpc_port": free_port(), "metrics_port": free_port()}
    settings = {"host": "127.0.0.1", "debug": False, "parallel_workers": 0, **ports}
    (made / "settings.json").write_text(json.dumps(settings))
    batching = {"max_batch_size": 16, "max_batch_time": 0.002}
    model = {"name": "encoder", "implementation": "mlserver_model.Encoder", **batching}
    (made / "model-settings.json").write_text(json.dumps(model))
    return [VENVS / peer / "bin" / "mlserver", "start", made]


@contextlib.contextmanager
def peer_server(peer: str, folder: Path, threads: int) -> Iterator[Server]:
    port = free_port()
    environment = os.environ | {
        "BENCH_MODEL": str(models() / "encoder"),
        "BENCH_THREADS": str(threads),
        "PYTHONPATH": str(HERE),
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with Program(*command_of(peer, folder, port), log=folder / f"{peer}.log", env=environment) as program:
        server = Server(peer, program, by_http(port, *bodies_of(peer)))
        try:
            yield server
        finally:
            server.signal(signal.SIGCONT)
            children = server.processes()[1:]
            program.process.terminate()
            with contextlib.suppress(Exception):  # whatever became of it, its children must not stay
                program.process.wait(10)
            for child in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()


async def first_answer(threads: int) -> float:
    """Return the seconds from a worker's start to its first answer."""
    raw, variant = manifest_of("encoder")
    folder = models() / "encoder"
    begun = time.perf_counter()
    worker = Worker(Version(name="encoder", version="1", digest="", folder=folder, variant=variant, manifest=raw))
    await worker.start(threads=threads, slots=1)
    answered: asyncio.Future[Piece] = asyncio.get_running_loop().create_future()
    request = Request(model="m", content_type="text/plain", body=TEXTS[0].encode(), dialect=Dialect.HUGGINGFACE)
    worker.ask(request, 60_000, answered.set_result)
    piece = await answered
    took_s = time.perf_counter() - begun
    await worker.stop()
    assert not piece.code, piece.message
    return took_s


async def measure(servers: list[Server], rounds: int, number: int, bare: Bare) -> dict[int, list[float]]:
    """Ask every server in turn, the others stopped; return the runtime's own items a second by batch."""
    alone: dict[int, list[float]] = {batch: [] for batch in BATCHES}
    for server in servers:
        server.signal(signal.SIGSTOP)
    for turn in range(rounds + 1):  # the first is to warm up
        for server in servers:
            server.signal(signal.SIGCONT)
            await server.measure(number)
            if not turn:
                server.rates.clear()
                server.p99_ms.clear()
                server.cpu_ms.clear()
                server.pss_mb = held_mb(server.processes())
            server.signal(signal.SIGSTOP)
        for batch in BATCHES:
            begun = time.perf_counter()
            for _ in range(max(1, number // 2 // batch)):
                bare.texts(TEXTS[:batch])
            alone[batch].append(batch * max(1, number // 2 // batch) / (time.perf_counter() - begun))
    return alone


async def run(folder: Path, peers: list[str], rounds: int, number: int, threads: int) -> None:
    firsts = [await first_answer(threads) for _ in range(5)]
    bare = Bare(models() / "encoder", threads=threads)
    async with contextlib.AsyncExitStack() as stack:
        program, port = broker(folder)
        stack.enter_context(program)
        servers = []
        for peer in peers:
            begun = time.perf_counter()
            server = stack.enter_context(peer_server(peer, folder, threads))
            await server.wait_first(begun)
            server.signal(signal.SIGSTOP)
            servers.append(server)
        begun = time.perf_counter()
        agent = stack.enter_context(Agent(folder, port, "encoder", threads=threads))
        bodies = [text.encode() for text in TEXTS]
        over_http = Server("Spillway, HTTP", agent, by_http(agent.http, "/models/encoder", bodies, "text/plain"))
        await over_http.wait_first(begun)
        asker = await stack.enter_async_context(Asker(port))

        async def ask(count: int) -> tuple[float, list[float]]:
            return await asker.at_once(DEVICE, "encoder", bodies, "text/plain", count, IN_FLIGHT)

        over_mqtt = Server("Spillway, MQTT", agent, ask)
        over_mqtt.first_s = over_http.first_s
        servers += [over_http, over_mqtt]
        alone = await measure(servers, rounds, number, bare)
        for server in servers:
            server.signal(signal.SIGCONT)
    show(servers, alone, firsts)


def show(servers: list[Server], alone: dict[int, list[float]], firsts: list[float]) -> None:
    rates = {batch: statistics.median(rate) for batch, rate in alone.items()}
    best = max(rates.values())
    head = (
        "server",
        "requests/s",
        "of the runtime's best",
        "p99 ms",
        "processor ms a request",
        "PSS MiB",
        "first answer s",
    )
    rows = [server.row(best) for server in servers]
    rows += [
        (f"onnxruntime alone, batch {batch}", f"{rate:.1f}", f"{rate / best:.2f}", "", "", "", "")
        for batch, rate in rates.items()
    ]
    table(head, rows)
    ours, others = servers[-2:], servers[:-2]
    claims = [("first answer after a worker's start, s", verdict(statistics.median(firsts), 1.0))]
    for own in ours:
        rate = statistics.median(own.rates)
        claims.append((f"{own.name}: share of the runtime's best batch", verdict(rate / best, 0.85, least=True)))
        for other in others:
            theirs = statistics.median(other.rates)
            p99 = statistics.median(own.p99_ms) / statistics.median(other.p99_ms)
            claims += [
                (f"{own.name}: requests/s over {other.name}'s", verdict(rate / theirs, 1.0, least=True)),
                (f"{own.name}: p99 over {other.name}'s", verdict(p99, 1.0)),
            ]
    bare = next((other for other in others if other.name == "starlette"), None)
    if bare is not None:
        claims.append(("MiB above bare Starlette", verdict(ours[0].pss_mb - bare.pss_mb, 30.0)))
    table(("claim", "measured"), claims)


def main() -> int:
    """Measure and print; the verdict stands in the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--long", action="store_true", help="five times as many rounds")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--peers", default="starlette,litserve,mlserver,ray", help="which, by comma")
    options = parser.parse_args()
    threads = psutil.cpu_count(logical=False) or 2
    rounds = options.rounds or (15 if options.long else 3)
    with folder_of("peers") as folder:
        asyncio.run(run(folder, options.peers.split(","), rounds, REQUESTS, threads))
    return 0


if __name__ == "__main__":
    sys.exit(main())
