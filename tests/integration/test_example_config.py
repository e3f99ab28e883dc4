"""The broker settings of `examples/config` with a real mosquitto: who may do what, and what is refused."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "examples" / "config"
SEARCHED = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])
HEARD_S = 0.4
"""How long a message that must not come is waited for."""

Client = Callable[..., list[str]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(program: str, *arguments: str) -> subprocess.Popen[str]:
    path = shutil.which(program, path=SEARCHED)
    assert path, f"{program} is not installed"
    return subprocess.Popen([path, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def start_broker(folder: Path, name: str, changes: dict[str, str], port: int) -> subprocess.Popen[str]:
    """Start mosquitto with an example, its paths and port exchanged for the test's, and wait for its port."""
    settings = (CONFIG / name).read_text("utf-8")
    for old, new in changes.items():
        assert old in settings, old
        settings = settings.replace(old, new)
    (folder / name).write_text(f"user root\n{settings}" if os.getuid() == 0 else settings, "utf-8")
    broker = start("mosquitto", "-c", str(folder / name))
    for _ in range(100):
        assert broker.poll() is None, broker.communicate()[0]
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return broker
        time.sleep(0.05)
    raise AssertionError("the broker did not open its port")


def stop(process: subprocess.Popen[str]) -> str:
    process.terminate()
    return process.communicate(timeout=10)[0]


class Wire:
    """mosquitto's own clients; `who` gives the options by which a client shows who it is."""

    def __init__(self, port: int, who: Callable[[str], list[str]]) -> None:
        self._port = port
        self._who = who

    def publish(self, name: str, topic: str, text: str = "x") -> int:
        sender = start("mosquitto_pub", *self._options(name), "-q", "1", "-t", topic, "-m", text)
        sender.communicate(timeout=10)
        return sender.returncode

    def heard(self, name: str, topic: str, sender: str, sent_to: str) -> bool:
        """Whether `name`, who listens on `topic`, gets what `sender` publishes on `sent_to`."""
        options = [*self._options(name), "-q", "1", "-t", topic]
        listener = start("stdbuf", "-oL", "mosquitto_sub", *options, "-d", "-C", "1", "-F", "%t", "-W", "8")
        assert listener.stdout is not None
        for line in listener.stdout:
            if "SUBACK" in line:
                break
        self.publish(sender, sent_to)
        try:
            told = listener.communicate(timeout=HEARD_S)[0]
        except subprocess.TimeoutExpired:
            stop(listener)
            return False
        return sent_to in told

    def _options(self, name: str) -> list[str]:
        return [
            "-h",
            "localhost",
            "-p",
            str(self._port),
            "-V",
            "5",
            "-i",
            f"test-{name}-{time.monotonic_ns()}",
            *self._who(name),
        ]


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Wire]:
    """The local broker of an example box, with its users kitchen, anna and bob."""
    port = free_port()
    passwords = tmp_path / "passwd"
    passwords.write_text("kitchen:box\nanna:a\nbob:b\n", "utf-8")
    subprocess.run([shutil.which("mosquitto_passwd", path=SEARCHED) or "", "-U", str(passwords)], check=True)
    changes = {
        "listener 1883 127.0.0.1": f"listener {port} 127.0.0.1",
        "/etc/mosquitto/spillway.passwd\nacl": f"{passwords}\nacl",
        "/etc/mosquitto/spillway.acl": str(CONFIG / "spillway.acl"),
        "/var/lib/mosquitto/": f"{tmp_path}/",
    }
    known = {"kitchen": "box", "anna": "a", "bob": "b"}
    broker = start_broker(tmp_path, "mosquitto.conf", changes, port)
    try:
        yield Wire(port, lambda name: ["-u", name, "-P", known.get(name, "")])
    finally:
        stop(broker)


def test_the_local_broker_lets_an_asker_ask_in_his_own_name_and_read_his_own_answers(local: Wire) -> None:
    assert local.heard("kitchen", "spillway/kitchen/infer/+/+", "anna", "spillway/kitchen/infer/digits/anna")
    assert local.heard("kitchen", "spillway/kitchen/cancel/+/+", "anna", "spillway/kitchen/cancel/digits/anna")
    assert local.heard("anna", "spillway/kitchen/reply/anna/#", "kitchen", "spillway/kitchen/reply/anna/1")
    assert local.heard("anna", "spillway/kitchen/status", "kitchen", "spillway/kitchen/status")


