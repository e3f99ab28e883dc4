"""The configuration file: what it may say, its defaults, and errors that name the key and the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from agent.binding_settings import Binding, check_bindings
from cloud_sync.messages import LinkSettings
from cloud_sync.strict_toml import ConfigError, load_toml, parse_toml
from cloud_sync.wire import is_device, is_prefix
from models.backend_settings import BackendSettings, backends_problem
from models.manifest import is_name

DEFAULT_PATH = Path("/etc/spillway/spillway.toml")
MAX_BODY_BYTES = 60 << 20
"""A body must fit into one frame of a worker's channel, with room for what goes with it."""
LINK_FILES = ("password_file", "ca", "certificate", "key")

Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(ge=0)]


class Device(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who this box is."""

    name: str
    groups: list[str] = msgspec.field(default_factory=lambda: ["all"])
    prefix: str = "spillway"
    certificate: str = ""
    key: str = ""


class StateSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the box keeps what must survive a power cut."""

    directory: str = "/var/lib/spillway"


class Repository(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where model versions come from; `look_every_s` and `hint_spread_s` are seconds."""

    url: str
    root: str = "/etc/spillway/root.json"
    endpoint: str = ""
    region: str = "us-east-1"
    credentials: str = ""
    look_every_s: Annotated[float, Meta(ge=1)] = 86_400.0
    hint_spread_s: Seconds = 300.0


class Cloud(LinkSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The cloud link: where hand-offs, reports and hints cross."""

    keepalive_s: Annotated[int, Meta(ge=1, le=65535)] = 1200


class Http(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The HTTP door; closed unless `port` is set. Anything but loopback needs a token."""

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 0
    token_file: str = ""


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bounds of the box. Bytes, seconds, milliseconds and counts as named."""

    max_requests: Count = 1000
    max_body_bytes: Annotated[int, Meta(ge=1, le=MAX_BODY_BYTES)] = 8 << 20
    max_request_bytes: Count = 64 << 20
    outbox_rows: Count = 100_000
    outbox_bytes: Count = 256 << 20
    answers: Annotated[int, Meta(ge=0)] = 1000
    drain_timeout_s: Seconds = 30.0
    hang_grace_s: Seconds = 10.0
    """How long a worker may go on with a request that is over before it is ended."""
    store_after_ms: Annotated[float, Meta(ge=0)] = 1000.0
    worker_threads: Annotated[int, Meta(ge=0)] = 0
    worker_slots: Count = 4


class Watching(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When a version that was just activated gives way to the one before it; `window_s` 0 watches nothing."""

    window_s: Seconds = 86_400.0
    max_error_share: Annotated[float, Meta(gt=0, lt=1)] = 0.02
    max_slowdown: Annotated[float, Meta(ge=1)] = 3.0
    max_score_drop: Annotated[float, Meta(ge=0, le=1)] = 0.15


class ModelPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How requests to one model are treated; `pool` is where its overflow may go."""

    pool: str = ""
    deadline_ms: int = 30_000
    max_queue: int = 256
    local_only: bool = False


class Log(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much is told, and in which form."""

    level: Literal["debug", "info", "warning", "error"] = "info"


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything a box is told."""

    device: Device
    local: LinkSettings
    repository: Repository
    state: StateSection = StateSection()
    cloud: Cloud | None = None
    http: Http = Http()
    limits: Limits = Limits()
    watch: Watching = Watching()
    models: dict[str, ModelPolicy] = {}
    bindings: list[Binding] = []
    allow_any: bool = True
    reply_prefixes: list[str] = []
    backends: BackendSettings = BackendSettings()
    log: Log = Log()


def load_config(path: Path) -> Config:
    """Read and check a configuration file; raises ConfigError."""
    config = load_toml(path, Config)
    try:
        _check(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return config


def parse_config(raw: str) -> Config:
    """Parse TOML text into a checked configuration; raises ConfigError."""
    config = parse_toml(raw, Config)
    _check(config)
    return config


def check_files(config: Config) -> None:
    """Refuse a configuration that names a file of the box's own which cannot be read; raises ConfigError."""
    device, http = config.device, config.http
    named = {
        "device.certificate": device.certificate,
        "device.key": device.key,
        "http.token_file": http.token_file if http.port else "",
    }
    for section, link in (("local", config.local), ("cloud", config.cloud)):
        if link is not None:
            named |= {f"{section}.{name}": getattr(link, name) for name in LINK_FILES}
    for key, path in named.items():
        try:
            if path:
                Path(path).open("rb").close()
        except OSError as error:
            raise ConfigError(f"`{key}` = {path!r} cannot be read: {error.strerror}") from error


def check_enrolment(config: Config) -> None:
    """Refuse what keeps a new box from ever pulling a version: no root to trust, no folder to read."""
    repository = config.repository
    try:
        Path(repository.root).open("rb").close()
    except OSError as error:
        raise ConfigError(f"`repository.root` = {repository.root!r} cannot be read: {error.strerror}") from error
    folder = repository.url.removeprefix("file://")
    if folder != repository.url and not Path(folder).is_dir():
        raise ConfigError(f"`repository.url` = {repository.url!r}: there is no such folder")


class StartError(RuntimeError):
    """Something that a start needs is not to be had now; the message says what. A later start may succeed."""


def _check(config: Config) -> None:
    """Refuse what parses but cannot be meant."""
    _check_device(config.device)
    for model, policy in config.models.items():
        _name("models", model)
        _check_policy(config, model, policy)
    if config.repository.url.split("://")[0] not in {"file", "s3"}:
        raise ConfigError(f"`repository.url` = {config.repository.url!r}: begin with file:// or s3://")
    if config.http.port and config.http.host not in {"127.0.0.1", "::1", "localhost"} and not config.http.token_file:
        raise ConfigError(f"`http.host` = {config.http.host!r} is not loopback: set `http.token_file` too")
    _check_links(config)
    if problem := backends_problem(config.backends):
        raise ConfigError(problem)
    check_bindings(config.bindings, f"{config.device.prefix}/{config.device.name}")


def _check_device(device: Device) -> None:
    _name("device.name", device.name)
    if not is_device(device.name):
        raise ConfigError(f"`device.name` = {device.name!r}: this word is taken by the protocol; choose another")
    if not is_prefix(device.prefix):
        right = "1 to 4 parts of letters, digits, `.`, `_`, `-`"
        raise ConfigError(f"`device.prefix` = {device.prefix!r} cannot begin a topic: use {right}")
    for group in device.groups:
        _name("device.groups", group)


def _check_links(config: Config) -> None:
    if config.cloud is not None and not (config.device.certificate and config.device.key):
        raise ConfigError("`cloud` is set but `device.certificate` or `device.key` is not: hand-offs must be signed")
    body, packet = config.limits.max_body_bytes, config.local.max_packet_bytes
    if body > packet:
        remedy = f"raise `local.max_packet_bytes` = {packet} too"
        raise ConfigError(f"`limits.max_body_bytes` = {body} is over what the link takes: {remedy}")
    for key, forgets in (
        ("clean_start", config.local.clean_start),
        ("session_expiry_s", not config.local.session_expiry_s),
    ):
        if forgets:
            value = getattr(config.local, key)
            raise ConfigError(f"`local.{key}` = {value!r}: the broker would forget requests while the box restarts")
    for section, link in (("local", config.local), ("cloud", config.cloud)):
        if link is not None and bool(link.certificate) != bool(link.key):
            raise ConfigError(f"`{section}.certificate` and `{section}.key` belong together: set both or neither")


def _check_policy(config: Config, model: str, policy: ModelPolicy) -> None:
    if policy.pool and config.cloud is None:
        raise ConfigError(f"`models.{model}.pool` = {policy.pool!r} but there is no `cloud` section to reach it")
    if policy.pool and policy.local_only:
        raise ConfigError(f"`models.{model}` has both `pool` and `local_only = true`: keep one")
    if policy.deadline_ms <= 0:
        raise ConfigError(f"`models.{model}.deadline_ms` = {policy.deadline_ms}: must be more than 0")
    if policy.max_queue <= 0:
        raise ConfigError(f"`models.{model}.max_queue` = {policy.max_queue}: must be more than 0")


def _name(key: str, value: str) -> None:
    if not is_name(value):
        raise ConfigError(f"`{key}` = {value!r}: use 1 to 64 of a-z, 0-9, `.`, `_`, `-`, beginning with a-z or 0-9")
