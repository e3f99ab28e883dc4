"""`spillway-fleet pool-key`: the key pair that hand-offs to a pool are sealed for (HPKE, X25519)."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from cloud_sync.fleet.errors import FleetError
from cloud_sync.fleet.home import Home, save_private
from models.manifest import is_name


class PoolKeyFile(msgspec.Struct, frozen=True):
    """What a gateway's key file holds: raw keys in hex; `kid` is the first 8 hex digits of SHA-256 of the public."""

    kid: str
    private: str
    public: str


def kid_of(public: bytes) -> str:
    """Return the identifier of a pool's public key."""
    return hashlib.sha256(public).hexdigest()[:8]


def make_pool_key(home: Home, pool: str, out: Path) -> dict[str, Any]:
    """Make a key pair, the private one for the gateways alone; raises FleetError."""
    if not is_name(pool):
        raise FleetError(f"{pool!r} is no name of a pool")
    if out.exists():
        raise FleetError(f"{out} is there already")
    private = X25519PrivateKey.generate()
    public = private.public_key().public_bytes_raw()
    key = PoolKeyFile(kid_of(public), private.private_bytes_raw().hex(), public.hex())
    out.parent.mkdir(parents=True, exist_ok=True)
    save_private(out, msgspec.json.encode(key) + b"\n")
    known = home.folder / "pools" / f"{pool}.json"
    known.parent.mkdir(parents=True, exist_ok=True)
    known.write_bytes(msgspec.json.encode({"kid": key.kid, "public": key.public}) + b"\n")
    return {"pool": pool, "kid": key.kid, "public": key.public, "file": str(out)}
