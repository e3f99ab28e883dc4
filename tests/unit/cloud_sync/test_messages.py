"""Which texts a broker takes."""

from __future__ import annotations

import pytest

from cloud_sync.messages import is_text

NONCHARACTERS = [*range(0xFDD0, 0xFDF0), *(plane << 16 | low for plane in range(17) for low in (0xFFFE, 0xFFFF))]


@pytest.mark.parametrize("code", [*range(0x20), *range(0x7F, 0xA0), 0xD800, 0xDFFF, *NONCHARACTERS])
def test_c18_a_character_over_which_brokers_close_the_connection_is_refused(code: int) -> None:
    assert not is_text(f"a{chr(code)}b")


@pytest.mark.parametrize("code", [0x20, 0x7E, 0xA0, 0xE9, 0xD7FF, 0xE000, 0xFDCF, 0xFDF0, 0xFFFD, 0x1F600, 0x10FFFD])
def test_every_other_character_is_taken(code: int) -> None:
    assert is_text(f"a{chr(code)}b")


def test_a_text_over_65535_bytes_is_refused() -> None:
    assert is_text("é" * 32_767)
    assert not is_text("é" * 32_768)
