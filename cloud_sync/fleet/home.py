"""The admin's folder: where the repository lies, the keys that sign, and what was last trusted.

`fleet.json`, `keys/{role}.pem` (PKCS8, mode 0600), `ca/`, `pools/`, `trust/` and `root.json`, the root to pin.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from securesystemslib.signer import CryptoSigner

from cloud_sync.disk import write_durably
from cloud_sync.fleet.errors import FleetError
from cloud_sync.objects import Objects, StorageSettings
from cloud_sync.objects_open import open_objects

ROLES: Final = ("root", "targets", "models", "deployments", "snapshot", "timestamp")
PRIVATE: Final = 0o600


class Lifetimes(msgspec.Struct, frozen=True):
    """How many days a role's signature holds."""

    root: int = 730
    targets: int = 365
    models: int = 365
    deployments: int = 365
    snapshot: int = 30
    timestamp: int = 7

    def of(self, role: str) -> int:
        """Return a role's days."""
        return int(getattr(self, role))


class FleetConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What `fleet.json` holds."""

    repository: str
    storage: StorageSettings = StorageSettings()
    lifetimes: Lifetimes = Lifetimes()


class Home:
    """The folder of one fleet on an admin's machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def trust(self) -> Path:
        """Where the metadata last trusted lies."""
        return self.folder / "trust"

    @property
    def root(self) -> Path:
        """The root metadata that boxes pin."""
        return self.folder / "root.json"

    @property
    def exists(self) -> bool:
        """Whether a fleet was made here."""
        return (self.folder / "fleet.json").is_file()

    def config(self) -> FleetConfig:
        """Read `fleet.json`; raises FleetError."""
        path = self.folder / "fleet.json"
        try:
            return msgspec.json.decode(path.read_bytes(), type=FleetConfig)
        except (OSError, msgspec.MsgspecError) as error:
            raise FleetError(
                f"{self.folder} is no fleet home ({error}); make one with `spillway-fleet init`"
            ) from error

    def save_config(self, config: FleetConfig) -> None:
        """Write `fleet.json`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_durably(self.folder / "fleet.json", msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n")

    def open_objects(self) -> Objects:
        """Open the fleet's repository."""
        config = self.config()
        return open_objects(config.repository, config.storage)

    def pinned_root(self) -> bytes:
        """Read the root to pin; raises FleetError."""
        try:
            return self.root.read_bytes()
        except OSError as error:
            raise FleetError(f"{self.root} cannot be read: {error}") from error

    def has_key(self, role: str) -> bool:
        """Whether this machine can sign for a role."""
        return self._key(role).is_file()

    def new_key(self, role: str) -> CryptoSigner:
        """Make and keep an Ed25519 key for a role, in place of the one it had; that one is kept beside it."""
        private = Ed25519PrivateKey.generate()
        path = self._key(role)
        if path.exists():
            path.replace(_free_name(path))
        save_private(path, private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return CryptoSigner(private)

    def signer(self, role: str) -> CryptoSigner:
        """Return who signs for a role here; raises FleetError where the key is elsewhere."""
        path = self._key(role)
        try:
            return CryptoSigner(load_pem_private_key(path.read_bytes(), None))
        except (OSError, ValueError) as error:
            raise FleetError(f"the key of the role {role} is not at hand: {error}") from error

    def _key(self, role: str) -> Path:
        return self.folder / "keys" / f"{role}.pem"


def save_private(path: Path, data: bytes) -> None:
    """Write a secret that its owner alone can read."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_durably(path, data, mode=PRIVATE)


def _free_name(path: Path) -> Path:
    number = 1
    while (free := path.with_name(f"{path.stem}.old-{number}{path.suffix}")).exists():
        number += 1
    return free
