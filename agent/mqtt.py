"""The MQTT door: topics and properties become tickets, responses become messages (PROTOCOL 0 to 3)."""

from __future__ import annotations

import asyncio
import collections
import logging
from collections.abc import Awaitable, Callable

import msgspec

from agent.config import Config
from agent.intake import Address, Ticket, digest_of, request_key
from agent.service import Service
from cloud_sync.link import Link
from cloud_sync.messages import Details, Message
from cloud_sync.wire import Asked, Topics
from models.answer import render_error, with_facts
from models.body import HEADER_BYTES, OCTETS, Body, Envelope, outer_octets, parse_body
from models.errors import RequestError
from models.request import Dialect, Request, Response, Status

log = logging.getLogger(__name__)

BROUGHT_HEADROOM = 64
COMPLAIN_EVERY_S = 10.0
MAX_LOGGED = 200
MAX_CORRELATION_BYTES = 256
MAX_DEADLINE_MS = 7 * 86_400_000
PROPERTIES = frozenset({"deadline-ms", "priority", "privacy", "stream", "provisional"})


_Print = tuple[str, bytes]
"""What tells one message of a packet identifier from the next: its topic and its body's digest."""


class Wishes(msgspec.Struct, frozen=True, kw_only=True):
    """What an asker's user properties say; None where they say nothing."""

    deadline_ms: int | None = None
    priority: int = 5
    local_only: bool = False
    stream: bool = False
    provisional: bool = False


def parse_wishes(user: tuple[tuple[str, str], ...]) -> Wishes:
    """Read the user properties of a request; raises RequestError `bad_request` naming the property."""
    said: dict[str, str] = {}
    for name, value in user:
        if name in PROPERTIES and name in said:
            raise RequestError("bad_request", f"user property `{name}` is there twice")
        said[name] = value
    return Wishes(
        deadline_ms=_number(said, "deadline-ms", 1, MAX_DEADLINE_MS),
        priority=_number(said, "priority", 0, 9) if "priority" in said else 5,  # type: ignore[arg-type]
        local_only=_word(said, "privacy", ("any", "local-only")) == "local-only",
        stream=_word(said, "stream", ("false", "true")) == "true",
        provisional=_word(said, "provisional", ("false", "true")) == "true",
    )


def _number(said: dict[str, str], name: str, least: int, most: int) -> int | None:
    text = said.get(name)
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 12 or not least <= int(text) <= most:
        raise RequestError(
            "bad_request", f"user property `{name}` is {text[:40]!r}; a number from {least} to {most} is right"
        )
    return int(text)


def _word(said: dict[str, str], name: str, words: tuple[str, ...]) -> str:
    text = said.get(name, words[0])
    if text not in words:
        raise RequestError("bad_request", f"user property `{name}` is {text[:40]!r}; right is {' or '.join(words)}")
    return text


