"""Sealing and opening of hand-offs and their replies, so that only box and gateway read them (PROTOCOL 5).

A request is sealed with HPKE (RFC 9180) for a pool's key and signed by the box; a reply with ChaCha20-Poly1305
(RFC 8439) under the secret that its request carried.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from cloud_sync.errors import HandoffError
from cloud_sync.wire import (
    REQUEST_INFO,
    HandoffHeader,
    HandoffMessage,
    ReplyHeader,
    ReplyMessage,
    pack_handoff_head,
    pack_reply_head,
)

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

SECRET_BYTES: Final = 32
MAX_BODY_BYTES: Final = 8 << 20
"""The most bytes of a body after decompression, in either direction."""
MAX_WINDOW_LOG: Final = 23
FLAG_ZSTD: Final = 1
FLAG_REFERENCE: Final = 2
WORTH_COMPRESSING: Final = 256

_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)
_LENGTH = struct.Struct(">H")
_NONCE = struct.Struct(">4xQ")
_BOUNDS: Final[dict[int, int]] = {zstd.DecompressionParameter.window_log_max: MAX_WINDOW_LOG}


class Packed(msgspec.Struct, frozen=True):
    """A body as it is stored in a message: compressed where that is smaller."""

    flags: int
    stored: bytes


class Opened(msgspec.Struct, frozen=True):
    """What a hand-off holds. Nothing of it is proven until `certificate` and `signature` are checked.

    `signed` are the bytes that the signature is over; `body` is the body as it was sealed, see `unpack_body`.
    """

    secret: bytes
    certificate: bytes
    signature: bytes
    signed: bytes
    body: Packed


class Content(msgspec.Struct, frozen=True, kw_only=True):
    """One reply message, opened. An error has `code`, one of PROTOCOL 3, and its message in UTF-8 as `body`."""

    body: bytes
    content_type: str = "application/json"
    model: str = ""
    code: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    compute_ms: float = 0.0


class _KeyFile(msgspec.Struct):
    """The private half of a pool's key, raw in hex."""

    kid: str
    private: str


class _Facts(msgspec.Struct, omit_defaults=True):
    """The part of a reply that goes before its body, as JSON."""

    content_type: str = ""
    model: str = ""
    code: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    compute_ms: float = 0.0


_facts = msgspec.json.Decoder(_Facts)


def load_pool_key(path: Path) -> tuple[str, X25519PrivateKey]:
    """Read a gateway's key file, as `spillway-fleet pool-key` writes it; raises HandoffError `no_key`."""
    try:
        file = msgspec.json.decode(path.read_bytes(), type=_KeyFile)
        return file.kid, X25519PrivateKey.from_private_bytes(bytes.fromhex(file.private))
    except (OSError, ValueError, msgspec.DecodeError) as error:
        raise HandoffError("no_key", f"{path}: is not a pool's key file: {error}") from error


def seal_request(
    header: HandoffHeader,
    body: Packed,
    *,
    public_key: bytes,
    secret: bytes,
    certificate: bytes,
    sign: Callable[[bytes], bytes],
) -> bytes:
    """Return the message that hands `body` to a pool; `secret` must be new, `certificate` is DER."""
    head = pack_handoff_head(header)
    info = REQUEST_INFO + head
    signature = sign(_to_sign(info, body.stored))
    plaintext = b"".join(
        (
            secret,
            _LENGTH.pack(len(certificate)),
            certificate,
            _LENGTH.pack(len(signature)),
            signature,
            bytes((body.flags,)),
            body.stored,
        )
    )
    try:
        recipient = X25519PublicKey.from_public_bytes(public_key)
        return head + _SUITE.encrypt(plaintext, recipient, info)
    except ValueError as error:
        raise HandoffError("no_key", f"the pool's key {header.kid!r} cannot be sealed for: {error}") from error


