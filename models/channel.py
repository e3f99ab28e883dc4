"""What the agent and a worker say to each other, and how it is framed on their socket. Pure: no I/O, no clock.

A frame is its length (u32, big-endian) and a msgpack message. The worker answers each `Ask` with one or
more `Piece`s, the last of them `final`; `Count` with `Counted`; nothing answers `Cancel` but the ask's own
final piece, with the error `cancelled`.
"""

from __future__ import annotations

import struct

import msgspec

from models.backend_settings import BackendSettings
from models.request import Request

MAX_FRAME_BYTES = 64 << 20
HEADER = struct.Struct(">I")


class Open(msgspec.Struct, tag="open", frozen=True, kw_only=True):
    """First message: which artifact to open. `manifest` is the manifest's bytes; `folder` holds its files."""

    folder: str
    manifest: bytes
    variant: str
    threads: int = 1
    slots: int = 4
    """Requests that a generating model answers side by side."""
    backends: BackendSettings = BackendSettings()


class Laid(msgspec.Struct, frozen=True):
    """Where on the shelf (`models.shelf`) a request's body lies, which is then not in its message."""

    at: int
    length: int


class Ask(msgspec.Struct, tag="ask", frozen=True):
    """A request to answer; `budget_ms` is what is left of its deadline, after which it is not begun."""

    ticket: int
    request: Request
    budget_ms: float
    laid: Laid | None = None


class Count(msgspec.Struct, tag="count", frozen=True):
    """Ask for the tokens that a request costs before it runs."""

    ticket: int
    request: Request
    laid: Laid | None = None


class Cancel(msgspec.Struct, tag="cancel", frozen=True):
    """The asker no longer wants this ticket."""

    ticket: int


class Ready(msgspec.Struct, tag="ready", frozen=True, kw_only=True):
    """The session is open and warm. `capacity` is how many asks the worker takes at once.

    `longest_token_bytes` is the most UTF-8 bytes that one token covers (0: no tokenizer), so that the
    agent can tell from a length alone that a text cannot fit; `extra_tokens` is the most tokens that
    templating adds to a text. `default_max_tokens` is what an ask that names none may generate.
    `unprotected` names what the kernel lacks to confine the worker; `fallbacks` the accelerators that
    the owner prefers and the session has not got.
    """

    load_ms: float
    capacity: int
    context_tokens: int = 0
    longest_token_bytes: int = 0
    extra_tokens: int = 0
    default_max_tokens: int = 0
    unprotected: list[str] = []
    fallbacks: list[str] = []


class Broken(msgspec.Struct, tag="broken", frozen=True):
    """The session could not be opened; the worker ends after this."""

    message: str


class Counted(msgspec.Struct, tag="counted", frozen=True, kw_only=True):
    """What a request costs in tokens, or why it cannot be counted."""

    ticket: int
    tokens_in: int = 0
    max_tokens: int = 0
    code: str = ""
    message: str = ""


class Piece(msgspec.Struct, tag="piece", frozen=True, kw_only=True):
    """A whole answer (`final`, first), a piece of a stream, or an error (`code` set, then `final`)."""

    ticket: int
    body: bytes = b""
    content_type: str = "application/json"
    final: bool = True
    code: str = ""
    message: str = ""
    compute_ms: float = 0.0
    batch: int = 1
    tokens_in: int = 0
    tokens_out: int = 0


ToWorker = Open | Ask | Count | Cancel
FromWorker = Ready | Broken | Counted | Piece

_encoder = msgspec.msgpack.Encoder()
to_worker = msgspec.msgpack.Decoder(ToWorker)
from_worker = msgspec.msgpack.Decoder(FromWorker)


def frame(message: ToWorker | FromWorker) -> bytes:
    """Return the framed bytes of a message."""
    payload = _encoder.encode(message)
    if len(payload) > MAX_FRAME_BYTES:
        raise ValueError(f"a message of {len(payload)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return HEADER.pack(len(payload)) + payload
