"""A box whose versions lie in a folder and whose workers are twins."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec

from agent.activation import Activation
from agent.admission import Memory
from agent.config import parse_config
from agent.health import Health
from agent.house import Edges
from agent.workers import Holding, Version
from cloud_sync.report import ModelReport
from cloud_sync.state import State
from cloud_sync.sync_settings import SyncOutcome, TargetModel
from models.channel import Ask, Piece
from models.manifest import BoxFacts, Budget, Golden, digest_of, manifest_bytes
from tests.fakes.artifacts import manifest_of
from tests.fakes.worker import MemoryWorker, echo
from tests.support.box import LEAST, Asked, Box, open_box

BOX = BoxFacts(architecture="x86_64", backends={"onnxruntime": "1.32"})
GOLDEN = Golden("text/plain", b"golden", msgspec.Raw(b'{"outputs": "golden"}'), 0.0)

Script = Callable[[Ask], list[Piece]]


class Bench:
    """A box whose versions lie in a folder and whose workers are twins; `scripts` says how each version answers."""

    def __init__(self, box: Box, folder: Path) -> None:
        config = parse_config(LEAST + f'[state]\ndirectory = "{folder}"\n[limits]\ndrain_timeout_s = 5\n')
        self.box = box
        self.folder = folder
        self.state = State(box.database)
        self.health = Health()
        self.changes = 0
        self.made: list[MemoryWorker] = []
        self.scripts: dict[str, Script | None] = {}
        self.broken: dict[str, str] = {}
        self.lacking: list[str] = []
        self.without: list[str] = []
        self.total_mb = 4096.0
        """What the box has; each live worker takes what it `holds`."""
        self.holds: dict[str, Holding] = {}
        self.activation = Activation(
            config,
            self.state,
            box.service,
            self.health,
            box=BOX,
            clock=box.clock,
            on_change=self._changed,
            edges=Edges(new_worker=self._new_worker, memory=self.memory),
        )

    def memory(self) -> Memory:
        held = sum(worker.holds.resident_mb for worker in self.made if worker.serving)
        return Memory(total_mb=self.total_mb, free_mb=self.total_mb - held)

    def _changed(self) -> None:
        self.changes += 1

    def _new_worker(self, version: Version) -> MemoryWorker:
        worker = MemoryWorker(version, capacity=4, script=self.scripts.get(version.version, echo))
        worker.holds = self.holds.get(version.version, Holding())
        worker.broken = self.broken.get(version.version, "")
        worker._facts = msgspec.structs.replace(worker._facts, unprotected=self.lacking, fallbacks=self.without)
        self.made.append(worker)
        return worker

    def install(self, number: str, *, name: str = "digits", p95_ms: float = 0.0, memory_mb: int = 0) -> TargetModel:
        """Put a version on the disk as a pass of sync leaves it, and return what the pass says of it."""
        manifest = manifest_of({"model.onnx": number.encode()}, name=name, version=number)
        budget = Budget(p95_ms=p95_ms, memory_mb=memory_mb)
        manifest = msgspec.structs.replace(manifest, golden=[GOLDEN], budget=budget)
        raw = manifest_bytes(manifest)
        digest = digest_of(raw)
        folder = self.folder / "versions" / digest
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").write_bytes(raw)
        return TargetModel(name=name, version=number, digest=digest, folder=str(folder), variant="default", staged=True)

    async def apply(self, *targets: TargetModel) -> None:
        await self.activation.apply(SyncOutcome(models=list(targets), pools=[]))

    @property
    def report(self) -> ModelReport:
        return self.activation.reports()["digits"]

    @property
    def worker(self) -> MemoryWorker:
        return self.made[-1]

    async def ask(self) -> Asked:
        asked = self.box.ask(b"hi")
        await self.box.finished(asked)
        return asked


@contextlib.asynccontextmanager
async def bench(folder: Path) -> AsyncIterator[Bench]:
    async with open_box(folder) as box:
        made = Bench(box, folder)
        running = asyncio.ensure_future(made.activation.run())
        yield made
        running.cancel()
        await asyncio.wait((running,))
        await made.activation.stop()
        assert all(worker.ended.done() for worker in made.made), "a worker outlives the box"
