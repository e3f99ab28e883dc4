"""`spillway-fleet refresh`: sign again before signatures run out; for a timer or a CI job."""

from __future__ import annotations

from typing import Any, Final

from cloud_sync.fleet.home import Home
from cloud_sync.fleet.repository import DELEGATED, Draft, edit

RENEW_BELOW: Final = 0.5
"""The share of a role's life below which it is signed again."""


def refresh(home: Home) -> dict[str, Any]:
    """Sign snapshot and timestamp anew, and each role with little life left whose key is at hand."""
    return edit(home, lambda draft: _refresh(home, draft))


def _refresh(home: Home, draft: Draft) -> dict[str, Any]:
    short = [role for role in ("root", "targets", *DELEGATED) if draft.remaining(role) < RENEW_BELOW]
    renewed = [role for role in short if home.has_key(role)]
    for role in renewed:
        draft.change(role)
    return {
        "renewed": ["snapshot", "timestamp", *renewed],
        "keys_missing": [role for role in short if role not in renewed],
    }
