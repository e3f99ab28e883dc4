"""`spillway`: run the agent, check a configuration, ask a question."""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import sys
from pathlib import Path

from agent.config import DEFAULT_PATH, Config, check_files, load_config
from agent.log import start_logging
from cloud_sync.strict_toml import ConfigError

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_LOCKED = 75
EXIT_CONFIG = 78
"""One table of exit codes (systemd/README.md); 78 is not restarted."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except ConfigError as error:
        print(f"spillway: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except KeyboardInterrupt:
        return EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spillway", description="Answers AI requests on this box, or hands them to the cloud."
    )
    parser.add_argument("--version", action="version", version=importlib.metadata.version("spillway-edge"))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run the agent until SIGTERM or SIGINT")
    check = commands.add_parser("check", help="check a configuration and say what is wrong")
    for command, function in ((run, _run), (check, _check)):
        command.add_argument("--config", type=Path, default=DEFAULT_PATH, help=f"default: {DEFAULT_PATH}")
        command.set_defaults(command=function)
    ask = commands.add_parser("ask", help="ask a box a question over MQTT")
    ask.add_argument("model")
    ask.add_argument("question", help="a text, `@FILE` for a file's contents, or `-` for standard input")
    ask.add_argument("--device", default="", help="the box's name (default: from --config)")
    ask.add_argument(
        "--config", type=Path, default=DEFAULT_PATH, help="read device and broker from a box's configuration"
    )
    ask.add_argument("--host", default="", help="the broker (default: from --config, else 127.0.0.1)")
    ask.add_argument("--port", type=int, default=0)
    ask.add_argument("--username", default="")
    ask.add_argument("--password-file", default="")
    ask.add_argument("--ca", default="")
    ask.add_argument("--client", default="", help="the client name to ask under")
    ask.add_argument("--content-type", default="")
    ask.add_argument("--deadline-ms", type=int, default=0)
    ask.add_argument("--priority", type=int, choices=range(10), default=None)
    ask.add_argument("--local-only", action="store_true", help="the question must not leave the box")
    ask.add_argument("--stream", action="store_true", help="print the answer as it comes")
    ask.add_argument("--json", action="store_true", help="print the answer's JSON")
    ask.set_defaults(command=_ask)
    return parser


def _run(options: argparse.Namespace) -> int:
    config = load_config(options.config)
    check_files(config)
    start_logging(config.log.level)
    from agent.daemon import AlreadyRunningError, run_daemon  # noqa: PLC0415 - `ask` and `check` need none of it

    try:
        asyncio.run(run_daemon(config))
    except AlreadyRunningError as error:
        print(f"spillway: {error}", file=sys.stderr)
        return EXIT_LOCKED
    return EXIT_OK


def _check(options: argparse.Namespace) -> int:
    config = load_config(options.config)
    check_files(config)
    print(f"{options.config}: right, for device {config.device.name}")
    return EXIT_OK


def _ask(options: argparse.Namespace) -> int:
    from agent.asking import AskError, ask_for_people  # noqa: PLC0415 - `run` needs none of it

    try:
        return asyncio.run(ask_for_people(options, _config_if_there(options.config)))
    except (AskError, ConnectionError, TimeoutError, OSError) as error:
        print(f"spillway: {str(error) or 'no answer came'}", file=sys.stderr)
        return EXIT_FAILED


def _config_if_there(path: Path) -> Config | None:
    return load_config(path) if path.exists() else None


if __name__ == "__main__":
    sys.exit(main())
