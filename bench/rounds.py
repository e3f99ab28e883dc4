"""The agent's supervision without its doors: loads and unloads the models of a state folder, and weighs itself.

`rounds.py CONFIG NUMBER WARM`, started by `footprint.py`; prints one line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import time
from pathlib import Path

from agent.activation import Activation
from agent.config import Config, load_config
from agent.health import Health
from agent.intake import Ticket
from agent.machine import box_facts
from agent.service import Service
from agent.telemetry import Telemetry
from cloud_sync.database import Database
from cloud_sync.outbox import Outbox
from cloud_sync.state import State
from models.request import Dialect, Request, Response

ROOT = Path(__file__).resolve().parent.parent
PICTURE = (ROOT / "examples" / "inputs" / "digit-7.png").read_bytes()
ROW = b'{"inputs": [[15.0, 15.1, 15.2, 15.3, 15.4, 15.5, 15.6, 15.7, 15.8, 15.9, 16.0, 16.1]]}'
SETTLE_S = 0.2


class Rounds:
    """A box of models that come and go."""

    def __init__(self, activation: Activation, service: Service) -> None:
        self.activation = activation
        self.service = service
        self.took_s: list[float] = []

    async def serving(self) -> None:
        """Wait until every model serves."""
        while any(report.state != "serving" for report in self.activation.reports().values()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    async def load(self, model: str) -> None:
        """Have an unloaded model loaded as on a box: by asking it."""
        began_s = time.monotonic()
        answered: asyncio.Future[Response] = asyncio.get_running_loop().create_future()

        async def send(response: Response) -> None:
            answered.set_result(response)

        now = asyncio.get_running_loop().time()
        kind, body = ("image/png", PICTURE) if model.startswith("digits") else ("application/json", ROW)
        request = Request(model=model, content_type=kind, body=body, dialect=Dialect.HUGGINGFACE)
        self.service.accept(Ticket(request, received_at=now, deadline_at=now + 60, send=send, settle=lambda: None))
        response = await answered
        if response.code not in {"", "bad_request"}:
            raise RuntimeError(f"{model}: {response.body!r}")
        self.took_s.append(time.monotonic() - began_s)

    async def unload(self, model: str) -> None:
        """Have a model unloaded as it is for another one."""
        await self.activation.unload(model)

    async def given_back(self, model: str) -> float:
        """Return the share of what loading took that unloading gives back."""
        await self.unload(model)
        without_mb = await weigh()
        await self.load(model)
        with_mb = await weigh()
        await self.unload(model)
        share = (with_mb - await weigh()) / (with_mb - without_mb)
        await self.load(model)
        return round(share, 3)


async def weigh() -> float:
    """Return what this process and its workers hold of their own, in MiB.

    Pages of files are left aside: they are the kernel's to keep, and how they are shared changes with every process.
    """
    await asyncio.sleep(SETTLE_S)
    return sum(own_mb(pid) for pid in ("self", *workers()))


def workers() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def own_mb(pid: str = "self") -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("Anonymous:"))


async def measure(config: Config, number: int, warm: int) -> dict[str, object]:
    """Load and unload, and say what it cost."""
    clock = asyncio.get_running_loop().time
    database = await Database.open(Path(config.state.directory) / "state.db")
    outbox = Outbox(database, config.limits.outbox_rows, config.limits.outbox_bytes)
    service = Service(config, outbox=outbox, cloud=None, telemetry=Telemetry(), clock=clock)
    activation = Activation(
        config, State(database), service, Health(), box=box_facts(), clock=clock, on_change=lambda: None
    )
    await activation.resume()
    looking = asyncio.ensure_future(activation.run())
    rounds = Rounds(activation, service)
    await rounds.serving()
    models = sorted(activation.reports())
    back = {model: await rounds.given_back(model) for model in models}
    for at in range(warm):
        await once(rounds, models[at % len(models)])
    before_mb = own_mb()
    rounds.took_s.clear()
    for at in range(number):
        await once(rounds, models[at % len(models)])
    growth_mb = own_mb() - before_mb
    looking.cancel()
    await activation.stop()
    await database.close()
    answer_s = round(statistics.median(rounds.took_s), 3)
    return {"number": number, "given_back": back, "growth_mb": round(growth_mb, 2), "answer_s": answer_s}


async def once(rounds: Rounds, model: str) -> None:
    await rounds.unload(model)
    await rounds.load(model)


def main() -> None:
    """Measure and print."""
    config, number, warm = sys.argv[1:]
    print(json.dumps(asyncio.run(measure(load_config(Path(config)), int(number), int(warm)))))


if __name__ == "__main__":
    main()
