"""From a message to a question that is worth money: opened, its sender proven, its body read. Does no I/O."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import datetime

import msgspec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from cloud_sync.errors import HandoffError
from cloud_sync.gateway.authority import Authority
from cloud_sync.identity import verify_signature
from cloud_sync.sealing import Opened, open_request, unpack_body
from cloud_sync.wire import HandoffHeader, HandoffMessage, Topics, parse_handoff
from models.body import parse_body
from models.errors import RequestError
from models.request import Request


class Asker(msgspec.Struct, frozen=True, kw_only=True):
    """Whom a reply goes to, and the secret it is sealed with."""

    id: str
    device: str
    secret: bytes


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """A request from a box that has proven who it is. `digest` tells two requests under one id apart."""

    asker: Asker
    pool: str
    ttl_ms: int
    request: Request
    digest: bytes


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """A request that opens but is not answered; `code` is one of PROTOCOL 3."""

    asker: Asker
    code: str
    message: str


class Opener:
    """Opens hand-offs with the keys of its pools: pool to key id to key."""

    def __init__(
        self, topics: Topics, keys: Mapping[str, Mapping[str, X25519PrivateKey]], authority: Authority
    ) -> None:
        self._topics = topics
        self._keys = keys
        self._authority = authority

    def open(self, topic: str, payload: bytes, now: datetime) -> Question | Refusal:
        """Open a message; raises HandoffError where there is nobody who could be answered."""
        message = parse_handoff(payload)
        header = message.header
        if self._topics.parse_handoff(topic) != (header.pool, header.model):
            raise HandoffError("bad_header", "pool or model are not those of the topic")
        opened = open_request(message, self._key(header))
        asker = Asker(id=header.id, device=header.device, secret=opened.secret)
        try:
            self._prove(header, opened, now)
            return self._question(message, opened, asker)
        except HandoffError as error:
            code = "forbidden" if error.code in {"bad_certificate", "bad_signature"} else "bad_request"
            code = "too_large" if error.code == "too_large" else code
            return Refusal(asker=asker, code=code, message=_reason(error))
        except RequestError as error:
            return Refusal(asker=asker, code=error.code, message=error.message)

    def _key(self, header: HandoffHeader) -> X25519PrivateKey:
        key = self._keys.get(header.pool, {}).get(header.kid)
        if key is None:
            raise HandoffError("unknown_key", f"pool {header.pool} has no key {header.kid} here")
        return key

    def _prove(self, header: HandoffHeader, opened: Opened, now: datetime) -> None:
        public_key = self._authority.check(opened.certificate, header.device, now)
        verify_signature(public_key, opened.signature, opened.signed)

    def _question(self, message: HandoffMessage, opened: Opened, asker: Asker) -> Question:
        header = message.header
        body = parse_body(header.content_type, unpack_body(opened.body))
        request = Request(
            model=header.model,
            content_type=body.content_type,
            body=body.body,
            dialect=body.dialect,
            client=header.device,
            deadline_ms=header.ttl_ms,
            stream=header.stream,
        )
        digest = hashlib.sha256(b"\0".join((header.model.encode(), header.content_type.encode(), body.body))).digest()
        return Question(asker=asker, pool=header.pool, ttl_ms=header.ttl_ms, request=request, digest=digest)


def _reason(error: HandoffError) -> str:
    subject = {"bad_certificate": "the box's certificate ", "bad_signature": "the box's hand-off "}
    return f"{subject.get(error.code, '')}{error.message}"
