"""A box without links: the real service over a real outbox, with twins of its workers and of the cloud."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from agent.config import Config, parse_config
from agent.intake import Address, Ticket
from agent.scheduler import ModelQueue
from agent.service import Service
from agent.telemetry import Telemetry
from cloud_sync.database import Database
from cloud_sync.outbox import Outbox
from models.request import Dialect, Request, Response
from tests.fakes.cloud_door import MemoryCloud
from tests.fakes.worker import MemoryWorker
from tests.support.virtual_time import VirtualLoop

LEAST = """
[device]
name = "kitchen"
certificate = "device.pem"
key = "device.key"
[local]
[cloud]
[repository]
url = "file:///srv/models"
"""


class Asked:
    """One question and everything that came back."""

    def __init__(self, ticket: Ticket) -> None:
        self.ticket = ticket
        self.replies: list[Response] = []
        self.settled = 0

    @property
    def finals(self) -> list[Response]:
        """The final replies; there must be one."""
        return [reply for reply in self.replies if reply.final]

    @property
    def final(self) -> Response:
        """The one final reply."""
        (reply,) = self.finals
        return reply

    @property
    def code(self) -> str:
        """The code of the one final reply, empty for an answer."""
        return self.final.code


class Box:
    """The service and what is around it."""

    def __init__(self, config: Config, database: Database, cloud: MemoryCloud | None) -> None:
        self.config = config
        self.database = database
        self.cloud = cloud
        self.clock = asyncio.get_running_loop().time
        self.telemetry = Telemetry()
        self.outbox = Outbox(database, config.limits.outbox_rows, config.limits.outbox_bytes)
        self.service = Service(config, outbox=self.outbox, cloud=cloud, telemetry=self.telemetry, clock=self.clock)

    def serve(self, worker: MemoryWorker) -> MemoryWorker:
        """Let a ready worker take over its model."""
        name = worker.version.name
        queue = self.service.queues.setdefault(name, ModelQueue(name, self.clock))
        queue.starting = False
        queue.replace_worker(worker if worker.ready.done() else worker.serve())
        return worker

    def ask(
        self,
        body: bytes = b"hello",
        *,
        model: str = "digits",
        deadline_s: float = 30.0,
        key: bytes | None = None,
        qos: int = 1,
        addressed: bool = True,
        ident: str = "",
        **facts: object,
    ) -> Asked:
        """Ask as a door does; `facts` are the request's."""
        request = Request(
            model=model,
            content_type="text/plain",
            body=body,
            dialect=Dialect.HUGGINGFACE,
            **facts,  # type: ignore[arg-type]
        )
        now = self.clock()
        address = Address(topic="spillway/kitchen/reply/me/x", correlation=key, qos=qos) if addressed else None

        async def send(response: Response) -> None:
            asked.replies.append(response)

        def settle() -> None:
            asked.settled += 1

        ticket = Ticket(
            request,
            received_at=now,
            deadline_at=now + deadline_s,
            send=send,
            settle=settle,
            address=address,
            key=key,
            ident=ident,
        )
        asked = Asked(ticket)
        self.service.accept(ticket)
        return asked

    async def finished(self, *asked: Asked) -> None:
        """Wait until these are done with, and hold what is true of every request."""
        await asyncio.gather(*(one.ticket.task for one in asked if one.ticket.task is not None))
        for one in asked:
            if one.ticket.task is not None:
                assert len(one.finals) == 1, one.replies
                assert one.replies[-1].final
                assert one.settled == 1
                assert one.ticket not in self.service.intake.tickets


async def turns(number: int = 20) -> None:
    """Let everything run that can, without time passing."""
    for _ in range(number):
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def open_box(folder: Path, addition: str = "", *, cloud: MemoryCloud | None = None) -> AsyncIterator[Box]:
    """Open a box in `folder`; `addition` is more configuration. Nothing may be left in flight at its end."""
    database = await Database.open(folder / "state.db", reserve_bytes=4096)
    loop = asyncio.get_running_loop()
    if isinstance(loop, VirtualLoop):
        loop.watch(lambda: database._waiting > 0)
    try:
        yield Box(parse_config(LEAST + addition), database, cloud)
    finally:
        await database.close()
