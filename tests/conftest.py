"""Fixtures that more than one test module uses: a fleet's repository, made once a run."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.support.fleet import Fleet, sample_fleet

QUIETED = ("agent", "agent.workers", "cloud_sync.link")


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    """Return a fleet that runs version 1 of the small example models; do not change what it deploys."""
    return sample_fleet(tmp_path_factory.mktemp("fleet"))


@pytest.fixture(autouse=True)
def _loud() -> Iterator[None]:
    """Give loggers their levels back: a command quiets some, in a process that is its own."""
    before = {name: logging.getLogger(name).level for name in QUIETED}
    yield
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)
