"""`spillway-fleet show`: what is published, what is deployed, and how long the signatures hold."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec

from cloud_sync.fleet.deploy import current_deployment
from cloud_sync.fleet.home import ROLES, Home
from cloud_sync.fleet.repository import load, time_text


def show(home: Home) -> dict[str, Any]:
    """Return the repository's verified state."""
    draft = load(home, home.open_objects(), now=datetime.now(UTC))
    groups = sorted(path.split("/")[1].removesuffix(".json") for path in draft.targets("deployments"))
    models = {
        f"{path.split('/')[1]}@{path.split('/')[2].removesuffix('.json')}": target.hashes["sha256"]
        for path, target in sorted(draft.targets("models").items())
        if not path.endswith(".sources.json")
    }
    return {
        "roles": {
            role: {"version": draft.signed(role).version, "expires": time_text(draft.signed(role).expires)}
            for role in ROLES
        },
        "models": models,
        "deployments": {group: msgspec.to_builtins(current_deployment(draft, group)) for group in groups},
    }
