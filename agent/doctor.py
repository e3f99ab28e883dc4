"""`spillway doctor`: what is wrong or missing on this box, why it matters, and what to type."""

from __future__ import annotations

import argparse
import asyncio
import logging
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from agent import findings, probes
from agent.config import DEFAULT_PATH, Config, check_enrolment, load_config
from agent.exits import EXIT_FAILED, EXIT_OK, at_rest, resting
from agent.findings import Finding
from agent.opening import DEFAULT_STATE
from agent.shelf import Shelf, ShelfError, load_shelf
from cloud_sync.strict_toml import ConfigError
from models.backend_settings import BackendSettings

EXAMPLES: Final = """\
examples:
  sudo spillway doctor
  sudo spillway doctor --json | jq '.findings[] | select(.level != "ok")'

It changes nothing. As root it sees most; it never prints a password or a key. The exit code is 1 where there is a
fault, else 0.
"""
SIGNS: Final = {"ok": "ok     ", "warning": "warning", "fault": "FAULT  "}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.add_argument("--config", type=Path, default=DEFAULT_PATH, help=f"default: {DEFAULT_PATH}")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Look, print, and return 1 where there is a fault."""
    logging.getLogger("cloud_sync.link").setLevel(logging.CRITICAL)
    found = asyncio.run(examine(options.config))
    faults = sum(one.level == "fault" for one in found)
    if options.json:
        print(msgspec.json.encode({"faults": faults, "findings": found}).decode())
    else:
        print(render(found))
    return EXIT_FAILED if faults else EXIT_OK


async def examine(path: Path) -> list[Finding]:
    """Return everything that was found; what needs the configuration is left out where there is none."""
    config, found = _configuration(path)
    state = Path(config.state.directory if config else DEFAULT_STATE)
    shelf = await asyncio.to_thread(_shelf, state)
    machine, runtimes, sandbox, unit = await asyncio.gather(
        probes.machine(), probes.runtimes(), probes.sandbox(), probes.unit()
    )
    found += findings.of_machine(machine)
    found += findings.of_signed_time(await asyncio.to_thread(probes.signed_at, state), machine.now_s)
    formats = {stored.manifest.format for stored in shelf.stored.values()}
    found += findings.of_runtimes(runtimes, writes_text="genai" in formats)
    backends = config.backends if config else BackendSettings()
    loaded = await probes.libraries([delegate.library for delegate in backends.tflite.delegates])
    found += findings.of_accelerators(machine, backends, runtimes["onnxruntime"], loaded)
    found += findings.of_sandbox(sandbox)
    found += findings.of_state(await asyncio.to_thread(probes.folder, state))
    if config is not None:
        found += await _of_config(config, machine.now_s)
    found += findings.of_unit(unit)
    found += findings.of_failures(_failures(shelf))
    return found


def _configuration(path: Path) -> tuple[Config | None, list[Finding]]:
    try:
        config = load_config(path)
    except ConfigError as error:
        mend = f"spillway check --config {path}   # until it is right; examples/config/spillway.toml shows every key"
        why = "the agent does not start; what depends on it was not looked at"
        return None, [Finding("fault", "configuration", str(error), why, mend)]
    found = [findings.ok("configuration", f"{path}, for device {config.device.name}")]
    try:
        check_enrolment(config)
        found.append(findings.ok("repository", config.repository.url))
    except ConfigError as error:
        why = "no version can be fetched"
        mend = f"spillway-fleet enrol {config.device.name} --out {config.device.name}   # carry its root.json over"
        found.append(Finding("fault", "repository", str(error), why, mend))
    return config, found


async def _of_config(config: Config, now_s: float) -> list[Finding]:
    """Return what is found of keys and brokers."""
    found = list(findings.of_keys(await asyncio.to_thread(lambda: dict(_modes(config)))))
    readable = at_rest(config)
    if readable.device.certificate and readable.device.key:
        found += findings.of_identity(await probes.identity(readable), config.device.name, now_s)
    name = f"spillway-{config.device.name}-doctor"
    found += findings.of_broker("local", config, await probes.broker(readable.local, name))
    if readable.cloud is not None:
        found += findings.of_broker("cloud", config, await probes.broker(readable.cloud, name))
    return found


def _modes(config: Config) -> Iterator[tuple[str, int | str]]:
    """Yield each file that holds a secret with its mode, or why there is none."""
    named = {config.device.key, config.http.token_file if config.http.port else "", config.repository.credentials}
    for link in filter(None, (config.local, config.cloud)):
        named |= {link.password_file, link.key}
    for path in sorted(map(resting, filter(None, named))):
        try:
            yield path, stat.S_IMODE(Path(path).stat().st_mode)
        except OSError as error:
            yield path, str(error.strerror)


def _shelf(state: Path) -> Shelf:
    try:
        return load_shelf(state)
    except ShelfError:
        return Shelf({}, {}, {})  # what is wrong with the folder is found by itself


def _failures(shelf: Shelf) -> list[tuple[str, str, str]]:
    """Return the versions on the disk that failed: label, code, message."""
    return [
        (f"{stored.manifest.name}@{stored.manifest.version}", failed.code, failed.message)
        for digest, failed in shelf.failed.items()
        if (stored := shelf.stored.get(digest)) is not None
    ]


def render(found: list[Finding]) -> str:
    """Return the findings for people, and a sum. Pure."""
    lines: list[str] = []
    for one in found:
        lines.append(f"{SIGNS[one.level]} {one.what}: {one.told}")
        if one.why:
            lines.append(f"        {one.why}")
        if one.mend:
            lines.append(f"        > {one.mend}")
    faults = sum(one.level == "fault" for one in found)
    warnings = sum(one.level == "warning" for one in found)
    return "\n".join([*lines, "", f"{faults} faults, {warnings} warnings"])
