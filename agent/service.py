"""The path of one request: count, place, answer, deliver. Every request ends in one final reply."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable
from typing import Protocol

from agent.config import Config, ModelPolicy
from agent.intake import Intake, Ticket
from agent.routing import Cloud, Cost, Load, Route, Where, route
from agent.scheduler import ModelQueue
from agent.telemetry import Telemetry
from agent.workers import WorkerEndedError
from cloud_sync.errors import HandoffError, StoreError
from cloud_sync.exchange import Reply
from cloud_sync.outbox import Outbox, Row
from models.answer import render_error
from models.channel import Piece
from models.errors import RequestError
from models.request import Dialect, Request, Response, Status

log = logging.getLogger(__name__)

JSON_ESCAPE_BYTES = 6
"""The most bytes that JSON spends on one byte of text (`\\u00XX`)."""


class CloudDoor(Protocol):
    """What the service asks of the hand-off."""

    @property
    def connected(self) -> bool:
        """Whether the cloud link is up."""

    def send(self, ident: str, request: Request, pool: str, deadline_at: float) -> AsyncGenerator[Reply, None]:
        """Hand a request off and yield its replies."""


class Service:
    """Answers requests. `clock` gives the loop's seconds."""

    def __init__(
        self,
        config: Config,
        *,
        outbox: Outbox,
        cloud: CloudDoor | None,
        telemetry: Telemetry,
        clock: Callable[[], float],
    ) -> None:
        self.intake = Intake(config.limits.max_requests, config.limits.answers, config.limits.max_request_bytes)
        self.queues: dict[str, ModelQueue] = {}
        self.telemetry = telemetry
        self._draining = False
        self._config = config
        self._outbox = outbox
        self._cloud = cloud
        self._clock = clock

    def policy(self, model: str) -> ModelPolicy:
        """Return how requests to this model are treated."""
        return self._config.models.get(model) or ModelPolicy()

    def accept(self, ticket: Ticket) -> None:
        """Begin to answer a request; a copy of one in flight joins it, one answered before is answered alike."""
        twin = self.intake.in_flight(ticket.key)
        if twin is not None:
            if ticket.stored and not twin.stored:  # a row from before a restart, and its asker was quicker
                twin.id, twin.stored = ticket.id, True
            twin.join(ticket.settle)
            return
        again = self.intake.recent.get(ticket.key) if ticket.key is not None else None
        refusal = "the box is stopping" if self._draining else ""
        if again is None and (refusal := refusal or self.intake.refusal(ticket.request.model, len(self.queues))):
            again = self._error(ticket, "overloaded", refusal)
        if again is not None:
            self.repeat(ticket, again)
            return
        self.intake.add(ticket)
        ticket.task = asyncio.get_running_loop().create_task(self._answer(ticket), name=f"request {ticket.id}")

    def repeat(self, ticket: Ticket, response: Response) -> None:
        """Deliver an answer that is there already: an error at the door, or one from before a restart."""
        self.intake.add(ticket, answered=True)
        ticket.task = asyncio.get_running_loop().create_task(self._repeat(ticket, response), name="refusal")

    def cancel(self, ticket: Ticket) -> None:
        """Take a question back for its asker; the answer is the error `cancelled`."""
        if ticket.task is not None and not ticket.decided and not ticket.cancelled:
            ticket.cancelled = True
            if ticket.begun:  # a task that has not run yet would end without a word
                ticket.task.cancel()

    async def drain(self, timeout_s: float) -> None:
        """Finish what was accepted; what is left after `timeout_s` stays in the outbox or gets its error."""
        self._draining = True
        tasks = [ticket.task for ticket in self.intake.tickets if ticket.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=timeout_s)
        left = [ticket for ticket in self.intake.tickets if ticket.task is not None and not ticket.task.done()]
        for ticket in left:
            if ticket.task is not None:
                ticket.task.cancel()
        await asyncio.gather(*(ticket.task for ticket in left if ticket.task), return_exceptions=True)

    async def _answer(self, ticket: Ticket) -> None:
        """Produce the one final reply, whatever happens, and deliver it."""
        keep = asyncio.get_running_loop().call_later(
            self._config.limits.store_after_ms / 1e3, lambda: self._keep_soon(ticket, "local")
        )
        response: Response | None = None
        ticket.begun = True
        try:
            response = self._cancelled(ticket) if ticket.cancelled else await self._final(ticket)
            keep.cancel()
            await self._deliver(ticket, response)
        finally:
            keep.cancel()
            self.intake.remove(ticket, response)

    async def _final(self, ticket: Ticket) -> Response:
        try:
            async with asyncio.timeout_at(ticket.deadline_at):
                return await self._place(ticket)
        except TimeoutError:
            return self._error(ticket, *self._why_late(ticket))
        except RequestError as error:
            return self._error(ticket, error.code, error.message)
        except asyncio.CancelledError:
            if ticket.cancelled:
                return self._cancelled(ticket)
            if ticket.stored or (ticket.address is not None and ticket.address.qos):
                raise  # it is in the outbox or unacknowledged at the broker: the next start answers it
            return self._error(ticket, "overloaded", "the box is stopping")
        except Exception:  # a mistake of ours with one request must neither end the daemon nor leave an asker waiting
            log.exception("request %s to %s failed", ticket.id, ticket.request.model)
            return self._error(ticket, "internal", "the box made a mistake; its log says more")

    async def _place(self, ticket: Ticket) -> Response:
        if self._clock() >= ticket.deadline_at:
            raise RequestError("deadline_exceeded", "the deadline passed before the request could begin")
        if ticket.handed_off:  # before a restart: the cloud may have the answer already
            ticket.route = Where.CLOUD.value
            return await self._from_cloud(ticket)
        cost, tokens_in, tokens_out = await self._cost(ticket)
        decision = self._route(ticket, cost, tokens_in, tokens_out)
        for attempt in (1, 2):
            ticket.route, ticket.reason = decision.where.value, decision.reason
            if decision.where is Where.REFUSE:
                raise RequestError(decision.code, decision.message)
            if decision.where is Where.CLOUD:
                return await self._from_cloud(ticket)
            try:
                return await self._from_box(ticket, tokens_in, tokens_out, alone=attempt == 2)
            except WorkerEndedError as error:
                if attempt == 2 or ticket.sequence:
                    raise RequestError("model_failed", f"the model's worker ended: {error}") from error
                decision = self._route(ticket, cost, tokens_in, tokens_out)
        raise AssertionError("unreachable: the second attempt returns or raises")

    async def _cost(self, ticket: Ticket) -> tuple[Cost, int, int]:
        """Return the request's cost; asks the model's tokenizer only where the length has not decided already."""
        request = ticket.request
        policy = self.policy(request.model)
        local_only = request.local_only or policy.local_only
        queue = self.queues.get(request.model)
        tokens_in = tokens_out = 0
        if queue is not None and queue.worker is not None and queue.worker.ready.result().context_tokens:
            ready = queue.worker.ready.result()
            least = len(request.body) // (JSON_ESCAPE_BYTES * max(1, ready.longest_token_bytes))
            if ready.longest_token_bytes and least > ready.context_tokens and len(request.body) > 1 << 20:
                tokens_in = least
            else:
                with contextlib.suppress(WorkerEndedError):
                    counted = await queue.worker.count(request)
                    tokens_in, tokens_out = counted.tokens_in, counted.max_tokens
        deadline_ms = (ticket.deadline_at - self._clock()) * 1e3
        cost = Cost(tokens=tokens_in + tokens_out, deadline_ms=deadline_ms, local_only=local_only)
        return cost, tokens_in, tokens_out

    def _route(self, ticket: Ticket, cost: Cost, tokens_in: int, tokens_out: int) -> Route:
        model = ticket.request.model
        policy = self.policy(model)
        connected = self._cloud is not None and self._cloud.connected
        cloud = Cloud(pool=policy.pool if self._cloud is not None else "", connected=connected)
        return route(cost, self._load(model, policy, tokens_in, tokens_out), cloud)

    def _load(self, model: str, policy: ModelPolicy, tokens_in: int, tokens_out: int) -> Load:
        queue = self.queues.get(model)
        if queue is None:
            return Load(known=False, serving=False)
        worker = queue.worker
        if worker is None:
            queue.want()
        return Load(
            known=True,
            serving=worker is not None,
            starting=queue.expecting,
            context_tokens=worker.ready.result().context_tokens if worker is not None else 0,
            queued=queue.queued + queue.in_service,
            max_queue=policy.max_queue,
            wait_ms=queue.wait_ms(),
            service_ms=queue.law.predict_ms(tokens_in, tokens_out) if queue.law.observed else 0.0,
            error_ms=queue.law.error_ms,
            why_not=queue.why_not,
        )

    async def _from_box(self, ticket: Ticket, tokens_in: int, tokens_out: int, *, alone: bool) -> Response:
        queue = self.queues[ticket.request.model]
        predicted_ms = queue.law.predict_ms(tokens_in, tokens_out)
        answer = queue.answer(ticket.request, ticket.deadline_at, predicted_ms, alone=alone)
        async with contextlib.aclosing(answer):
            async for piece, label in answer:
                response = self._response(ticket, piece, label)
                if piece.final:
                    return response
                await ticket.send(response)
                ticket.sequence += 1
        raise RequestError("internal", "the answer ended without its final piece")

    async def _from_cloud(self, ticket: Ticket) -> Response:
        if self._cloud is None:
            raise RequestError("cloud_unavailable", "this box has no cloud link")
        self._keep_soon(ticket, "cloud")
        pool = self.policy(ticket.request.model).pool
        try:
            replies = self._cloud.send(ticket.id, ticket.request, pool, ticket.deadline_at)
            async with contextlib.aclosing(replies):
                async for reply in replies:
                    response = self._reply(ticket, reply)
                    if reply.final:
                        return response
                    await ticket.send(response)
                    ticket.sequence += 1
        except HandoffError as error:
            if error.code == "deadline_exceeded":
                raise TimeoutError from error
            code = error.code if error.code in ("too_large", "cloud_unavailable") else "cloud_unavailable"
            raise RequestError(code, error.message) from error
        raise RequestError("cloud_unavailable", "the cloud's answer ended early")

    def _response(self, ticket: Ticket, piece: Piece, label: str) -> Response:
        _require_object(ticket.request, piece.body)
        total_ms = (self._clock() - ticket.received_at) * 1e3
        return Response(
            status=Status.OK if piece.final else Status.PARTIAL,
            body=piece.body,
            content_type=piece.content_type,
            sequence=ticket.sequence,
            final=piece.final,
            route=ticket.route,
            reason=ticket.reason,
            model=label,
            queued_ms=max(0.0, total_ms - piece.compute_ms),
            compute_ms=piece.compute_ms,
            total_ms=total_ms,
            tokens_in=piece.tokens_in,
            tokens_out=piece.tokens_out,
        )

    def _reply(self, ticket: Ticket, reply: Reply) -> Response:
        _require_object(ticket.request, reply.body)
        total_ms = (self._clock() - ticket.received_at) * 1e3
        return Response(
            status=Status(reply.status),
            body=reply.body,
            content_type=reply.content_type,
            sequence=ticket.sequence,
            final=reply.final,
            code=reply.code,
            route=ticket.route,
            reason=ticket.reason,
            model=reply.model or ticket.request.model,
            queued_ms=max(0.0, total_ms - reply.compute_ms),
            compute_ms=reply.compute_ms,
            total_ms=total_ms,
            tokens_in=reply.tokens_in,
            tokens_out=reply.tokens_out,
        )

    def _error(self, ticket: Ticket, code: str, message: str) -> Response:
        return Response(
            status=Status.ERROR,
            body=render_error(ticket.request.dialect, code, message),
            sequence=ticket.sequence,
            code=code,
            route="" if ticket.route == Where.REFUSE else ticket.route,
            reason=ticket.reason,
            model=ticket.request.model,
            total_ms=(self._clock() - ticket.received_at) * 1e3,
        )

    def _cancelled(self, ticket: Ticket) -> Response:
        return self._error(ticket, "cancelled", "cancelled by the asker")

    def _why_late(self, ticket: Ticket) -> tuple[str, str]:
        waited = f"{(ticket.deadline_at - ticket.received_at) * 1e3:.0f} ms"
        if ticket.route == Where.CLOUD and self._cloud is not None and not self._cloud.connected:
            return "cloud_unavailable", f"only the cloud could answer, and it was out of reach for {waited}"
        return "deadline_exceeded", f"no answer within {waited}"

    def _keep_soon(self, ticket: Ticket, place: str) -> None:
        """Store a request off the path of its answer; once it is stored, its asker's broker may forget it."""
        if ticket.address is None or ticket.stored or ticket.keeping is not None:
            return
        row = _row(ticket, place, self.policy(ticket.request.model).pool, self._clock())
        ticket.keeping = asyncio.get_running_loop().create_task(self._keep(ticket, row), name=f"keep {ticket.id}")

    async def _keep(self, ticket: Ticket, row: Row) -> None:
        try:
            ticket.id = await self._outbox.put(row)  # another's where a row from before a restart has this key
        except (HandoffError, StoreError) as error:
            log.warning("request %s is not stored: %s", ticket.id, error)
            return
        ticket.stored = True
        ticket.settle()

    async def _deliver(self, ticket: Ticket, response: Response) -> None:
        """Send the final reply; where the request is stored the reply is too, first: no restart gives another."""
        ticket.decided = True
        if ticket.keeping is not None:
            await ticket.keeping
        try:
            if ticket.stored:
                response = await self._fixed(ticket, response)
            await ticket.send(response)
            if ticket.stored:
                await self._outbox.finish(ticket.id)
        except StoreError as error:
            log.warning("the row of %s could not be deleted: %s", ticket.id, error)
        except ConnectionError as error:  # where it is stored, the next start sends it again
            log.warning("the answer to %s was not delivered: %s", ticket.id, error)
        except Exception:  # a reply that trips over a mistake of ours must not hold up the acknowledgements behind it
            log.exception("the answer to %s could not be sent", ticket.id)
        ticket.settle()
        model = ticket.request.model
        self.telemetry.answered(response, model if model in self.queues or model in self._config.models else "")

    async def _fixed(self, ticket: Ticket, response: Response) -> Response:
        """Store the final reply and return it, or the one that was stored before: there is never a second one."""
        try:
            if await self._outbox.settle(ticket.id, response):
                return response
            row = await self._outbox.row(ticket.id)
        except StoreError as error:
            log.warning("the answer to %s is not stored: %s", ticket.id, error)
            return response
        return row.answer if row is not None and row.answer is not None else response

    async def _repeat(self, ticket: Ticket, response: Response) -> None:
        """Deliver an answer that needs no work: one given before, or a refusal at the door."""
        try:
            await self._deliver(ticket, response)
        finally:
            self.intake.remove(ticket, None if response.code == "overloaded" else response)


