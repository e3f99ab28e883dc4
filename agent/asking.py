"""`spillway ask`: the client for people."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from agent.client import Answer, Client
from agent.config import Config
from cloud_sync.messages import LinkSettings

SHOWN_FACTS = ("route", "reason", "model")


class AskError(ValueError):
    """A question that cannot be asked; the message says what is missing."""


async def ask_for_people(options: argparse.Namespace, config: Config | None) -> int:
    """Ask, print the answer on standard output and where it came from on standard error; 1 for an error."""
    device = options.device or (config.device.name if config else "")
    if not device:
        raise AskError("which box? name it with --device, or its configuration with --config")
    body, content_type = _question(options.question)
    async with Client(
        device,
        _settings(options, config),
        name=options.client,
        prefix=config.device.prefix if config else "spillway",
    ) as client:
        answer: Answer | None = None
        async for answer in client.replies(options.model, body, options.content_type or content_type, _wishes(options)):
            _show(answer, options)
    if answer is None:
        return 1
    told = ", ".join(f"{name} {answer.facts[name]}" for name in SHOWN_FACTS if name in answer.facts)
    print(f"[{told}]" if told else "", file=sys.stderr)
    return 1 if answer.failed else 0


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
    if options.deadline_ms:
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
