from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from cloud_sync.link import _ceiling_s, _packed, _unpacked
from cloud_sync.messages import Details

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
details = st.builds(
    Details,
    response_topic=st.none() | texts.filter(lambda text: text != "" and not set(text) & set("+#")),
    correlation=st.none() | st.binary(max_size=300),
    content_type=st.none() | texts,
    expiry_s=st.none() | st.integers(0, 2**32 - 1),
    user=st.lists(st.tuples(texts, texts), max_size=4).map(tuple),
)


@given(details)
def test_what_is_packed_comes_out_as_it_went_in(sent: Details) -> None:
    packed = _packed(sent).pack()
    received = Properties(PacketTypes.PUBLISH)
    received.unpack(packed)
    assert _unpacked(received) == sent


def test_a_message_without_properties_has_no_details() -> None:
    assert _unpacked(None) == Details()
    assert _unpacked(Properties(PacketTypes.PUBLISH)) == Details()


@pytest.mark.parametrize(("failures", "ceiling_s"), [(0, 1), (1, 2), (3, 8), (6, 60), (1024, 60), (10**9, 60)])
def test_the_wait_before_another_connection_doubles_up_to_its_bound_however_long_the_broker_is_gone(
    failures: int, ceiling_s: float
) -> None:
    assert _ceiling_s(failures, 60.0) == ceiling_s
