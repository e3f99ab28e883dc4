"""`spillway ask`: the client for people."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from pathlib import Path

from agent.client import Answer, Client
from agent.config import Config
from agent.exits import EXIT_FAILED, config_if_there, config_option
from cloud_sync.messages import LinkSettings
from cloud_sync.wire import is_device
from models.manifest import is_name

EXAMPLES = """\
examples:
  spillway ask language 'Wo ist der Bahnhof?'
  spillway ask digits @three.png --device kitchen --host 192.168.1.20
  spillway ask assistant 'What does ls do?' --stream --deadline-ms 5000 --local-only
"""
MAX_PORT = 65535
SHOWN_FACTS = ("route", "reason", "model")
PRESENCE_S = 2.0
UNKNOWN_S = 10.0
GRACE_S = 5.0
DEFAULT_S = 120.0


class AskError(ValueError):
    """A question that cannot be asked; the message says what is missing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.add_argument("model", metavar="MODEL", help="the model's name, without a version")
    parser.add_argument(
        "question", metavar="QUESTION", help="a text, `@FILE` for a file's contents, or `-` for standard input"
    )
    parser.add_argument("--device", default="", help="the box's name (default: from --config)")
    config_option(parser)
    parser.add_argument("--host", default="", help="the broker (default: from --config, else 127.0.0.1)")
    parser.add_argument("--port", type=_port, default=0, help="its port (default: from --config, else 1883)")
    parser.add_argument("--username", default="", help="the broker's user, if it asks for one")
    parser.add_argument("--password-file", default="", help="a file with that user's password")
    parser.add_argument("--ca", default="", help="speak TLS; a PEM file of the authorities to trust")
    parser.add_argument("--client", default="", help="the client name to ask under (default: one made up)")
    parser.add_argument("--content-type", default="", help="what the question is (default: told by its bytes)")
    parser.add_argument("--deadline-ms", type=int, help="milliseconds the answer may take (default: the model's own)")
    parser.add_argument("--priority", type=int, choices=range(10), help="0, last, to 9, first (default: 5)")
    parser.add_argument("--local-only", action="store_true", help="the question must not leave the box")
    parser.add_argument("--stream", action="store_true", help="print the answer as it comes")
    parser.add_argument("--json", action="store_true", help="print the answer's JSON")


def _port(text: str) -> int:
    port = int(text)
    if not 0 < port <= MAX_PORT:
        raise argparse.ArgumentTypeError(f"{port} is not from 1 to {MAX_PORT}")
    return port


def run(options: argparse.Namespace) -> int:
    """Ask; 1 for an error, or where nobody answers."""
    try:
        return asyncio.run(ask_for_people(options, config_if_there(options.config)))
    except (AskError, ConnectionError, TimeoutError, OSError) as error:
        print(f"spillway: {str(error) or 'no answer came'}", file=sys.stderr)
        return EXIT_FAILED


async def ask_for_people(options: argparse.Namespace, config: Config | None) -> int:
    """Ask, print the answer on standard output and where it came from on standard error; 1 for an error."""
    device = options.device or (config.device.name if config else "")
    if not device:
        raise AskError("which box? name it with --device, or its configuration with --config")
    if not is_device(device):
        raise AskError(f"{device!r} cannot name a box")
    if not is_name(options.model):
        plain = options.model.partition("@")[0].lower()
        hint = f"; name it without its version: {plain}" if "@" in options.model else ""
        raise AskError(f"{options.model!r} cannot name a model{hint}")
    if options.client and not is_name(options.client):
        raise AskError(f"{options.client!r} cannot name a client: use a-z, 0-9, `.`, `_`, `-`")
    body, content_type = _question(options.question)
    logging.getLogger("cloud_sync.link").setLevel(logging.CRITICAL)  # what a person needs to know is said below
    async with Client(
        device,
        _settings(options, config),
        name=options.client,
        prefix=config.device.prefix if config else "spillway",
    ) as client:
        answer: Answer | None = None
        timeout_s = await _patience_s(client, device, options)
        content_type = options.content_type or content_type
        replies = client.replies(options.model, body, content_type, _wishes(options), timeout_s=timeout_s)
        async for answer in replies:
            _show(answer, options)
    if answer is None:
        return 1
    told = ", ".join(f"{name} {answer.facts[name]}" for name in SHOWN_FACTS if name in answer.facts)
    print(f"[{told}]" if told else "", file=sys.stderr)
    return 1 if answer.failed else 0


async def _patience_s(client: Client, device: str, options: argparse.Namespace) -> float:
    """Return how long to wait: the deadline and a little; not long where nothing is known of the box."""
    state = await client.presence(PRESENCE_S)
    if state not in {"online", "draining"}:
        print(f"spillway: box {device!r} is {state or 'not known'} at this broker; waiting", file=sys.stderr)
        return UNKNOWN_S
    return options.deadline_ms / 1e3 + GRACE_S if options.deadline_ms else DEFAULT_S


def _settings(options: argparse.Namespace, config: Config | None) -> LinkSettings:
    known = config.local if config else LinkSettings()
    return LinkSettings(
        host=options.host or known.host,
        port=options.port or known.port,
        username=options.username,
        password_file=options.password_file,
        ca=options.ca or known.ca,
    )


def _question(text: str) -> tuple[bytes, str]:
    if text == "-":
        return sys.stdin.buffer.read(), ""
    if text.startswith("@"):
        return Path(text[1:]).read_bytes(), ""
    return text.encode(), "application/json" if text.lstrip().startswith("{") else "text/plain"


def _wishes(options: argparse.Namespace) -> dict[str, str]:
    wishes: dict[str, str] = {}
    if options.deadline_ms is not None:
        wishes["deadline-ms"] = str(options.deadline_ms)
    if options.priority is not None:
        wishes["priority"] = str(options.priority)
    if options.local_only:
        wishes["privacy"] = "local-only"
    if options.stream:
        wishes["stream"] = "true"
    return wishes


def _show(answer: Answer, options: argparse.Namespace) -> None:
    if options.json:
        print(answer.body.decode())
    elif answer.failed:
        print(answer.text, file=sys.stderr)
    else:
        print(answer.text, end="\n" if answer.final else "", flush=True)
