"""`spillway-gateway`: answers in the cloud what boxes hand off."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from cloud_sync.gateway.config import load_config
from cloud_sync.gateway.daemon import serve
from cloud_sync.strict_toml import ConfigError

EXIT_BAD_CONFIG = 78


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a gateway; return 0 after a clean stop, 78 where the configuration is wrong."""
    parser = argparse.ArgumentParser(prog="spillway-gateway", description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("/etc/spillway/gateway.toml"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        settings = load_config(options.config)
        _log_to_stderr(settings.log)
        asyncio.run(serve(settings))
    except ConfigError as error:
        print(f"spillway-gateway: {error}", file=sys.stderr)
        return EXIT_BAD_CONFIG
    return 0


def _log_to_stderr(level: str) -> None:
    logging.basicConfig(level=level.upper(), format="%(levelname)s %(name)s: %(message)s")
    for name in ("httpx", "httpcore"):  # they log every request at `info`
        logging.getLogger(name).setLevel(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
