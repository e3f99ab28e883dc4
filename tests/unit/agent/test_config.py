from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.config import Config, ModelPolicy, check_files, load_config, parse_config
from cloud_sync.strict_toml import ConfigError

LEAST = """
[device]
name = "kitchen"
[local]
port = 1883
[repository]
url = "file:///srv/models"
"""

WITH_CLOUD = """
[device]
name = "kitchen"
certificate = "/etc/spillway/device.pem"
key = "/etc/spillway/device.key"
[local]
[cloud]
host = "cloud.example"
[repository]
url = "s3://fleet"
"""


def refusal(raw: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    return str(caught.value)


def test_the_least_configuration_names_a_device_a_broker_and_a_repository() -> None:
    config = parse_config(LEAST)
    assert config.device.name == "kitchen"
    assert config.local.port == 1883
    assert config.cloud is None
    assert config.http.port == 0


def test_every_section_can_be_said() -> None:
    config = parse_config(
        WITH_CLOUD
        + """
        [state]
        directory = "/srv/state"
        [http]
        port = 8080
        [limits]
        max_requests = 10
        [log]
        level = "debug"
        [models.assistant]
        pool = "gpu"
        deadline_ms = 500
        """
    )
    assert isinstance(config, Config)
    assert config.models == {"assistant": ModelPolicy(pool="gpu", deadline_ms=500)}
    assert config.cloud is not None
    assert config.cloud.host == "cloud.example"
    assert config.limits.max_requests == 10


@pytest.mark.parametrize(
    ("addition", "key", "value", "right"),
    [
        ('[devise]\nname = "x"', "devise", "{'name': 'x'}", "device"),
        ('[state]\nfolder = "/x"', "state.folder", "'/x'", "directory"),
        ("[http]\nprot = 80", "http.prot", "80", "port"),
        ("[limits]\nmax_request = 7", "limits.max_request", "7", "max_requests"),
        ("[models.digits]\ndeadline = 9", "models.digits.deadline", "9", "deadline_ms"),
        ('[log]\nverbosity = "all"', "log.verbosity", "'all'", "level"),
        ('[cloud]\nhostname = "c"', "cloud.hostname", "'c'", "host"),
    ],
)
def test_an_unknown_key_is_named_with_its_value_and_the_keys_that_are_right(
    addition: str, key: str, value: str, right: str
) -> None:
    message = refusal(LEAST + addition)
    assert f"`{key}`" in message
    assert value in message
    assert right in message


def test_f3_the_value_of_an_unknown_key_that_may_be_a_secret_is_not_shown() -> None:
    message = refusal(LEAST.replace("port = 1883", 'password = "hunter2"'))
    assert "`local.password`" in message
    assert "hunter2" not in message
    assert "password_file" in message


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (LEAST.replace("1883", '"1883"'), "local.port"),
        (LEAST + "[limits]\nmax_requests = 1.5", "limits.max_requests"),
        (LEAST + '[log]\nlevel = "loud"', "log.level"),
        (LEAST + "[models]\ndigits = 3", "models"),
        (LEAST.replace('"kitchen"', "5"), "device.name"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_by_its_key(raw: str, named: str) -> None:
    message = refusal(raw)
    assert f"`{named}" in message
    assert "$" not in message


def test_the_wrong_value_itself_is_shown() -> None:
    assert "'loud'" in refusal(LEAST + '[log]\nlevel = "loud"')


@pytest.mark.parametrize("section", ["device", "local", "repository"])
def test_a_missing_section_is_named(section: str) -> None:
    lines = LEAST.split("[")
    raw = "[".join(part for part in lines if not part.startswith(section))
    assert f"`{section}`" in refusal(raw)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (LEAST.replace("kitchen", "Kitchen"), ["device.name", "'Kitchen'", "a-z"]),
        (LEAST.replace("kitchen", "handoff"), ["device.name", "'handoff'"]),
        (LEAST.replace("kitchen", "fleet"), ["device.name", "'fleet'"]),
        (LEAST.replace('name = "kitchen"', 'name = "kitchen"\ngroups = ["A B"]'), ["device.groups", "'A B'"]),
        (LEAST.replace('name = "kitchen"', 'name = "kitchen"\nprefix = "a/+"'), ["device.prefix", "'a/+'"]),
        (LEAST.replace('name = "kitchen"', 'name = "kitchen"\nprefix = ""'), ["device.prefix"]),
        (LEAST.replace("file:///srv", "https://srv"), ["repository.url", "file://", "s3://"]),
        (LEAST + '[models."Bad Name"]\ndeadline_ms = 5', ["models", "'Bad Name'"]),
        (LEAST + '[http]\nport = 80\nhost = "0.0.0.0"', ["http.host", "http.token_file"]),
        (LEAST + '[models.m]\npool = "gpu"', ["models.m.pool", "'gpu'", "cloud"]),
        (WITH_CLOUD + '[models.m]\npool = "gpu"\nlocal_only = true', ["models.m", "pool", "local_only"]),
        (LEAST + "[models.m]\ndeadline_ms = 0", ["models.m.deadline_ms", "0"]),
        (LEAST + "[models.m]\nmax_queue = -1", ["models.m.max_queue", "-1"]),
        (LEAST + '[cloud]\nhost = "c"', ["cloud", "device.certificate", "device.key"]),
        (LEAST.replace("port = 1883", 'certificate = "/c"'), ["local.certificate", "local.key"]),
        (LEAST.replace("port = 1883", "port = 70000"), ["local.port", "70000"]),
        (LEAST + "[http]\nport = -1", ["http.port", "-1"]),
        (LEAST + "[limits]\nmax_requests = 0", ["limits.max_requests", "0"]),
        (LEAST + "[limits]\nmax_body_bytes = -5", ["limits.max_body_bytes", "-5"]),
        (LEAST + "[limits]\ndrain_timeout_s = nan", ["limits.drain_timeout_s", "nan"]),
        (LEAST + "[limits]\nmax_body_bytes = 67108864", ["limits.max_body_bytes", "67108864", "62914560"]),
        (LEAST + "[limits]\nmax_body_bytes = 33554432", ["limits.max_body_bytes", "local.max_packet_bytes"]),
        (LEAST.replace("port = 1883", "keepalive_s = 0"), ["local.keepalive_s", "0"]),
    ],
)
def test_what_cannot_be_meant_is_refused_with_key_value_and_remedy(raw: str, words: list[str]) -> None:
    message = refusal(raw)
    for word in words:
        assert word in message


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml: cannot be read: No such file"):
        load_config(tmp_path / "nowhere.toml")


