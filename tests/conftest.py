"""Fixtures that more than one test module uses: a fleet's repository, made once a run."""

from __future__ import annotations

import pytest

from tests.support.fleet import Fleet, sample_fleet


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    """Return a fleet that runs version 1 of the small example models; do not change what it deploys."""
    return sample_fleet(tmp_path_factory.mktemp("fleet"))
