"""`spillway-fleet rotate`: a new key for a role, so that the old one is worth nothing."""

from __future__ import annotations

from typing import Any

from securesystemslib.signer import CryptoSigner

from cloud_sync.fleet.errors import FleetError
from cloud_sync.fleet.home import ROLES, Home
from cloud_sync.fleet.repository import DELEGATED, Draft, edit


def rotate(home: Home, role: str) -> dict[str, Any]:
    """Give a role a new key and sign everything that this changes; raises FleetError."""
    if role not in ROLES:
        raise FleetError(f"{role!r} is none of {', '.join(ROLES)}")
    old = home.signer(role)
    new = home.new_key(role)
    edit(home, lambda draft: _rotate(draft, role, old, new))
    return {"role": role, "old": old.public_key.keyid, "new": new.public_key.keyid}


def _rotate(draft: Draft, role: str, old: CryptoSigner, new: CryptoSigner) -> None:
    delegator = "targets" if role in DELEGATED else "root"
    delegating = draft.change(delegator)
    delegating.revoke_key(old.public_key.keyid, role)
    delegating.add_key(new.public_key, role)
    if role == "root":
        # A new root is vouched for by the old one's key and by its own (TUF 1.0, 5.3.4).
        draft.sign_with("root", [old, new])
    elif role not in {"snapshot", "timestamp"}:
        draft.change(role)
