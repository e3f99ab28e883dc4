"""What the box says of itself: ready or not, and why. Pure: no I/O, no clock."""

from __future__ import annotations

from typing import TypedDict


class Summary(TypedDict):
    """What `/readyz` and the retained health message show."""

    ready: bool
    state: str
    local: bool
    cloud: bool
    models: dict[str, str]


class Health:
    """Facts that the daemon's parts report, put together for those who look."""

    def __init__(self) -> None:
        self.state = "starting"
        self.local_up = False
        self.cloud_up = False
        self.models: dict[str, str] = {}

    def summary(self) -> Summary:
        """Return the whole picture; a box without a network or with a model still loading is ready all the same."""
        return Summary(
            ready=self.state == "online",
            state=self.state,
            local=self.local_up,
            cloud=self.cloud_up,
            models=dict(self.models),
        )

    def status_line(self) -> str:
        """Return one line for `systemctl status`."""
        serving = sum(state == "serving" for state in self.models.values())
        links = f"local link {'up' if self.local_up else 'down'}, cloud link {'up' if self.cloud_up else 'down'}"
        return f"{self.state}: {serving} of {len(self.models)} models serving, {links}"
