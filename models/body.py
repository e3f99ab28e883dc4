"""The surface of a request's body, as every door reads it (PROTOCOL 2). Pure: no I/O, no clock.

Only what a door must know is decoded: the dialect, the `spillway` envelope and `stream`; the inputs stay bytes, so
that a large body costs one pass over it.
"""

from __future__ import annotations

import re
import struct
from typing import Annotated, Final, Literal

import msgspec

from models.errors import RequestError
from models.request import Dialect

JSON: Final = "application/json"
TEXT: Final = "text/plain"
OCTETS: Final = "application/octet-stream"
HEADER_BYTES: Final = "inference-header-content-length"
"""What the property or header is called that tells how many bytes of JSON begin a body of OCTETS."""

IMAGES: Final = frozenset({"image/jpeg", "image/png"})
SOUNDS: Final = frozenset({"audio/wav"})
_SAME_AS: Final = {"image/jpg": "image/jpeg", "audio/x-wav": "audio/wav", "audio/wave": "audio/wav"}
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_SPACE: Final = b" \t\r\n"
_LENGTH: Final = struct.Struct(">I")
_EMPTY_LIST: Final = re.compile(rb"\[[ \t\r\n]*\]")
_LIST_OF_OBJECTS: Final = re.compile(rb"\[[ \t\r\n]*\{")

type_errors: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises on bytes that are no JSON, or not of the wanted types."""


class Envelope(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What MQTT 3.1.1 clients put into the body's `spillway` object, for want of properties."""

    id: Annotated[str, msgspec.Meta(max_length=256)] | None = None
    reply_to: Annotated[str, msgspec.Meta(min_length=1, max_length=65535)] | None = None
    deadline_ms: Annotated[int, msgspec.Meta(gt=0)] | None = None
    priority: Annotated[int, msgspec.Meta(ge=0, le=9)] | None = None
    privacy: Literal["local-only", "any"] | None = None
    stream: bool | None = None
    provisional: bool | None = None


class Body(msgspec.Struct, frozen=True):
    """A body as its door hands it on: without its envelope, and with its content type settled.

    One of OCTETS begins with the length of its JSON (`framed_octets`).
    `stream` is the envelope's word, else the body's own, else None.
    """

    content_type: str
    dialect: Dialect
    body: bytes
    envelope: Envelope | None = None
    stream: bool | None = None


class _TensorHead(msgspec.Struct):
    """What tells an Open Inference Protocol tensor from another object."""

    name: msgspec.Raw = msgspec.Raw()
    shape: msgspec.Raw = msgspec.Raw()
    datatype: msgspec.Raw = msgspec.Raw()


_object = msgspec.json.Decoder(dict[str, msgspec.Raw])
_envelope = msgspec.json.Decoder(Envelope)
_heads = msgspec.json.Decoder(list[_TensorHead])
_stream: msgspec.json.Decoder[bool | None] = msgspec.json.Decoder(bool | None)


def parse_body(content_type: str | None, body: bytes, json_bytes: str | None = None) -> Body:
    """Settle a body's content type, dialect and envelope; raises RequestError `bad_request`.

    `json_bytes` is what HEADER_BYTES says, where the asker said it.
    """
    kind = _content_type(content_type) if content_type else sniff(body)
    if not body:
        raise RequestError("bad_request", "body: is empty")
    if kind == JSON:
        return _parse_json(body.removeprefix(_BYTE_ORDER_MARK))
    if kind == OCTETS:
        return _parse_octets(body, json_bytes)
    if kind == TEXT:
        _check_text(body)
    return Body(content_type=kind, dialect=Dialect.HUGGINGFACE, body=body)


def framed_octets(head: bytes, tensors: bytes) -> bytes:
    """Return a body of JSON and binary tensors as it travels inside the box: the length of its JSON comes first."""
    return b"".join((_LENGTH.pack(len(head)), head, tensors))


def split_octets(body: bytes) -> tuple[memoryview, memoryview]:
    """Return the JSON and the binary tensors of `framed_octets`."""
    view = memoryview(body)
    (length,) = _LENGTH.unpack_from(view)
    return view[_LENGTH.size : _LENGTH.size + length], view[_LENGTH.size + length :]


def outer_octets(body: bytes) -> tuple[bytes, int]:
    """Return `framed_octets` as it crosses the wire, and the bytes of its JSON for HEADER_BYTES."""
    head, tensors = split_octets(body)
    return b"".join((head, tensors)), len(head)


