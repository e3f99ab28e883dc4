"""Requests and responses: the values every door, worker and hand-off shares. Pure: no I/O, no clock."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Dialect(StrEnum):
    """Which of the three body grammars of PROTOCOL 2 a request speaks, and so its answer and errors."""

    HUGGINGFACE = "huggingface"
    OPEN_INFERENCE = "open-inference"
    OPENAI = "openai"


class Status(StrEnum):
    """What one reply message is (PROTOCOL 1)."""

    OK = "ok"
    PARTIAL = "partial"
    PROVISIONAL = "provisional"
    ERROR = "error"


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One question to one model, as the asker put it.

    `body` is the asker's body without the `spillway` envelope; `content_type` is lower case without
    parameters. `deadline_ms` counts from the box's receipt and is None where the asker named none.
    """

    model: str
    content_type: str
    body: bytes
    dialect: Dialect
    client: str = "any"
    deadline_ms: int | None = None
    priority: int = 5
    local_only: bool = False
    stream: bool = False
    provisional: bool = False


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """One reply message: a whole answer, a piece of a stream, or an error.

    `body` is in the request's dialect, without the box's own facts (`models.answer.with_facts` adds
    them). Times are milliseconds. `code` is set for errors alone.
    """

    status: Status
    body: bytes
    content_type: str = "application/json"
    sequence: int = 0
    final: bool = True
    code: str = ""
    route: str = ""
    reason: str = ""
    model: str = ""
    queued_ms: float = 0.0
    compute_ms: float = 0.0
    total_ms: float = 0.0
    tokens_in: int = 0
    tokens_out: int = 0


class GraphInput(msgspec.Struct, frozen=True):
    """One input of a model's graph; `dtype` is numpy's name for it, a free dimension is None."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]
