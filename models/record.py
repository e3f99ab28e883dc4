"""Golden samples: the questions a version is judged by, and the answers it gave where it was published."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from models.artifact import Artifact
from models.body import parse_body
from models.channel import Piece
from models.errors import ModelError, RequestError
from models.manifest import Golden, Manifest, Variant, variant_golden
from models.request import GraphInput, Request
from models.session import Session, open_graph, open_session

_TICKET: Final = -1


def golden_request(manifest: Manifest, golden: Golden) -> Request:
    """Return a golden sample's question as a door would hand it on, never streamed; raises RequestError."""
    body = parse_body(golden.content_type, golden.body)
    return Request(model=manifest.name, content_type=body.content_type, body=body.body, dialect=body.dialect)


def answer_alone(session: Session, request: Request) -> Piece:
    """Answer one request on a session that has nothing else to do; an error is a piece with its code."""
    try:
        session.submit(_TICKET, request)
    except RequestError as error:
        return Piece(ticket=_TICKET, code=error.code, message=error.message)
    while True:
        for piece in session.step():
            if piece.final:
                return piece


def answer_golden(session: Session, manifest: Manifest, golden: Golden) -> bytes:
    """Return the body that answers a golden sample; raises ModelError where the answer is an error."""
    try:
        piece = answer_alone(session, golden_request(manifest, golden))
    except RequestError as error:
        raise ModelError(f"a golden sample is no request: {error.message}") from error
    if piece.code:
        raise ModelError(f"a golden sample is not answered: {piece.code}: {piece.message}")
    return piece.body


def warm(session: Session, manifest: Manifest) -> None:
    """Answer one golden sample, so that the first asker does not pay for it; raises ModelError."""
    if manifest.golden:
        answer_golden(session, manifest, manifest.golden[0])


def record_golden(
    folder: Path, manifest: Manifest, variant: Variant | None = None, *, threads: int = 1
) -> list[Golden]:
    """Return the variant's golden samples with `expected` as this machine answers them; raises ModelError."""
    asked = variant or manifest.variants[0]
    session = open_session(folder, manifest, asked, threads=threads, slots=1)
    try:
        return [
            msgspec.structs.replace(golden, expected=msgspec.Raw(answer_golden(session, manifest, golden)))
            for golden in variant_golden(manifest, asked.name)
        ]
    finally:
        session.close()


def graph_inputs(folder: Path, manifest: Manifest, variant: Variant) -> list[GraphInput]:
    """Return what a variant's graph takes; raises ModelError."""
    with Artifact(folder, variant.files) as artifact:
        backend = open_graph(artifact, manifest.format, threads=1)
    try:
        return [GraphInput(spec.name, spec.dtype, spec.shape) for spec in backend.inputs]
    finally:
        backend.close()