def open_request(message: HandoffMessage, private_key: X25519PrivateKey) -> Opened:
    """Open a hand-off; raises HandoffError `does_not_open` or `bad_plaintext`."""
    info = REQUEST_INFO + message.head
    try:
        plaintext = _SUITE.decrypt(message.sealed, private_key, info)
    except (InvalidTag, ValueError) as error:
        raise HandoffError("does_not_open", "header or sealed part were changed, or sealed for another key") from error
    secret, rest = plaintext[:SECRET_BYTES], plaintext[SECRET_BYTES:]
    certificate, rest = _take(rest)
    signature, rest = _take(rest)
    if not rest:
        raise HandoffError("bad_plaintext", "ends before the flags")
    body = Packed(rest[0], rest[1:])
    return Opened(secret, certificate, signature, _to_sign(info, body.stored), body)


def pack_body(body: bytes) -> Packed:
    """Return a body as it is stored: compressed where that is smaller."""
    if len(body) >= WORTH_COMPRESSING:
        stored = zstd.compress(body, 3)
        if len(stored) < len(body):
            return Packed(FLAG_ZSTD, stored)
    return Packed(0, body)


def unpack_body(packed: Packed) -> bytes:
    """Return the body again; raises HandoffError `bad_plaintext` or `too_large`."""
    if packed.flags & FLAG_REFERENCE:
        raise HandoffError("too_large", "bodies by reference are not taken here")
    if packed.flags & ~FLAG_ZSTD:
        raise HandoffError("bad_plaintext", f"`flags` = {packed.flags}: unknown")
    if not packed.flags:
        return packed.stored
    decompressor = zstd.ZstdDecompressor(options=_BOUNDS)
    try:
        body = decompressor.decompress(packed.stored, MAX_BODY_BYTES)
    except zstd.ZstdError as error:
        raise HandoffError("bad_plaintext", f"zstd: {error}") from error
    if not decompressor.eof:
        raise HandoffError("too_large", f"a body is cut off, or over the limit of {MAX_BODY_BYTES} bytes")
    if decompressor.unused_data:
        raise HandoffError("bad_plaintext", "zstd: more than one frame")
    return body


def seal_reply(header: ReplyHeader, content: Content, secret: bytes) -> bytes:
    """Return one reply message. A sequence must never be sealed twice under a secret with different content."""
    head = pack_reply_head(header)
    body = pack_body(content.body)
    facts = msgspec.json.encode(
        _Facts(
            content_type=content.content_type,
            model=content.model,
            code=content.code,
            tokens_in=content.tokens_in,
            tokens_out=content.tokens_out,
            compute_ms=round(content.compute_ms, 3),
        )
    )
    plaintext = b"".join((bytes((body.flags,)), _LENGTH.pack(len(facts)), facts, body.stored))
    return head + ChaCha20Poly1305(secret).encrypt(_NONCE.pack(header.sequence), plaintext, head)


def open_reply(message: ReplyMessage, secret: bytes) -> Content:
    """Open one reply message; raises HandoffError `does_not_open`, `bad_plaintext` or `too_large`."""
    nonce = _NONCE.pack(message.header.sequence)
    try:
        plaintext = ChaCha20Poly1305(secret).decrypt(nonce, message.sealed, message.head)
    except InvalidTag as error:
        raise HandoffError("does_not_open", "was not sealed with this request's secret") from error
    if not plaintext:
        raise HandoffError("bad_plaintext", "ends before the flags")
    raw, stored = _take(plaintext[1:])
    try:
        facts = _facts.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HandoffError("bad_plaintext", f"facts: {error}") from error
    return Content(body=unpack_body(Packed(plaintext[0], stored)), **msgspec.structs.asdict(facts))


def _to_sign(info: bytes, stored: bytes) -> bytes:
    return info + hashlib.sha256(stored).digest()


def _take(data: bytes) -> tuple[bytes, bytes]:
    """Return the part whose length (u16) stands first, and the rest."""
    if len(data) < 2:
        raise HandoffError("bad_plaintext", "ends before a length")
    end = 2 + _LENGTH.unpack_from(data)[0]
    if end > len(data):
        raise HandoffError("bad_plaintext", "a length points past the end")
    return data[2:end], data[end:]
