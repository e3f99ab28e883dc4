"""A request on its way through the box, and who else waits for the same answer."""

from __future__ import annotations

import asyncio
import collections
import hashlib
import os
from collections.abc import Awaitable, Callable

import msgspec

from models.request import Request, Response

MAX_KEPT_BYTES = 8 << 20
CROWDED = 0.9
"""The share of its bound from which on a box keeps room for the models that hold few requests."""
GREEDY = 1.25
"""Times its even share of the bound that a model may hold then."""


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """Where an MQTT asker wants its answer; enough to send it after a restart."""

    topic: str
    correlation: bytes | None = None
    qos: int = 0
    envelope_id: str | None = None
    enveloped: bool = False


class Ticket:
    """One accepted request: what was asked, until when (`deadline_at`, loop seconds), and how to answer."""

    def __init__(
        self,
        request: Request,
        *,
        received_at: float,
        deadline_at: float,
        send: Callable[[Response], Awaitable[None]],
        settle: Callable[[], None],
        address: Address | None = None,
        key: bytes | None = None,
        ident: str = "",
    ) -> None:
        self.id = ident or os.urandom(16).hex()
        self.request = request
        self.received_at = received_at
        self.deadline_at = deadline_at
        self.send = send
        self.address = address
        self.key = key
        self.route = ""
        self.reason = ""
        self.stored = False
        self.handed_off = False
        self.begun = False
        self.cancelled = False
        self.decided = False
        """Whether its final reply is fixed: nothing can change it any more."""
        self.sequence = 0
        self.task: asyncio.Task[None] | None = None
        self.keeping: asyncio.Task[None] | None = None
        """The writing of this request to the outbox, once it has begun."""
        self.settled = False
        """Whether the messages that brought it may be acknowledged."""
        self._settles = [settle]

    def settle(self) -> None:
        """Tell everyone who brought this request that it is in safe hands or answered; more than once is harmless."""
        self.settled = True
        settles, self._settles = self._settles, []
        for settle in settles:
            settle()

    def join(self, settle: Callable[[], None]) -> None:
        """Let another copy of the same request share this one's answer."""
        if self.settled:
            settle()
        else:
            self._settles.append(settle)


def digest_of(body: bytes) -> bytes:
    """Return what stands for a body where it is compared or remembered."""
    return hashlib.sha256(body).digest()


def request_key(topic: str, correlation: bytes | None, model: str, digest: bytes) -> bytes | None:
    """Return what makes two requests the same (PROTOCOL 1, "asking again"); None without correlation.

    `digest` is the body's.
    """
    if correlation is None:
        return None
    asked = topic.encode()
    parts = (len(asked).to_bytes(2, "big"), asked, len(correlation).to_bytes(2, "big"), correlation, digest)
    return hashlib.sha256(b"".join((*parts, model.encode()))).digest()


class Recent:
    """The last final answers by request key, bounded in number and bytes; the oldest leave first."""

    def __init__(self, max_answers: int, max_bytes: int = MAX_KEPT_BYTES) -> None:
        self._answers: collections.OrderedDict[bytes, Response] = collections.OrderedDict()
        self._max_answers = max_answers
        self._max_bytes = max_bytes
        self._bytes = 0

    def put(self, key: bytes, response: Response) -> None:
        """Keep an answer, and let go of the oldest beyond the bounds."""
        previous = self._answers.pop(key, None)
        self._bytes += len(response.body) - (len(previous.body) if previous else 0)
        self._answers[key] = response
        while len(self._answers) > self._max_answers or self._bytes > self._max_bytes:
            _, oldest = self._answers.popitem(last=False)
            self._bytes -= len(oldest.body)

    def get(self, key: bytes) -> Response | None:
        """Return the answer to this key, if it is still kept."""
        return self._answers.get(key)


class Intake:
    """Everything in flight: bounds of number and bytes, and one ticket for each key."""

    def __init__(self, max_requests: int, max_answers: int, max_bytes: int = 64 << 20) -> None:
        self.max_requests = max_requests
        self.max_bytes = max_bytes
        self._bytes = 0
        self.recent = Recent(max_answers)
        self.tickets: set[Ticket] = set()
        self._in_room: set[Ticket] = set()
        """Those that take room: not the ones whose answer was there when they came, a refusal above all."""
        self._held: collections.Counter[str] = collections.Counter()
        self._by_key: dict[bytes, Ticket] = {}

    @property
    def full(self) -> bool:
        """Whether the box holds as many requests as it may."""
        return len(self._in_room) >= self.max_requests or self._bytes >= self.max_bytes

    def refusal(self, model: str, models: int) -> str:
        """Return why a request to one of so many models is not taken in, or nothing: the last room is for all alike."""
        if self.full:
            return f"the box holds {self.max_requests} requests already"
        nearly_full = models > 1 and len(self._in_room) >= self.max_requests * CROWDED
        if nearly_full and self._held[model] >= GREEDY * self.max_requests / models:
            return "the box is nearly full, and this model holds more than its share of it"
        return ""

    def in_flight(self, key: bytes | None) -> Ticket | None:
        """Return the ticket that this key's request has already."""
        return self._by_key.get(key) if key is not None else None

    def add(self, ticket: Ticket, *, answered: bool = False) -> None:
        """Take a ticket in; one whose answer is there already takes no room, so that refusals crowd nobody out."""
        self.tickets.add(ticket)
        if not answered and ticket not in self._in_room:
            self._in_room.add(ticket)
            self._held[ticket.request.model] += 1
            self._bytes += len(ticket.request.body)
        if ticket.key is not None:
            self._by_key[ticket.key] = ticket

    def remove(self, ticket: Ticket, response: Response | None) -> None:
        """Let a ticket go; its final answer is kept for those who ask again."""
        self.tickets.discard(ticket)
        if ticket in self._in_room:
            self._in_room.discard(ticket)
            self._held[ticket.request.model] -= 1
            if not self._held[ticket.request.model]:
                del self._held[ticket.request.model]  # askers may invent names
            self._bytes -= len(ticket.request.body)
        if ticket.key is None:
            return
        if self._by_key.get(ticket.key) is ticket:
            del self._by_key[ticket.key]
        if response is not None:
            self.recent.put(ticket.key, response)
