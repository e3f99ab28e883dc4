"""What a group's boxes run, and which version that means for one box. Pure: no I/O, no clock."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Final

import msgspec

from cloud_sync.errors import TrustError
from models.manifest import is_name, is_version

SCHEMA: Final = 1
MAX_DEPLOYMENT_BYTES: Final = 1 << 20
WHOLE_SHARE: Final = 10_000


class Rollout(msgspec.Struct, frozen=True, kw_only=True):
    """How a model's version goes out: `share` in hundredths of a percent; outside it `previous` runs.

    `halt` stops it: a box that runs `version` already stays, no other takes it.
    """

    version: str
    previous: str | None = None
    share: int = WHOLE_SHARE
    salt: str = ""
    window: str = ""
    halt: bool = False


class PoolKey(msgspec.Struct, frozen=True):
    """An HPKE public key of a pool: X25519 in hex; `not_after` in UTC as `2027-01-31T00:00:00Z`, "" for never."""

    kid: str
    key: str
    not_after: str = ""


class Pool(msgspec.Struct, frozen=True):
    """Gateways that answer hand-offs on `{topic}/{model}`, and the keys to seal for them."""

    name: str
    topic: str
    keys: list[PoolKey]


class Deployment(msgspec.Struct, frozen=True, kw_only=True):
    """The signed decision for one group; `sequence` only grows, `issued` is UTC."""

    schema: int
    group: str
    sequence: int
    issued: str
    models: dict[str, Rollout]
    pools: list[Pool] = []


class _Schema(msgspec.Struct):
    schema: int


def deployment_bytes(deployment: Deployment) -> bytes:
    """Return the canonical bytes of a deployment."""
    return msgspec.json.encode(deployment, order="sorted")


def parse_deployment(raw: bytes, group: str) -> Deployment:
    """Return the deployment of `group` that `raw` holds; raises TrustError naming what is wrong."""
    try:
        schema = msgspec.json.decode(raw, type=_Schema).schema
        if schema != SCHEMA:
            raise TrustError("unknown_schema", f"deployment {group}: schema {schema} is not known")
        deployment = msgspec.json.decode(raw, type=Deployment)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise TrustError("bad_metadata", f"deployment {group}: {error}") from error
    if deployment.group != group:
        raise TrustError("wrong_software", f"deployment {group} is signed for the group {deployment.group!r}")
    for name, rollout in deployment.models.items():
        _check_rollout(group, name, rollout)
    for pool in deployment.pools:
        _check_pool(group, pool)
    return deployment


def in_share(salt: str, device: str, share: int) -> bool:
    """Whether a device is in a rollout's share, in hundredths of a percent (PROTOCOL 6)."""
    return int(hashlib.sha256(f"{salt}:{device}".encode()).hexdigest()[:8], 16) % WHOLE_SHARE < share


def version_for(rollout: Rollout, device: str, current: str | None) -> str | None:
    """Return the version that a device should run, given the one it runs; None for none."""
    if rollout.halt:
        return current if current == rollout.version else rollout.previous
    return rollout.version if in_share(rollout.salt, device, rollout.share) else rollout.previous


def targets_for(deployments: Iterable[Deployment], device: str, current: dict[str, str]) -> dict[str, str]:
    """Return the versions that a device should run, by model; the first deployment that names a model decides."""
    decided: dict[str, str | None] = {}
    for deployment in deployments:
        for model, rollout in deployment.models.items():
            if model not in decided:
                decided[model] = version_for(rollout, device, current.get(model))
    return {model: version for model, version in decided.items() if version is not None}


def decisions_of(deployments: Iterable[Deployment]) -> dict[tuple[str, str], str]:
    """Return which decision asks for each (model, version): the rollout's salt, new with each change of version.

    What a box falls back to was not asked for anew.
    """
    decided: dict[str, tuple[tuple[str, str], str]] = {}
    for deployment in deployments:
        for model, rollout in deployment.models.items():
            decided.setdefault(model, ((model, rollout.version), rollout.salt))
    return dict(decided.values())


def pools_of(deployments: Iterable[Deployment]) -> list[Pool]:
    """Return the pools that the deployments name; the first that names a pool decides."""
    pools: dict[str, Pool] = {}
    for deployment in deployments:
        for pool in deployment.pools:
            pools.setdefault(pool.name, pool)
    return list(pools.values())


def _check_rollout(group: str, model: str, rollout: Rollout) -> None:
    versions = [rollout.version] if rollout.previous is None else [rollout.version, rollout.previous]
    sound = is_name(model) and all(map(is_version, versions)) and 0 <= rollout.share <= WHOLE_SHARE
    if not sound:
        raise TrustError("bad_metadata", f"deployment {group}: the rollout of {model[:64]!r} is malformed")


def _check_pool(group: str, pool: Pool) -> None:
    keys_sound = all(_is_key(key.key) for key in pool.keys)
    if not (is_name(pool.name) and keys_sound and pool.topic and not set(pool.topic) & set("+#\0")):
        raise TrustError("bad_metadata", f"deployment {group}: the pool {pool.name[:64]!r} is malformed")


def _is_key(text: str) -> bool:
    try:
        return len(bytes.fromhex(text)) == 32
    except ValueError:
        return False
