"""What all commands share: exit codes, and how a box's configuration is found."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

import msgspec

from agent.config import DEFAULT_PATH, Config, load_config

CREDENTIALS: Final = "/run/credentials/spillway.service/keys_"
KEYS: Final = "/etc/spillway/keys/"
EXIT_OK: Final = 0
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_LOCKED: Final = 75
EXIT_CONFIG: Final = 78
"""One table of exit codes (systemd/README.md); 78 is not restarted."""


def at_rest(config: Config) -> Config:
    """Return the configuration with systemd's credentials, which only the service sees, where they lie on the disk."""

    def moved(path: str) -> str:
        return str(resting(path))

    device = msgspec.structs.replace(
        config.device, certificate=moved(config.device.certificate), key=moved(config.device.key)
    )
    links = {
        name: msgspec.structs.replace(
            link, **{field: moved(getattr(link, field)) for field in ("password_file", "ca", "certificate", "key")}
        )
        for name, link in (("local", config.local), ("cloud", config.cloud))
        if link is not None
    }
    return msgspec.structs.replace(config, device=device, **links)


def resting(path: str) -> str:
    """Return where a file lies on the disk that systemd gives the service alone."""
    there = path and not Path(path).exists() and path.startswith(CREDENTIALS)
    return KEYS + path.removeprefix(CREDENTIALS) if there else path


def config_option(parser: argparse.ArgumentParser) -> None:
    """Let a command read the box's configuration where there is one."""
    parser.add_argument("--config", type=Path, help=f"a box's configuration (default: {DEFAULT_PATH}, if it is there)")


def config_if_there(path: Path | None) -> Config | None:
    """Return the configuration that was named, or the box's own where there is one; raises ConfigError."""
    if path is None:
        return load_config(DEFAULT_PATH) if DEFAULT_PATH.exists() else None
    return load_config(path)
