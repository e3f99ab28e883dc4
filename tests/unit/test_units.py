"""The systemd units: what they promise (DESIGN 6, F1), read as text and by systemd's own offline tools where it is."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from agent.config import Limits

FOLDER = Path(__file__).resolve().parents[2] / "systemd"
UNITS = ["spillway.service", "spillway-gateway.service"]
MAX_EXPOSURE = 1.5
SHARED_BY_BOTH = {
    "NoNewPrivileges": "yes",
    "ProtectSystem": "strict",
    "MemoryDenyWriteExecute": "yes",
    "RestrictNamespaces": "yes",
    "CapabilityBoundingSet": "",
    "RestartPreventExitStatus": "78",
    "Restart": "always",
    "LimitCORE": "0",
    "UMask": "0077",
}


def settings(unit: str) -> dict[str, list[str]]:
    """Every key of a unit with its values in order; keys may repeat."""
    found: dict[str, list[str]] = {}
    for line in (FOLDER / unit).read_text("utf-8").splitlines():
        if line and not line.startswith(("#", "[")):
            key, separator, value = line.partition("=")
            assert separator, line
            found.setdefault(key, []).append(value)
    return found


def systemd_analyze(folder: Path, unit: str, *arguments: str) -> str:
    """What systemd-analyze says of a unit whose program is one that is here; "" where there is no systemd."""
    program = shutil.which("systemd-analyze")
    if program is None:
        return ""
    copy = folder / unit
    copy.write_text(re.sub(r"/opt/spillway/bin/\S+", "/bin/true", (FOLDER / unit).read_text("utf-8")), "utf-8")
    done = subprocess.run([program, *arguments, str(copy)], capture_output=True, text=True, check=False, timeout=60)
    return done.stdout + done.stderr


@pytest.mark.parametrize("unit", UNITS)
def test_f1_systemd_has_nothing_to_say_about_a_unit(unit: str, tmp_path: Path) -> None:
    assert systemd_analyze(tmp_path, unit, "verify", "--man=no") == ""


@pytest.mark.parametrize("unit", UNITS)
def test_f1_exposure_is_at_most_one_and_a_half(unit: str, tmp_path: Path) -> None:
    said = systemd_analyze(tmp_path, unit, "security", "--offline=true", "--no-pager")
    exposure = re.search(r"exposure level for \S+: ([0-9.]+)", said)
    assert not said or (exposure is not None and float(exposure[1]) <= MAX_EXPOSURE), said


@pytest.mark.parametrize("unit", UNITS)
def test_f1_a_unit_is_hardened_and_is_not_restarted_for_a_wrong_configuration(unit: str) -> None:
    found = settings(unit)
    assert {key: found[key][-1] for key in SHARED_BY_BOTH} == SHARED_BY_BOTH
    assert "PYTHONSAFEPATH=1" in found["Environment"][0]


def test_the_agent_is_watched_and_keeps_its_state_for_itself() -> None:
    found = settings("spillway.service")
    assert found["Type"] == ["notify"]
    assert float(found["WatchdogSec"][0]) > 0
    assert found["StateDirectory"] == ["spillway"]
    assert found["StateDirectoryMode"] == ["0700"]
    assert found["ExecStart"] == ["/opt/spillway/bin/spillway run --config /etc/spillway/spillway.toml"]


def test_stopping_is_given_longer_than_draining_takes() -> None:
    assert float(settings("spillway.service")["TimeoutStopSec"][0]) > Limits().drain_timeout_s


def test_a_worker_that_runs_out_of_memory_does_not_take_the_agent_with_it() -> None:
    assert settings("spillway.service")["OOMPolicy"] == ["continue"]


def test_f3_keys_reach_the_services_as_credentials_from_a_folder_of_root_alone() -> None:
    folders = {
        line.split()[1]: line.split()[2]
        for line in (FOLDER / "tmpfiles.conf").read_text("utf-8").splitlines()
        if line.startswith("d ")
    }
    for unit in UNITS:
        (credential,) = settings(unit)["LoadCredential"]
        name, _, folder = credential.partition(":")
        assert name == "keys"
        assert folders[folder] == "0700"
