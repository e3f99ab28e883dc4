"""`spillway`: one command a module; a command imports only what it needs."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import sys
from typing import Any, Final

from agent.exits import EXIT_CONFIG, EXIT_FAILED
from cloud_sync.strict_toml import ConfigError

COMMANDS: Final = {
    "run": ("agent.running", "run the agent until SIGTERM or SIGINT"),
    "check": ("agent.checking", "check a configuration and say what is wrong"),
    "ask": ("agent.asking", "ask a box a question over MQTT"),
    "infer": ("agent.infer", "ask a model here and now, without a broker"),
    "models": ("agent.listing", "list the models on this box"),
    "bench": ("agent.measuring", "measure a model on this board"),
    "doctor": ("agent.doctor", "find what is wrong or missing on this box, and what to type"),
}
"""Each module has `add_arguments(parser)` and `run(options)`, which returns the exit code, and may have `EXAMPLES`."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    options = _parser(given).parse_args(given)
    try:
        return int(_module(options.name).run(options))
    except ConfigError as error:
        print(f"spillway: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except KeyboardInterrupt:
        return EXIT_FAILED
    except BrokenPipeError:  # whoever read the output has seen enough
        sys.stderr.close()
        return EXIT_FAILED


def _parser(given: list[str]) -> argparse.ArgumentParser:
    """Return the parser, with the arguments of the command that is asked for."""
    parser = argparse.ArgumentParser(
        prog="spillway", description="Answers AI requests on this box, or hands them to the cloud."
    )
    parser.add_argument("--version", action="version", version=importlib.metadata.version("spillway-edge"))
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="name")
    for name, (_, words) in COMMANDS.items():
        said = f"{words[0].upper()}{words[1:]}."
        style = argparse.RawTextHelpFormatter
        command = commands.add_parser(name, help=words, description=said, formatter_class=style)
        if name in given:
            module = _module(name)
            command.epilog = getattr(module, "EXAMPLES", None)
            module.add_arguments(command)
    return parser


def _module(name: str) -> Any:
    return importlib.import_module(COMMANDS[name][0])


if __name__ == "__main__":
    sys.exit(main())
