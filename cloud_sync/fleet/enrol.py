"""`spillway-fleet enrol`: what a box needs to belong to the fleet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec

from cloud_sync.disk import write_durably
from cloud_sync.fleet.authority import authority_pem, certify, private_pem
from cloud_sync.fleet.errors import FleetError
from cloud_sync.fleet.home import FleetConfig, Home, save_private
from models.manifest import is_name

RESERVED_DEVICES = frozenset({"handoff", "fleet"})


class Enrolment(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked for a box: its name and groups, the cloud's broker, and where its files will lie on it."""

    device: str
    groups: list[str]
    broker: str = ""
    port: int = 8883
    at: str = "/etc/spillway"
    days: int = 1825


def enrol(home: Home, asked: Enrolment, out: Path) -> dict[str, Any]:
    """Write `device.key`, `device.pem`, `ca.pem`, `root.json` and `spillway.toml`; raises FleetError."""
    for name in (asked.device, *asked.groups):
        if not is_name(name):
            raise FleetError(f"{name!r} is no name: lower-case letters, digits, '.', '_' and '-', 64 at most")
    if asked.device in RESERVED_DEVICES:
        raise FleetError(f"{asked.device!r} cannot name a device")
    if (out / "device.key").exists():
        raise FleetError(f"{out} holds a device's key already")
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = certify(home, asked.device, key.public_key(), asked.days)
    save_private(out / "device.key", private_pem(key))
    write_durably(out / "device.pem", certificate)
    write_durably(out / "ca.pem", authority_pem(home))
    write_durably(out / "root.json", _newest_root(home))
    write_durably(out / "spillway.toml", _settings(home.config(), asked).encode())
    return {"device": asked.device, "folder": str(out), "groups": asked.groups}


def _newest_root(home: Home) -> bytes:
    kept = home.trust / "root.json"
    return kept.read_bytes() if kept.exists() else home.pinned_root()


def _settings(config: FleetConfig, asked: Enrolment) -> str:
    """Return a configuration for the agent, as TOML; JSON strings and lists are TOML's too."""
    storage = config.storage
    sections: dict[str, dict[str, str | int | list[str]]] = {
        "device": {
            "name": asked.device,
            "groups": asked.groups,
            "certificate": f"{asked.at}/device.pem",
            "key": f"{asked.at}/device.key",
        },
        "local": {"host": "127.0.0.1", "port": 1883},
        "repository": {
            "url": config.repository,
            "root": f"{asked.at}/root.json",
            **({"endpoint": storage.endpoint} if storage.endpoint else {}),
            **({"region": storage.region} if storage.region else {}),
        },
    }
    if asked.broker:
        sections["cloud"] = {
            "host": asked.broker,
            "port": asked.port,
            "ca": f"{asked.at}/ca.pem",
            "certificate": f"{asked.at}/device.pem",
            "key": f"{asked.at}/device.key",
        }
    return "\n".join(_section(name, values) for name, values in sections.items())


def _section(name: str, values: Mapping[str, object]) -> str:
    lines = [f"{key} = {msgspec.json.encode(value).decode()}" for key, value in values.items()]
    return "\n".join([f"[{name}]", *lines, ""])