def test_the_local_broker_keeps_askers_out_of_each_others_business(local: Wire) -> None:
    assert not local.heard("kitchen", "spillway/kitchen/infer/#", "bob", "spillway/kitchen/infer/digits/anna")
    assert not local.heard("kitchen", "spillway/kitchen/infer/#", "bob", "spillway/kitchen/infer/digits")
    assert not local.heard("kitchen", "spillway/kitchen/cancel/#", "bob", "spillway/kitchen/cancel/digits/anna")
    assert not local.heard("bob", "spillway/#", "kitchen", "spillway/kitchen/reply/anna/1")
    assert not local.heard("bob", "#", "anna", "spillway/kitchen/infer/digits/anna")
    assert not local.heard("anna", "spillway/kitchen/status", "bob", "spillway/kitchen/status")


def test_the_local_broker_takes_nobody_without_a_password_and_nothing_over_its_bound(local: Wire) -> None:
    assert local.publish("mallory", "spillway/kitchen/infer/digits/mallory") != 0
    assert local.publish("anna", "spillway/kitchen/infer/digits/anna") == 0


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Wire]:
    """The broker between boxes and gateways, its certificate made as docs/operations.md says."""
    page = (ROOT / "docs" / "operations.md").read_text("utf-8")
    commands = re.search(r"<!-- run: broker certificate -->\n```sh\n(.*?)```", page, re.DOTALL)
    assert commands
    script = "\n".join(
        [
            f"spillway-fleet init --repository file://{tmp_path}/bucket",
            commands[1].replace("mqtt.example.org", "localhost"),
            "for box in kitchen garage; do spillway-fleet enrol $box --out $box; done",
        ]
    )
    environment = {**os.environ, "PATH": SEARCHED}
    subprocess.run(["bash", "-ec", script], cwd=tmp_path, env=environment, check=True, capture_output=True)
    port = free_port()
    changes = {
        "listener 8883": f"listener {port} 127.0.0.1",
        "/etc/mosquitto/fleet/ca.pem": f"{tmp_path}/fleet/ca/ca.pem",
        "/etc/mosquitto/fleet/spillway-cloud.acl": str(CONFIG / "spillway-cloud.acl"),
        "/etc/mosquitto/fleet/": f"{tmp_path}/",
        "/var/lib/mosquitto/": f"{tmp_path}/",
    }
    broker = start_broker(tmp_path, "mosquitto-cloud.conf", changes, port)

    def shown(name: str) -> list[str]:
        authority = ["--cafile", str(tmp_path / "fleet" / "ca" / "ca.pem")]
        mine = tmp_path / name
        return [*authority, "--cert", f"{mine}/device.pem", "--key", f"{mine}/device.key"] if name else authority

    try:
        yield Wire(port, shown)
    finally:
        stop(broker)


def test_the_cloud_broker_connects_boxes_gateways_and_admins(cloud: Wire) -> None:
    work, answer = "spillway/handoff/chat/assistant", "spillway/kitchen/handoff/reply"
    assert cloud.heard("gateway-1", "$share/gateway/spillway/handoff/chat/+", "kitchen", work)
    assert cloud.heard("kitchen", answer, "gateway-1", answer)
    assert cloud.heard("kitchen", "spillway/fleet/all/hint", "admin", "spillway/fleet/all/hint")
    assert cloud.heard("admin", "spillway/+/report", "kitchen", "spillway/kitchen/report")


def test_the_cloud_broker_keeps_boxes_to_their_own_topics(cloud: Wire) -> None:
    answer = "spillway/kitchen/handoff/reply"
    assert not cloud.heard("garage", "spillway/#", "gateway-1", answer)
    assert not cloud.heard("garage", "spillway/handoff/#", "kitchen", "spillway/handoff/chat/assistant")
    assert not cloud.heard("kitchen", answer, "garage", answer)
    assert not cloud.heard("admin", "spillway/+/report", "garage", "spillway/kitchen/report")
    assert not cloud.heard("kitchen", "spillway/fleet/all/hint", "garage", "spillway/fleet/all/hint")
    assert cloud.publish("", "spillway/handoff/chat/assistant") != 0
