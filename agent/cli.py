"""`spillway`: run the agent, check a configuration, ask a question."""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import sys
from pathlib import Path

from agent.config import DEFAULT_PATH, Config, StartError, check_enrolment, check_files, load_config
from agent.log import start_logging
from cloud_sync.strict_toml import ConfigError

MAX_PORT = 65535
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
    _ask_arguments(commands.add_parser("ask", help="ask a box a question over MQTT"))
    return parser


def _ask_arguments(ask: argparse.ArgumentParser) -> None:
    ask.add_argument("model", help="the model's name, without a version")
    ask.add_argument("question", help="a text, `@FILE` for a file's contents, or `-` for standard input")
    ask.add_argument("--device", default="", help="the box's name (default: from --config)")
    ask.add_argument("--config", type=Path, help=f"a box's configuration (default: {DEFAULT_PATH}, if it is there)")
    ask.add_argument("--host", default="", help="the broker (default: from --config, else 127.0.0.1)")
    ask.add_argument("--port", type=_port, default=0, help="its port (default: from --config, else 1883)")
    ask.add_argument("--username", default="", help="the broker's user, if it asks for one")
    ask.add_argument("--password-file", default="", help="a file with that user's password")
    ask.add_argument("--ca", default="", help="speak TLS; a PEM file of the authorities to trust")
    ask.add_argument("--client", default="", help="the client name to ask under (default: one made up)")
    ask.add_argument("--content-type", default="", help="what the question is (default: told by its bytes)")
    ask.add_argument("--deadline-ms", type=int, help="milliseconds the answer may take (default: the model's own)")
    ask.add_argument("--priority", type=int, choices=range(10), help="0, last, to 9, first (default: 5)")
    ask.add_argument("--local-only", action="store_true", help="the question must not leave the box")
    ask.add_argument("--stream", action="store_true", help="print the answer as it comes")
    ask.add_argument("--json", action="store_true", help="print the answer's JSON")
    ask.set_defaults(command=_ask)


def _port(text: str) -> int:
    port = int(text)
    if not 0 < port <= MAX_PORT:
        raise argparse.ArgumentTypeError(f"{port} is not from 1 to {MAX_PORT}")
    return port


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
    except StartError as error:
        print(f"spillway: {error}", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_OK


def _check(options: argparse.Namespace) -> int:
    config = load_config(options.config)
    check_files(config)
    check_enrolment(config)
    print(f"{options.config}: right, for device {config.device.name}")
    return EXIT_OK


def _ask(options: argparse.Namespace) -> int:
    from agent.asking import AskError, ask_for_people  # noqa: PLC0415 - `run` needs none of it

    try:
        return asyncio.run(ask_for_people(options, _config_if_there(options.config)))
    except (AskError, ConnectionError, TimeoutError, OSError) as error:
        print(f"spillway: {str(error) or 'no answer came'}", file=sys.stderr)
        return EXIT_FAILED


def _config_if_there(path: Path | None) -> Config | None:
    """Return the configuration that was named, or the box's own where there is one."""
    if path is None:
        return load_config(DEFAULT_PATH) if DEFAULT_PATH.exists() else None
    return load_config(path)


if __name__ == "__main__":
    sys.exit(main())
