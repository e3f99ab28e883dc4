"""Where a request is answered, and why. Pure: no I/O, no clock."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Where(StrEnum):
    """The three places a request can go."""

    LOCAL = "local"
    CLOUD = "cloud"
    REFUSE = "refuse"


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """What a request asks for. `tokens` is prompt plus the most it may generate; 0 where none are counted."""

    tokens: int = 0
    deadline_ms: float
    local_only: bool = False


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What the box can give this model now; `starting`: its worker is about to be back. Times are predictions.

    `why_not` says why the model is not loaded, where more is known than that.
    """

    known: bool
    serving: bool
    starting: bool = False
    context_tokens: int = 0
    queued: int = 0
    max_queue: int = 0
    wait_ms: float = 0.0
    service_ms: float = 0.0
    error_ms: float = 0.0
    why_not: str = ""


class Cloud(msgspec.Struct, frozen=True, kw_only=True):
    """What the cloud can give: whether a pool may take this model, and whether its link is up."""

    pool: str = ""
    connected: bool = False


class Route(msgspec.Struct, frozen=True):
    """The decision: the place, PROTOCOL 4's word for it, and PROTOCOL 3's code where it is a refusal."""

    where: Where
    reason: str
    code: str = ""
    message: str = ""


FITS = Route(Where.LOCAL, "fits")


def route(cost: Cost, load: Load, cloud: Cloud) -> Route:
    """Choose the place: the box wherever it can answer in time, else the cloud if it may, else no."""
    if not load.known:
        return _elsewhere(
            cost, cloud, "not_local", Route(Where.REFUSE, "not_local", "model_not_found", "no such model")
        )
    if load.context_tokens and cost.tokens > load.context_tokens:
        message = f"the request needs {cost.tokens} tokens and the model takes {load.context_tokens}"
        return _elsewhere(cost, cloud, "oversized", Route(Where.REFUSE, "oversized", "too_large", message))
    if not load.serving:
        message = f"the model is not loaded just now{load.why_not and ': ' + load.why_not}"
        refusal = Route(Where.REFUSE, "unavailable", "overloaded", message)
        return _elsewhere(
            cost, cloud, "unavailable", FITS if load.starting and load.queued < load.max_queue else refusal
        )
    if load.queued >= load.max_queue:
        message = f"{load.queued} requests wait for this model already"
        return _elsewhere(cost, cloud, "overflow", Route(Where.REFUSE, "overflow", "overloaded", message))
    if load.wait_ms + load.service_ms + load.error_ms > cost.deadline_ms:
        return _late(cost, load, cloud)
    return FITS


def _late(cost: Cost, load: Load, cloud: Cloud) -> Route:
    """Place what the box would answer too late: the cloud if it can be reached, else the box tries all the same."""
    if cloud.connected:
        return _elsewhere(cost, cloud, "overflow", FITS)
    if load.wait_ms > cost.deadline_ms:
        message = f"{load.wait_ms:.0f} ms of work wait already and the deadline is {cost.deadline_ms:.0f} ms"
        return _elsewhere(cost, cloud, "overflow", Route(Where.REFUSE, "overflow", "overloaded", message))
    return FITS


def _elsewhere(cost: Cost, cloud: Cloud, reason: str, refusal: Route) -> Route:
    if cloud.pool and not cost.local_only:
        return Route(Where.CLOUD, reason)
    return refusal
