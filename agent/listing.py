"""`spillway models`: what is on this box, by the running agent's word and by what lies on its disk."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from pathlib import Path
from typing import Any, Final

import msgspec

from agent.config import Config
from agent.exits import EXIT_FAILED, EXIT_OK, at_rest, config_if_there, config_option
from agent.machine import box_facts
from agent.opening import DEFAULT_STATE
from agent.shelf import Shelf, ShelfError, Stored, load_shelf
from agent.telling import table
from cloud_sync.link import Link
from cloud_sync.messages import Message
from cloud_sync.wire import Topics
from models.manifest import ManifestError, pick_variant

EXAMPLES: Final = """\
examples:
  sudo -u spillway spillway models
  spillway models --json | jq -r '.models[] | select(.state == "serving") | .name'

State is what the running agent tells over its broker (serving, starting, restarting, failed and why), else `stored`;
`previous` is kept to go back to, `staged` waits for its trial, `rejected` failed here and is not tried again.
"""
ASK_S: Final = 3.0
HEADS: Final = ("MODEL", "VERSION", "STATE", "TASK", "FORMAT", "VARIANT", "DISK MB", "MEMORY MB", "WHY")


class Line(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One version of one model; MiB, 0 where they are not known."""

    name: str
    version: str
    state: str
    digest: str = ""
    task: str = ""
    format: str = ""
    variant: str = ""
    disk_mb: float = 0.0
    memory_mb: float = 0.0
    target: str = ""
    code: str = ""
    message: str = ""
    notes: list[str] = []


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.add_argument("--json", action="store_true", help="print JSON")
    config_option(parser)


def run(options: argparse.Namespace) -> int:
    """Print the table; 1 where neither the agent nor its folder could be read."""
    config = config_if_there(options.config)
    told, silence = _ask_agent(config)
    state = Path(config.state.directory if config else DEFAULT_STATE)
    shelf, problem = _load(state)
    for words in filter(None, (silence, problem)):
        print(f"spillway: {words}", file=sys.stderr)
    if shelf is None and told is None:
        return EXIT_FAILED
    lines = lines_of(told, shelf or Shelf({}, {}, {}))
    if options.json:
        document = {"agent": told is not None, "models": lines}
        print(msgspec.json.encode(document).decode())
    elif lines:
        print(table(HEADS, [_cells(line) for line in lines]))
    else:
        print("no models yet: a deployment brings them, and `journalctl -u spillway` tells why one does not come")
    return EXIT_OK


def _load(state: Path) -> tuple[Shelf | None, str]:
    try:
        return load_shelf(state), ""
    except ShelfError as error:
        return None, str(error)


def _ask_agent(config: Config | None) -> tuple[dict[str, Any] | None, str]:
    """Return what the agent tells of its models, or None and why not."""
    if config is None:
        return None, "no configuration, so the running agent is not asked: --config names one"
    logging.getLogger("cloud_sync.link").setLevel(logging.CRITICAL)
    try:
        return asyncio.run(_retained(at_rest(config))), ""
    except (TimeoutError, OSError) as error:
        where = f"{config.local.host}:{config.local.port}"
        return None, f"the agent did not answer over {where} ({str(error) or 'nothing came'}); shown is its disk"


async def _retained(config: Config) -> dict[str, Any]:
    """Return the retained message `models`; raises TimeoutError, also where the agent says that it is offline."""
    async with asyncio.timeout(ASK_S):  # the link itself would go on trying
        _, writer = await asyncio.open_connection(config.local.host, config.local.port)
        writer.close()
    topics = Topics(config.device.prefix, config.device.name)
    heard: dict[str, asyncio.Future[bytes]] = {
        topic: asyncio.get_running_loop().create_future() for topic in (topics.status, topics.models)
    }

    def receive(message: Message) -> None:
        future = heard.get(message.topic)
        if future is not None and not future.done():
            future.set_result(message.payload)
        if message.qos:
            link.acknowledge(message)

    name = f"spillway-{config.device.name}-models"
    settings = msgspec.structs.replace(config.local, client_id=name, clean_start=True, session_expiry_s=0)
    link = Link(settings, on_message=receive)
    for topic in heard:
        link.subscribe(topic, 1)
    task = asyncio.ensure_future(link.run())
    try:
        async with asyncio.timeout(ASK_S):
            if await heard[topics.status] == b"offline":
                raise TimeoutError("the agent is offline")
            told: dict[str, Any] = msgspec.json.decode(await heard[topics.models])
            return told
    finally:
        await link.close()
        task.cancel()


def lines_of(told: dict[str, Any] | None, shelf: Shelf) -> list[Line]:
    """Return what to show of each version: what serves first, then what else lies on the disk. Pure."""
    lines: list[Line] = []
    shown: set[str] = set()
    for name in sorted({*(told or {}), *shelf.running}):
        line = _current(name, (told or {}).get(name), shelf)
        if line is not None:
            lines.append(line)
            shown.add(line.digest)
    previous = {one.previous_digest for one in shelf.running.values() if one.previous_digest}
    rest = sorted(shelf.stored.values(), key=lambda one: (one.manifest.name, one.manifest.version))
    lines += [_other(stored, shelf, previous) for stored in rest if stored.digest not in shown]
    return sorted(lines, key=lambda line: line.name)


def _current(name: str, report: dict[str, Any] | None, shelf: Shelf) -> Line | None:
    running = shelf.running.get(name)
    said = report or {}
    digest = str(said.get("digest") or (running.digest if running else ""))
    if not said and running is None:
        return None
    stored = shelf.stored.get(digest)
    return Line(
        name=name,
        version=str(said.get("version") or (running.version if running else "")),
        state=str(said.get("state", "stored" if stored else "missing")),
        digest=digest,
        memory_mb=float(said.get("memory_mb", 0.0)),
        target=str(said.get("target", "")),
        code=str(said.get("code", "")),
        message=str(said.get("message", "")),
        notes=[
            *(f"runs without {words}" for words in said.get("fallbacks", [])),
            *(f"not confined: {words}" for words in said.get("unprotected", [])),
        ],
        **_facts(stored),
    )


def _other(stored: Stored, shelf: Shelf, previous: set[str]) -> Line:
    failed = shelf.failed.get(stored.digest)
    state = "rejected" if failed else "previous" if stored.digest in previous else "staged"
    return Line(
        name=stored.manifest.name,
        version=stored.manifest.version,
        state=state,
        digest=stored.digest,
        code=failed.code if failed else "",
        message=failed.message if failed else "",
        **_facts(stored),
    )


def _facts(stored: Stored | None) -> dict[str, Any]:
    if stored is None:
        return {}
    manifest = stored.manifest
    try:
        variant = pick_variant(manifest, box_facts()).name
    except ManifestError:
        variant = "none fits"
    return {
        "task": manifest.task,
        "format": manifest.format,
        "variant": variant,
        "disk_mb": round(stored.files_mb, 3),
    }


def _cells(line: Line) -> list[str]:
    why = f"{line.target}: " if line.target else ""
    why += f"{line.code}: {line.message}" if line.code else line.message
    why = "; ".join(filter(None, (why, *line.notes)))
    memory = f"{line.memory_mb:.0f}" if line.memory_mb else "-"
    disk = f"{line.disk_mb:.1f}" if line.disk_mb else "-"
    return [
        line.name,
        line.version or "-",
        line.state,
        line.task or "-",
        line.format or "-",
        line.variant or "-",
        disk,
        memory,
        why,
    ]