def sniff(body: bytes) -> str:
    """Name the content type of a body that came without one."""
    if body.removeprefix(_BYTE_ORDER_MARK).lstrip(_SPACE).startswith(b"{"):
        return JSON
    if body.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if body.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if body.startswith(b"RIFF") and body[8:12] == b"WAVE":
        return "audio/wav"
    return TEXT


def parse_failure(field: str, error: Exception) -> RequestError:
    """Say in the asker's words why `field` is not the JSON it should be."""
    if isinstance(error, RecursionError):
        reason = "is nested too deeply"
    elif isinstance(error, UnicodeDecodeError):
        reason = "is not UTF-8"
    else:
        reason = str(error)
    return RequestError("bad_request", f"{field}: {reason}")


def _content_type(value: str) -> str:
    """Normalise a Content Type; only UTF-8 is taken as text."""
    kind, *parameters = (part.strip().lower() for part in value.split(";"))
    kind = _SAME_AS.get(kind, kind)
    if kind not in IMAGES | SOUNDS | {JSON, TEXT, OCTETS}:
        raise RequestError("bad_request", f"content type: {kind[:80]!r} is not one that is read here")
    for parameter in parameters:
        name, _, given = parameter.partition("=")
        if name == "charset" and given.strip('"') not in {"utf-8", "utf8", "us-ascii"}:
            raise RequestError("bad_request", f"content type: text must be UTF-8, not {given[:40]!r}")
    return kind


def _check_text(body: bytes) -> None:
    try:
        body.decode()
    except UnicodeDecodeError as error:
        message = "body: is neither JSON, an image or sound of a known kind, nor UTF-8 text"
        raise RequestError("bad_request", message) from error


def _parse_octets(body: bytes, json_bytes: str | None) -> Body:
    """Read the Open Inference Protocol's binary extension: JSON of a told length, then the tensors that it names."""
    said = json_bytes or ""
    if not (said.isascii() and said.isdigit() and len(said) < 12 and 0 < int(said) <= len(body)):
        got = f"got {said[:40]!r}" if json_bytes is not None else "it is missing"
        message = f"{HEADER_BYTES}: expected the bytes of JSON that begin the body, 1 to {len(body)}; {got}"
        raise RequestError("bad_request", message)
    head = _parse_json(body[: int(said)])
    if head.dialect is not Dialect.OPEN_INFERENCE:
        raise RequestError("bad_request", "inputs: expected tensors with name, shape and datatype before binary data")
    if head.envelope is not None:
        raise RequestError("bad_request", "spillway: beside binary tensors its members go into properties or headers")
    framed = framed_octets(head.body, body[int(said) :])
    return Body(OCTETS, head.dialect, framed, stream=head.stream)


def _parse_json(body: bytes) -> Body:
    try:
        fields = _object.decode(body)
    except type_errors as error:
        raise parse_failure("body", error) from None
    envelope = _parse_envelope(fields.pop("spillway", None))
    stream = _parse_stream(fields.get("stream"))
    if envelope is not None:
        body = msgspec.json.encode(fields)
        stream = stream if envelope.stream is None else envelope.stream
    return Body(content_type=JSON, dialect=_dialect(fields), body=body, envelope=envelope, stream=stream)


def _parse_envelope(raw: msgspec.Raw | None) -> Envelope | None:
    if raw is None:
        return None
    try:
        return _envelope.decode(raw)
    except type_errors as error:
        raise parse_failure("spillway", error) from None


def _parse_stream(raw: msgspec.Raw | None) -> bool | None:
    if raw is None:
        return None
    try:
        return _stream.decode(raw)
    except type_errors as error:
        raise parse_failure("stream", error) from None


def _dialect(fields: dict[str, msgspec.Raw]) -> Dialect:
    """Tell the dialect by its own field; raises where there is none, two, or one that holds nothing."""
    if "messages" in fields:
        if "inputs" in fields:
            raise RequestError("bad_request", "body: has both `inputs` and `messages`")
        return Dialect.OPENAI
    if "inputs" not in fields:
        raise RequestError("bad_request", "body: needs `inputs` or `messages`")
    inputs = memoryview(fields["inputs"])
    if bytes(inputs[:1]) not in {b'"', b"[", b"{"} or _EMPTY_LIST.fullmatch(inputs):
        raise RequestError("bad_request", "inputs: must be a string, a number list, an object or a list of these")
    return Dialect.OPEN_INFERENCE if _holds_tensors(inputs) else Dialect.HUGGINGFACE


def _holds_tensors(inputs: memoryview) -> bool:
    if not _LIST_OF_OBJECTS.match(inputs):
        return False
    try:
        heads = _heads.decode(inputs)
    except type_errors:
        return False
    return all(bytes(head.name) and bytes(head.shape) and bytes(head.datatype) for head in heads)
