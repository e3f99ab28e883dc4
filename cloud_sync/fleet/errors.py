"""What goes wrong at the admin's, told in one line."""

from __future__ import annotations


class FleetError(Exception):
    """A command that cannot do what was asked; the message is for the admin."""