class MqttDoor:
    """Takes requests from the local link and gives the answers back on it."""

    def __init__(self, config: Config, service: Service, clock: Callable[[], float]) -> None:
        self.topics = Topics(config.device.prefix, config.device.name)
        self.link: Link | None = None
        self.draining = False
        self._config = config
        self._service = service
        self._clock = clock
        self._brought: collections.OrderedDict[int, tuple[_Print, Ticket | None]] = collections.OrderedDict()
        """What each packet identifier brought last: a redelivery is known by it, also after its answer."""
        self._complained_at = float("-inf")
        self._named: dict[tuple[str, str, bytes], Ticket] = {}

    def attach(self, link: Link) -> None:
        """Subscribe to this box's requests on its local link."""
        self.link = link
        for topic in (*self.topics.infer_filters, *self.topics.cancel_filters):
            link.subscribe(topic, 1)

    def receive(self, message: Message) -> None:
        """Take one message of the local link."""
        if message.retain:
            self._acknowledge(message)  # a request is never retained: it would be asked again at each connection
            return
        asked = self.topics.parse_infer(message.topic)
        if asked is not None:
            if not self.draining or not message.qos:  # else it stays with the broker, for the next start
                self._infer(asked, message)
            return
        asked = self.topics.parse_cancel(message.topic)
        if asked is not None:
            self._cancel(asked, message)
        else:
            log.info("dropped a message on %s: it names no model", message.topic[:MAX_LOGGED])
        self._acknowledge(message)

    def _infer(self, asked: Asked, message: Message) -> None:
        print_of = (message.topic, digest_of(message.payload))
        known = self._brought.get(message.mid) if message.duplicate else None
        if known is not None and known[0] == print_of:
            if known[1] is None:
                self._acknowledge(message)
            else:
                known[1].join(lambda: self._acknowledge(message))
            return
        address = self._address(asked, message)
        body: Body | None = None
        try:
            self._check_asked(asked, message)
            body = self._body(message)
            if body.envelope is not None:
                address = self._enveloped(asked, body.envelope, address)
                self._check_reply(body.envelope.reply_to, asked)
            digest = print_of[1] if body.envelope is None else digest_of(body.body)
            ticket = self._ticket(asked, message, body, address, digest)
        except RequestError as error:
            self._refuse(asked, message, address, body.dialect if body else Dialect.HUGGINGFACE, error)
            return
        self._service.accept(ticket)
        if message.qos:
            self._bring(message.mid, print_of, ticket)
        self._remember(asked, ticket)

    def _body(self, message: Message) -> Body:
        limit = self._config.limits.max_body_bytes
        if len(message.payload) > limit:
            raise RequestError("too_large", f"the body has {len(message.payload)} bytes and this box takes {limit}")
        json_bytes = dict(message.details.user).get(HEADER_BYTES)
        return parse_body(message.details.content_type, message.payload, json_bytes)

    def _address(self, asked: Asked, message: Message) -> Address:
        """Return where an answer, or the error about a forbidden address, may go."""
        details = message.details
        named = details.response_topic is not None and self._may_reply(details.response_topic, asked)
        fits = details.correlation is not None and len(details.correlation) <= MAX_CORRELATION_BYTES
        return Address(
            topic=details.response_topic if named and details.response_topic else self._own_topic(asked),
            correlation=details.correlation if fits else None,
            qos=message.qos,
        )

    def _enveloped(self, asked: Asked, envelope: Envelope, address: Address) -> Address:
        """Return the address with what a MQTT 3.1.1 asker put into its body, as far as it may."""
        topic = envelope.reply_to if envelope.reply_to and self._may_reply(envelope.reply_to, asked) else address.topic
        return msgspec.structs.replace(address, enveloped=True, envelope_id=envelope.id, topic=topic)

    def _check_asked(self, asked: Asked, message: Message) -> None:
        """Refuse an asker or an address that this box does not serve; raises RequestError."""
        if asked.client == "any" and not self._config.allow_any:
            raise RequestError("forbidden", "this box answers named clients only: ask on .../infer/{model}/{client}")
        self._check_reply(message.details.response_topic, asked)
        if len(message.details.correlation or b"") > MAX_CORRELATION_BYTES:
            raise RequestError("bad_request", f"Correlation Data has more than {MAX_CORRELATION_BYTES} bytes")

    def _check_reply(self, topic: str | None, asked: Asked) -> None:
        if topic is not None and not self._may_reply(topic, asked):
            right = self._own_topic(asked)
            raise RequestError("forbidden", f"answers cannot go to that reply topic; {right} would be right")

    def _may_reply(self, topic: str, asked: Asked) -> bool:
        return self.topics.reply_allowed(topic, asked.client, tuple(self._config.reply_prefixes))

    def _own_topic(self, asked: Asked) -> str:
        return self.topics.reply(asked.client, asked.model)

    def _ticket(self, asked: Asked, message: Message, body: Body, address: Address, digest: bytes) -> Ticket:
        wishes, envelope = parse_wishes(message.details.user), body.envelope
        said_ms = envelope.deadline_ms if envelope and envelope.deadline_ms is not None else wishes.deadline_ms
        deadline_ms = min(said_ms or self._service.policy(asked.model).deadline_ms, MAX_DEADLINE_MS)
        if message.details.expiry_s is not None:
            deadline_ms = min(deadline_ms, message.details.expiry_s * 1000)
        request = Request(
            model=asked.model,
            content_type=body.content_type,
            body=body.body,
            dialect=body.dialect,
            client=asked.client,
            deadline_ms=deadline_ms,
            priority=envelope.priority if envelope and envelope.priority is not None else wishes.priority,
            local_only=wishes.local_only or (envelope is not None and envelope.privacy == "local-only"),
            stream=wishes.stream or bool(body.stream),
            provisional=wishes.provisional or bool(envelope and envelope.provisional),
        )
        ident = address.correlation or (envelope.id.encode() if envelope and envelope.id else None)
        now = self._clock()
        return Ticket(
            request,
            received_at=now,
            deadline_at=now + deadline_ms / 1e3,
            send=self.sender(address, request),
            settle=lambda: self._acknowledge(message),
            address=address,
            key=request_key(address.topic, ident, asked.model, digest),
        )

    def sender(self, address: Address, request: Request) -> Callable[[Response], Awaitable[None]]:
        """Return how to publish a response to this asker; the awaited value comes with the PUBACK."""

        async def send(response: Response) -> None:
            if self.link is None:
                raise ConnectionError("the local link is closed")
            body = response.body
            if address.enveloped or (request.dialect is Dialect.HUGGINGFACE and response.status is not Status.ERROR):
                body = with_facts(body, _facts(address, response))
            details = _details(address, request, response)
            if response.content_type == OCTETS:
                body, json_bytes = outer_octets(body)
                details = msgspec.structs.replace(details, user=(*details.user, (HEADER_BYTES, str(json_bytes))))
            qos, more = min(1, address.qos), not response.final
            done = self.link.publish(address.topic, body, qos=qos, details=details, expendable=more)
            if response.final:
                await done
            else:
                done.add_done_callback(_look)

        return send

    def _refuse(self, asked: Asked, message: Message, address: Address, dialect: Dialect, error: RequestError) -> None:
        """Answer what cannot become a ticket; the owner is told of one in ten seconds, since anyone may send many."""
        if self._clock() - self._complained_at >= COMPLAIN_EVERY_S:
            self._complained_at = self._clock()
            log.info("refused a request on %s: %s: %s", message.topic[:MAX_LOGGED], error.code, error.message)
        request = Request(model=asked.model, content_type="", body=b"", dialect=dialect, client=asked.client)
        body = render_error(dialect, error.code, error.message)
        response = Response(status=Status.ERROR, body=body, code=error.code, model=asked.model)
        now = self._clock()
        ticket = Ticket(
            request,
            received_at=now,
            deadline_at=now,
            send=self.sender(address, request),
            settle=lambda: self._acknowledge(message),
        )
        self._service.repeat(ticket, response)

    def _remember(self, asked: Asked, ticket: Ticket) -> None:
        """Keep what a cancel message names, while the ticket lives."""
        correlation = ticket.address.correlation if ticket.address else None
        if ticket.task is None or correlation is None:
            return
        name = (asked.model, asked.client, correlation)
        self._named[name] = ticket
        ticket.task.add_done_callback(lambda _: self._forget(name, ticket))

    def _forget(self, name: tuple[str, str, bytes], ticket: Ticket) -> None:
        if self._named.get(name) is ticket:
            del self._named[name]

    def _cancel(self, asked: Asked, message: Message) -> None:
        ticket = self._named.get((asked.model, asked.client, message.details.correlation or b""))
        if ticket is not None:
            self._service.cancel(ticket)

    def _bring(self, mid: int, print_of: _Print, ticket: Ticket) -> None:
        self._brought.pop(mid, None)
        if ticket.task is None:
            return  # it joined another, which its key finds again
        self._brought[mid] = (print_of, ticket)

        def answered(_: object) -> None:
            if self._brought.get(mid) == (print_of, ticket):
                self._brought[mid] = (print_of, None)  # its body need not stay

        ticket.task.add_done_callback(answered)
        while len(self._brought) > self._service.intake.max_requests + BROUGHT_HEADROOM:
            self._brought.popitem(last=False)

    def _acknowledge(self, message: Message) -> None:
        if message.qos and self.link is not None:
            self.link.acknowledge(message)


def _look(done: asyncio.Future[None]) -> None:
    """Fetch the outcome of a piece's publish, so that a lost link is told once, by the final reply."""
    if not done.cancelled() and done.exception() is not None:
        log.debug("a piece of a stream was not delivered: %s", done.exception())


def _facts(address: Address, response: Response) -> dict[str, object]:
    facts: dict[str, object] = {}
    if address.enveloped:
        facts |= {"id": address.envelope_id, "status": response.status, "final": response.final}
        facts |= {"sequence": response.sequence}
    facts |= {"route": response.route, "reason": response.reason, "model": response.model}
    facts |= {name: round(getattr(response, name), 3) for name in ("queued_ms", "compute_ms", "total_ms")}
    return facts


def _details(address: Address, request: Request, response: Response) -> Details:
    user = [("status", response.status.value), ("final", "true" if response.final else "false")]
    if request.stream:
        user.append(("sequence", str(response.sequence)))
    for name in ("route", "reason", "model"):
        value = getattr(response, name)
        if value:
            user.append((name, value))
    return Details(correlation=address.correlation, content_type=response.content_type, user=tuple(user))
