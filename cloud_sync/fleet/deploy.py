"""`spillway-fleet deploy`: decide what a group's boxes run, and to which pools they may hand off."""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from cloud_sync.deployment import (
    MAX_DEPLOYMENT_BYTES,
    SCHEMA,
    WHOLE_SHARE,
    Deployment,
    Pool,
    PoolKey,
    Rollout,
    deployment_bytes,
    parse_deployment,
)
from cloud_sync.fleet.errors import FleetError
from cloud_sync.fleet.home import Home
from cloud_sync.fleet.pool_key import kid_of
from cloud_sync.fleet.repository import Draft, edit, load, time_text
from models.manifest import is_name, is_version


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What one call of `deploy` changes; what it does not name stays."""

    versions: dict[str, str] = {}
    share: int = WHOLE_SHARE
    window: str = ""
    remove: list[str] = []
    halt: list[str] = []
    resume: list[str] = []
    pools: dict[str, list[str]] = {}
    """Pool to its public keys in hex."""
    remove_pools: list[str] = []


def deploy(home: Home, group: str, wish: Wish) -> dict[str, Any]:
    """Sign the group's next deployment and return it; raises FleetError."""
    if not is_name(group):
        raise FleetError(f"{group!r} is no name of a group")
    draft = load(home, home.open_objects(), now=datetime.now(UTC))
    before = current_deployment(draft, group)
    if before is not None and _wished(draft, group, wish, before) == before:
        return {"nothing to change": f"{group} is deployed so already", **_told(before)}
    return edit(home, lambda draft: _deploy(draft, group, wish))


def _told(deployment: Deployment) -> dict[str, Any]:
    report: dict[str, Any] = msgspec.to_builtins(deployment)
    return report


def current_deployment(draft: Draft, group: str) -> Deployment | None:
    """Return what a group runs by the draft, or None."""
    path = f"deployments/{group}.json"
    if path not in draft.targets("deployments"):
        return None
    return parse_deployment(draft.read_target(path, MAX_DEPLOYMENT_BYTES), group)


def public_key(text: str) -> str:
    """Return a pool's public key in hex, given so or as a file that `pool-key` wrote; raises FleetError."""
    path = Path(text)
    if path.is_file():
        try:
            text = msgspec.json.decode(path.read_bytes(), type=dict[str, str])["public"]
        except (msgspec.MsgspecError, KeyError) as error:
            raise FleetError(f"{path} is no key file: {error}") from error
    try:
        if len(bytes.fromhex(text)) == 32:
            return text.lower()
    except ValueError:
        pass
    raise FleetError(f"{text!r} is neither a public key in hex nor a file that `pool-key` wrote")


def _deploy(draft: Draft, group: str, wish: Wish) -> dict[str, Any]:
    before = current_deployment(draft, group)
    wished = _wished(
        draft, group, wish, before or Deployment(schema=SCHEMA, group=group, sequence=0, issued="", models={})
    )
    issued = time_text(datetime.now(UTC))
    after = msgspec.structs.replace(wished, sequence=wished.sequence + 1, issued=issued)
    draft.add_target("deployments", f"deployments/{group}.json", deployment_bytes(after))
    parse_deployment(deployment_bytes(after), group)
    return _told(after)


def _wished(draft: Draft, group: str, wish: Wish, before: Deployment) -> Deployment:
    """Return the deployment with what was wished for, its number and date as before; raises FleetError."""
    models = dict(before.models)
    for model, version in wish.versions.items():
        models[model] = _rollout(draft, model, version, models.get(model), wish)
    for model in wish.remove:
        _known(models, model, group)
        del models[model]
    for model, halt in [*((model, True) for model in wish.halt), *((model, False) for model in wish.resume)]:
        models[model] = msgspec.structs.replace(_known(models, model, group), halt=halt)
    return msgspec.structs.replace(before, models=models, pools=_pools(before.pools, wish))


def _known(models: dict[str, Rollout], model: str, group: str) -> Rollout:
    if model not in models:
        raise FleetError(f"nothing named {model} is deployed to {group}")
    return models[model]


def _rollout(draft: Draft, model: str, version: str, before: Rollout | None, wish: Wish) -> Rollout:
    """Return the model's next rollout; the salt stays while a version's share is raised, so that no box falls out."""
    if not (is_name(model) and is_version(version)):
        raise FleetError(f"{model}={version} is no model and version")
    if f"models/{model}/{version}.json" not in draft.targets("models"):
        raise FleetError(f"{model}@{version} is not published")
    if before is not None and before.version == version:
        return msgspec.structs.replace(before, share=wish.share, window=wish.window, halt=False)
    previous = _settled(before) if before else None
    salt = secrets.token_hex(8)
    return Rollout(version=version, previous=previous, share=wish.share, salt=salt, window=wish.window)


def _settled(before: Rollout) -> str | None:
    """Return the version that a box outside the new share falls back to: the old one if it had gone out whole."""
    return before.version if before.share >= WHOLE_SHARE and not before.halt else before.previous


def _pools(before: list[Pool], wish: Wish) -> list[Pool]:
    pools = {pool.name: pool for pool in before if pool.name not in wish.remove_pools}
    for name, keys in wish.pools.items():
        if not is_name(name):
            raise FleetError(f"{name!r} is no name of a pool")
        pools[name] = Pool(name, f"spillway/handoff/{name}", [PoolKey(kid_of(bytes.fromhex(key)), key) for key in keys])
    return list(pools.values())
