"""What a restart owes: requests that were accepted before it are answered after it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from agent.intake import Address, Ticket
from agent.mqtt import MqttDoor
from agent.service import Service
from cloud_sync.outbox import Outbox, Row
from models.answer import render_error
from models.request import Request, Response, Status

log = logging.getLogger(__name__)

ROOM_S = 0.05


async def seed(outbox: Outbox, service: Service) -> None:
    """Learn every answer from before the restart, before the first asker can ask again."""
    for key, answer in await outbox.answers():
        service.intake.recent.put(key, answer)
    for head in await outbox.rows(bodies=False):
        if head.key and head.answer is not None:
            service.intake.recent.put(head.key, head.answer)


async def recover(outbox: Outbox, service: Service, door: MqttDoor, clock: Callable[[], float]) -> None:
    """Take every stored request up again: send the answer it has, or have it answered within its deadline."""
    heads = await outbox.rows(bodies=False)
    for head in heads:
        while service.intake.full:  # noqa: ASYNC110 - room comes with every answer; a look now and then is enough
            await asyncio.sleep(ROOM_S)
        row = await outbox.row(head.id)  # its body only now: all of them may be more than the box's memory
        if row is None:
            continue
        ticket = _ticket(row, door, clock())
        ticket.stored = True
        twin = service.intake.in_flight(ticket.key)
        if twin is not None:  # its asker was quicker and has asked again: that one answers for this row too
            twin.id, twin.stored = row.id, True
            twin.settle()
            continue
        ticket.handed_off, ticket.reason = row.place == "cloud", row.reason
        if row.answer is not None:
            service.repeat(ticket, row.answer)
        elif row.damaged:
            body = render_error(row.dialect, "internal", "the box's disk lost this request; ask again")
            service.repeat(ticket, Response(status=Status.ERROR, body=body, code="internal", model=row.model))
        else:
            service.accept(ticket)
    if heads:
        log.info("%d requests from before the restart are taken up again", len(heads))


def _ticket(row: Row, door: MqttDoor, now: float) -> Ticket:
    """Rebuild a ticket; a clock that went back cannot stretch the deadline beyond what it was."""
    wall_ms = int(time.time() * 1e3)
    left_ms = min(row.deadline_at_ms - wall_ms, row.deadline_at_ms - row.stored_at_ms)
    address = Address(
        topic=row.reply_topic,
        correlation=row.correlation,
        qos=row.qos,
        envelope_id=row.envelope_id,
        enveloped=row.enveloped,
    )
    request = Request(
        model=row.model,
        content_type=row.content_type,
        body=row.body,
        dialect=row.dialect,
        client=row.client,
        deadline_ms=max(0, left_ms),
        priority=row.priority,
        local_only=row.local_only,
        stream=row.stream,
        provisional=row.provisional,
    )
    return Ticket(
        request,
        received_at=now,
        deadline_at=now + left_ms / 1e3,
        send=door.sender(address, request),
        settle=_nothing,
        address=address,
        key=row.key or None,
        ident=row.id,
    )


def _nothing() -> None:
    """Its message was acknowledged before the restart."""