def _require_object(request: Request, body: bytes) -> None:
    """Refuse an answer that is not in its dialect, in which doors could not say the facts; raises RequestError."""
    if request.dialect is Dialect.HUGGINGFACE and not (body[:1] == b"{" and body[-1:] == b"}"):
        raise RequestError("model_failed", "the model's answer is no JSON object")


def _row(ticket: Ticket, place: str, pool: str, now: float) -> Row:
    """Return what a restart needs to answer this request; deadlines are wall-clock milliseconds there."""
    address, request = ticket.address, ticket.request
    if address is None:
        raise ValueError("a request without an address cannot be kept")
    wall_ms = int(time.time() * 1e3)
    return Row(
        id=ticket.id,
        place=place,
        model=request.model,
        pool=pool,
        client=request.client,
        content_type=request.content_type,
        dialect=request.dialect,
        body=request.body,
        stream=request.stream,
        local_only=request.local_only,
        priority=request.priority,
        reply_topic=address.topic,
        correlation=address.correlation,
        qos=address.qos,
        envelope_id=address.envelope_id,
        enveloped=address.enveloped,
        key=ticket.key or b"",
        provisional=request.provisional,
        reason=ticket.reason,
        stored_at_ms=wall_ms,
        deadline_at_ms=wall_ms + int((ticket.deadline_at - now) * 1e3),
    )
