"""What a gateway is told."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec

from cloud_sync.messages import LinkSettings
from cloud_sync.strict_toml import ConfigError, load_toml
from cloud_sync.wire import is_prefix
from models.manifest import is_name

Positive = Annotated[int, msgspec.Meta(ge=1)]


class PoolSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One pool: the key files that open its hand-offs, and the endpoint that answers them.

    `upstream` ends before `/chat/completions`. `models` gives the endpoint's name for each model that boxes ask for;
    without it the names are the same on both sides. Beyond `concurrency` requests at once a box is told `overloaded`.
    """

    keys: Annotated[list[str], msgspec.Meta(min_length=1)]
    upstream: str
    models: dict[str, str] = {}
    api_key_file: str = ""
    concurrency: Positive = 32


class GatewaySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A gateway: its broker, the CA of the fleet's boxes, its pools, and its bounds.

    It keeps `answers` answers of together `answer_bytes` for boxes that ask again, and `ids` ids of the past, so that
    a replayed request is not paid for again.
    """

    cloud: LinkSettings
    ca: str
    pools: dict[str, PoolSettings]
    prefix: str = "spillway"
    answers: Positive = 1000
    answer_bytes: Positive = 64 << 20
    ids: Positive = 50_000
    drain_timeout_s: Annotated[float, msgspec.Meta(ge=0)] = 30.0
    log: Literal["debug", "info", "warning", "error"] = "info"


def load_config(path: Path) -> GatewaySettings:
    """Read and check a gateway's configuration; paths count from its folder. Raises ConfigError."""
    settings = load_toml(path, GatewaySettings)
    if not is_prefix(settings.prefix):
        raise ConfigError(f"{path}: `prefix` = {settings.prefix!r}: 1 to 4 parts of letters, digits, `.`, `_`, `-`")
    if not settings.pools:
        raise ConfigError(f"{path}: `pools` is empty: name at least one, as [pools.default]")
    for name, pool in settings.pools.items():
        _check_pool(path, name, pool)
    return _with_paths(settings, path.parent)


def _check_pool(path: Path, name: str, pool: PoolSettings) -> None:
    if not is_name(name):
        raise ConfigError(f"{path}: `pools.{name}`: a pool's name is 1 to 64 of a-z, 0-9, `.`, `_`, `-`")
    url = urlsplit(pool.upstream)
    if url.scheme not in {"http", "https"} or not url.hostname:
        raise ConfigError(f"{path}: `pools.{name}.upstream` = {pool.upstream!r}: as http://host:8000/v1 is right")
    for model in pool.models:
        if not is_name(model):
            raise ConfigError(f"{path}: `pools.{name}.models.{model}`: is no name of a model that a box can ask for")


def _with_paths(settings: GatewaySettings, folder: Path) -> GatewaySettings:
    def whole(text: str) -> str:
        return str(folder / os.path.expandvars(text)) if text else ""

    files = {name: whole(getattr(settings.cloud, name)) for name in ("password_file", "ca", "certificate", "key")}
    pools = {
        name: msgspec.structs.replace(
            pool, keys=[whole(key) for key in pool.keys], api_key_file=whole(pool.api_key_file)
        )
        for name, pool in settings.pools.items()
    }
    cloud = msgspec.structs.replace(settings.cloud, **files)
    return msgspec.structs.replace(settings, cloud=cloud, ca=whole(settings.ca), pools=pools)
