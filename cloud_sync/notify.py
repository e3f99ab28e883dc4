"""What systemd is told of a service's life (sd_notify)."""

from __future__ import annotations

import logging
import os
import socket

log = logging.getLogger(__name__)


def notify(message: str) -> None:
    """Tell systemd `READY=1`, `STATUS=...`, `WATCHDOG=1` or `STOPPING=1`; nothing where it does not listen."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as sender:
            sender.sendto(message.encode(), address)
    except OSError as error:
        log.warning("systemd could not be told %s: %s", message.partition("\n")[0], error)
