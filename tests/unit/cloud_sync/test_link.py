from __future__ import annotations

import pytest

from cloud_sync.link import _ceiling_s


@pytest.mark.parametrize(("failures", "ceiling_s"), [(0, 1), (1, 2), (3, 8), (6, 60), (1024, 60), (10**9, 60)])
def test_the_wait_before_another_connection_doubles_up_to_its_bound_however_long_the_broker_is_gone(
    failures: int, ceiling_s: float
) -> None:
    assert _ceiling_s(failures, 60.0) == ceiling_s
