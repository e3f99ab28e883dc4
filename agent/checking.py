"""`spillway check`: is this configuration right."""

from __future__ import annotations

import argparse
from pathlib import Path

from agent.config import DEFAULT_PATH, check_enrolment, check_files, load_config
from agent.exits import EXIT_OK


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.add_argument("--config", type=Path, default=DEFAULT_PATH, help=f"default: {DEFAULT_PATH}")


def run(options: argparse.Namespace) -> int:
    """Say that a configuration is right; raises ConfigError where it is not."""
    config = load_config(options.config)
    check_files(config)
    check_enrolment(config)
    print(f"{options.config}: right, for device {config.device.name}")
    return EXIT_OK