def test_a_file_that_is_not_text_is_refused_and_named(tmp_path: Path) -> None:
    path = tmp_path / "spillway.toml"
    path.write_bytes(b"\xff\xfe[device]")
    with pytest.raises(ConfigError, match=r"spillway\.toml: .*UTF-8"):
        load_config(path)


def test_an_error_in_a_file_begins_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "spillway.toml"
    path.write_text("[device")
    with pytest.raises(ConfigError, match=r"spillway\.toml: not TOML"):
        load_config(path)


@pytest.mark.parametrize(
    ("raw", "key"),
    [
        (LEAST.replace("port = 1883", 'username = "box"\npassword_file = "/no/such/file"'), "local.password_file"),
        (LEAST.replace("port = 1883", 'ca = "/no/such/file"'), "local.ca"),
        (LEAST + '[http]\nport = 80\ntoken_file = "/no/such/file"', "http.token_file"),
        (WITH_CLOUD.replace("/etc/spillway/device.key", "/no/such/file"), "device."),
    ],
)
def test_a_file_that_the_configuration_names_must_be_readable(raw: str, key: str) -> None:
    config = parse_config(raw)
    with pytest.raises(ConfigError, match=f"`{key}.*cannot be read: No such file"):
        check_files(config)


def test_files_that_are_there_are_right(tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("hunter2")
    check_files(parse_config(LEAST.replace("port = 1883", f'username = "box"\npassword_file = "{secret}"')))


@given(st.text(max_size=200))
def test_any_text_is_a_configuration_or_a_configuration_error(raw: str) -> None:
    with contextlib.suppress(ConfigError):
        parse_config(raw)
