"""The gateway's configuration, and what it opens."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import pytest

from cloud_sync.errors import HandoffError
from cloud_sync.gateway import cli
from cloud_sync.gateway.config import load_config
from cloud_sync.gateway.opener import Asker, Opener, Question, Refusal
from cloud_sync.strict_toml import ConfigError
from cloud_sync.wire import Topics
from tests.fakes.certificates import IDENT, ISSUED, NOW, TestCA, TestPool, sealed

CA = TestCA()
BOX = CA.identity("pi-7")
POOL = TestPool()
TOPIC = "spillway/handoff/default/assistant"

# Configuration.

GOOD = """
ca = "ca.pem"
[cloud]
host = "broker"
password_file = "secret"
[pools.default]
keys = ["$KEYS/a.key", "b.key"]
upstream = "http://127.0.0.1:8000/v1"
models = { assistant = "big" }
"""


def test_a_configuration_is_read_and_its_paths_count_from_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEYS", "/run/keys")
    (tmp_path / "gateway.toml").write_text(GOOD)
    settings = load_config(tmp_path / "gateway.toml")
    assert settings.ca == str(tmp_path / "ca.pem")
    assert settings.cloud.password_file == str(tmp_path / "secret")
    assert settings.cloud.ca == ""
    assert settings.pools["default"].keys == ["/run/keys/a.key", str(tmp_path / "b.key")]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('host = "broker"', 'hots = "broker"', ["cloud.hots", "broker", "host"]),
        ("keys =", "kees =", ["pools.default.kees", "keys"]),
        ('keys = ["$KEYS/a.key", "b.key"]', "keys = []", ["pools.default.keys", "length >= 1"]),
        ('keys = ["$KEYS/a.key", "b.key"]', "", ["pools.default.keys", "missing"]),
        ('host = "broker"', "port = '1883'", ["cloud.port", "1883", "int"]),
        ("[cloud]", "concurrency = 3\n[cloud]", ["concurrency", "3", "pools"]),
        ("http://127.0.0.1:8000/v1", "127.0.0.1:8000", ["upstream", "127.0.0.1:8000", "http://"]),
        ("[pools.default]", "[pools.Default]", ["pools.Default", "a-z"]),
        ("{ assistant =", '{ "a b" =', ["models.a b"]),
        ('ca = "ca.pem"', 'ca = "ca.pem"\nprefix = "a//b"', ["prefix", "a//b"]),
        ('ca = "ca.pem"', 'ca = "ca.pem"\nlog = "loud"', ["log", "loud"]),
        ('ca = "ca.pem"', "ca = [", ["TOML"]),
        ('ca = "ca.pem"', "", ["ca", "missing"]),
        ("upstream =", "concurrency = 0\nupstream =", ["concurrency", "0", ">= 1"]),
    ],
)
def test_a_wrong_key_is_named_with_its_value_and_what_is_right_and_the_exit_code_is_78(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, said: list[str]
) -> None:
    assert old in GOOD
    (tmp_path / "gateway.toml").write_text(GOOD.replace(old, new))
    assert cli.main(["--config", str(tmp_path / "gateway.toml")]) == 78
    printed = capsys.readouterr().err
    for word in said:
        assert word in printed


def test_a_configuration_without_its_files_is_wrong_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--config", str(tmp_path / "missing.toml")]) == 78
    (tmp_path / "gateway.toml").write_text(GOOD.replace('password_file = "secret"', ""))
    assert cli.main(["--config", str(tmp_path / "gateway.toml")]) == 78
    assert "ca.pem" in capsys.readouterr().err
    CA.save(tmp_path)
    assert cli.main(["--config", str(tmp_path / "gateway.toml")]) == 78
    assert "a.key" in capsys.readouterr().err


# Opener.


def opener() -> Opener:
    return Opener(Topics(), {"default": {"k1": POOL.private}}, CA.authority())


def refusal(payload: bytes, now: datetime = NOW) -> Refusal:
    opened = opener().open(TOPIC, payload, now)
    assert isinstance(opened, Refusal)
    return opened


def dropped(payload: bytes, topic: str = TOPIC) -> str:
    with pytest.raises(HandoffError) as caught:
        opener().open(topic, payload, NOW)
    return caught.value.code


def test_a_hand_off_of_a_known_box_becomes_a_question() -> None:
    opened = opener().open(TOPIC, sealed(BOX, POOL, b"a prompt", secret=bytes(32)), NOW)
    assert isinstance(opened, Question)
    assert opened.asker == Asker(id=IDENT, device="pi-7", secret=bytes(32))
    assert (opened.request.body, opened.request.dialect, opened.request.client) == (b"a prompt", "huggingface", "pi-7")
    assert opened.ttl_ms == 30_000


def test_a_box_with_an_ed25519_key_is_known_too() -> None:
    assert isinstance(opener().open(TOPIC, sealed(CA.identity("pi-7", ed=True), POOL), NOW), Question)


def test_d10_a_hand_off_under_an_unknown_key_is_dropped_for_nobody_could_read_the_answer() -> None:
    assert dropped(sealed(BOX, POOL, kid="k2")) == "unknown_key"
    assert dropped(sealed(BOX, TestPool(kid="k1"))) == "does_not_open"


def test_a_hand_off_on_another_topic_than_it_names_is_dropped() -> None:
    payload = sealed(BOX, POOL)
    for topic in ("spillway/handoff/default/other", "spillway/handoff/other/assistant", "spillway/pi-7/report"):
        assert dropped(payload, topic) == "bad_header"


def test_a_box_of_a_foreign_authority_is_forbidden() -> None:
    assert refusal(sealed(TestCA().identity("pi-7"), POOL)).code == "forbidden"


def test_a_box_that_speaks_for_another_is_forbidden() -> None:
    refused = refusal(sealed(BOX, POOL, device="pi-8"))
    assert (refused.code, refused.asker.device) == ("forbidden", "pi-8")


def test_a_certificate_that_was_copied_does_not_help_without_its_key() -> None:
    thief = CA.identity("pi-7")
    thief.certificate = BOX.certificate
    refused = refusal(sealed(thief, POOL))
    assert (refused.code, refused.message) == (
        "forbidden",
        "the box's hand-off was not signed with the certificate's key",
    )


def test_a_box_whose_certificate_is_over_is_told_so() -> None:
    payload = sealed(CA.identity("pi-7", days=10), POOL)
    assert isinstance(opener().open(TOPIC, payload, ISSUED + timedelta(days=9)), Question)
    assert refusal(payload, ISSUED + timedelta(days=11)).code == "forbidden"


def test_a_body_that_is_none_is_a_bad_request() -> None:
    refused = refusal(sealed(BOX, POOL, b"{]", content_type="application/json"))
    assert refused.code == "bad_request"
    assert refusal(sealed(BOX, POOL, b"")).code == "bad_request"


def test_a_sections_type_is_checked_too() -> None:
    from cloud_sync.gateway.config import GatewaySettings
    from cloud_sync.strict_toml import parse_toml

    for text, said in (("cloud = 3", "cloud"), ("pools = 3", "pools"), ("[pools]\ndefault = 3", "pools.default")):
        with pytest.raises(ConfigError, match=said):
            parse_toml(text, GatewaySettings)
