"""What systemd is told."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

import pytest

from cloud_sync.notify import notify


@pytest.mark.parametrize("abstract", [False, True])
def test_a_message_reaches_systemds_socket_by_path_or_abstract_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool
) -> None:
    name = f"spillway-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind("\0" + name if abstract else name)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name if abstract else name)
        notify("READY=1\nSTATUS=online")
        assert systemd.recv(100) == b"READY=1\nSTATUS=online"


def test_without_systemd_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")


def test_a_socket_that_is_gone_is_logged_and_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    with caplog.at_level(logging.WARNING):
        notify("WATCHDOG=1")
    assert "WATCHDOG=1" in caplog.text
