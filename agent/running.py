"""`spillway run`: the agent, until a signal ends it."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from agent.config import DEFAULT_PATH, StartError, check_files, load_config
from agent.daemon import AlreadyRunningError, run_daemon
from agent.exits import EXIT_FAILED, EXIT_LOCKED, EXIT_OK
from agent.log import start_logging


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.add_argument("--config", type=Path, default=DEFAULT_PATH, help=f"default: {DEFAULT_PATH}")


def run(options: argparse.Namespace) -> int:
    """Run the agent; raises ConfigError."""
    config = load_config(options.config)
    check_files(config)
    start_logging(config.log.level)
    try:
        asyncio.run(run_daemon(config))
    except AlreadyRunningError as error:
        print(f"spillway: {error}", file=sys.stderr)
        return EXIT_LOCKED
    except StartError as error:
        print(f"spillway: {error}", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_OK
