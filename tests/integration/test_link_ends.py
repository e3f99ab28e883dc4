"""How the link begins and ends: its window, its thread, TLS, and the goodbye."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from cloud_sync import link as link_module
from cloud_sync.link import Link
from cloud_sync.messages import Details, LinkSettings, Message, Will
from tests.fakes.certificates import ISSUED, TestCA, save_device
from tests.support.mosquitto import Mosquitto, free_port
from tests.support.raw_broker import CONNECT, DISCONNECT, PUBLISH, Packet, RawBroker, connack, kindly, puback

UNSUBSCRIBE = 10
PINGREQ = 12


def make(port: int, **changes: object) -> Link:
    settings = {"port": port, "client_id": "box", "max_backoff_s": 0.0} | changes
    return Link(LinkSettings(**settings), on_message=lambda _: None)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def running(link: Link, *, up: bool = True) -> AsyncIterator[asyncio.Future[None]]:
    task = asyncio.ensure_future(link.run())
    try:
        if up:
            await asyncio.wait_for(link.wait_up(), 10)
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# The window.


def stingy(heard: Packet) -> bytes:
    """Take two at a time and acknowledge nothing; from the second connection on offer ten."""
    if heard.kind == CONNECT:
        return connack(0, b"\x21\x00\x02" if heard.connection == 1 else b"\x21\x00\x0a")
    return b"" if heard.kind == PUBLISH else kindly(heard)


async def test_c23_what_is_published_before_the_first_connack_keeps_to_the_servers_receive_maximum_too() -> None:
    async with RawBroker(stingy) as broker:
        link = make(broker.port)
        pending = [link.publish("a", b"%d" % number, qos=1) for number in range(5)]
        async with running(link):
            pending.append(link.publish("a", b"5", qos=1))
            for number in range(2, 6):
                heard = await broker.hears(PUBLISH, number)
                await asyncio.sleep(0.02)
                assert len(broker.kinds(PUBLISH)) == number
                broker.send(puback(heard[-2].mid))
            heard = await broker.hears(PUBLISH, 6)
            assert [packet.body[-1:] for packet in heard] == [b"%d" % number for number in range(6)]
            broker.send(puback(heard[-2].mid) + puback(heard[-1].mid))
            await asyncio.wait_for(asyncio.gather(*pending), 5)


async def test_c23_the_lowest_receive_maximum_is_kept_over_a_reconnection() -> None:
    async with RawBroker(stingy) as broker:
        link = make(broker.port)
        async with running(link):
            pending = [link.publish("a", b"%d" % number, qos=1) for number in range(5)]
            await broker.hears(PUBLISH, 2)
            broker.cut()
            await broker.hears(CONNECT, 2)
            await broker.hears(PUBLISH, 4)
            await asyncio.sleep(0.05)
            assert len(broker.kinds(PUBLISH)) == 4
        for done in pending:
            done.cancel()


async def test_what_is_larger_than_the_broker_takes_fails_alone_and_the_link_goes_on() -> None:
    def narrow(heard: Packet) -> bytes:
        return connack(0, b"\x27\x00\x00\x04\x00") if heard.kind == CONNECT else kindly(heard)

    async with RawBroker(narrow) as broker:
        link = make(broker.port)
        early = link.publish("a", bytes(2000), qos=1)
        async with running(link):
            for qos in (0, 1):
                with pytest.raises(ConnectionError, match="1024"):
                    await link.publish("a", bytes(1024), qos=qos)
            with pytest.raises(ConnectionError, match="1024"):
                await early
            await asyncio.wait_for(link.publish("a", bytes(1000), qos=1), 5)
        assert broker.connections == 1


async def test_a_broker_that_has_fallen_silent_is_pinged_and_then_given_up() -> None:
    def mute(heard: Packet) -> bytes:
        return b"" if heard.kind == PINGREQ and heard.connection == 1 else kindly(heard)

    async with RawBroker(mute) as broker:
        async with running(make(broker.port, keepalive_s=1)):
            await broker.hears(PINGREQ, 1)
            await broker.hears(CONNECT, 2)
            await broker.hears(PINGREQ, 3)
        assert broker.connections == 2


async def test_c3_pieces_that_may_be_lost_leave_room_for_final_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "MAX_HELD", 10)
    link = make(free_port())
    pieces = [link.publish("a", b"piece", qos=1, expendable=True) for _ in range(8)]
    assert [piece.done() for piece in pieces] == [False] * 5 + [True] * 3
    finals = [link.publish("a", b"final", qos=1) for _ in range(6)]
    assert [final.done() for final in finals] == [False] * 5 + [True]
    for refused in (*pieces[5:], finals[5]):
        assert isinstance(refused.exception(), ConnectionError)


# What no broker takes.


@pytest.mark.parametrize(
    ("topic", "details"),
    [
        ("spillway/secret\ufffe", None),
        ("spillway/secret\x00", None),
        ("spillway/secret\ud800", None),
        ("spillway/secret/+", None),
        ("", None),
        ("a" * 65_536, None),
        ("a", Details(content_type="text/secret\n")),
        ("a", Details(user=(("secret", "x\uffff"),))),
        ("a", Details(user=(("secret\x7f", "x"),))),
        ("a", Details(response_topic="secret/#")),
        ("a", Details(correlation=bytes(65_536))),
    ],
)
@pytest.mark.parametrize("qos", [0, 1])
async def test_c18_what_no_broker_takes_is_refused_and_the_link_goes_on(
    topic: str, details: Details | None, qos: int
) -> None:
    async with RawBroker() as broker:
        link = make(broker.port)
        async with running(link):
            with pytest.raises(ConnectionError) as caught:
                await link.publish(topic, b"x", qos=qos, details=details)
            assert "secret" not in str(caught.value)
            await asyncio.wait_for(link.publish("a", b"y", qos=1), 5)
            assert (len(broker.kinds(PUBLISH)), broker.connections) == (1, 1)


async def test_c18_mosquitto_and_the_link_agree_on_what_is_taken(tmp_path: Path) -> None:
    with Mosquitto(tmp_path) as broker:
        link = make(broker.port)
        async with running(link):
            details = Details(content_type="t\U0001f600", user=(("é\ufffd", "\ufdf0\ue000"),))
            await asyncio.wait_for(link.publish("a/\U0001f600\ufdcf", b"x", qos=1, details=details), 5)


@pytest.mark.parametrize("qos", [0, 1])
async def test_a_message_may_be_answered_from_the_callback_that_takes_it(tmp_path: Path, qos: int) -> None:
    seen: list[str] = []

    def take(message: Message) -> None:
        seen.append(message.topic)
        if message.topic == "question":
            link.publish("answer", b"x", qos=qos)

    with Mosquitto(tmp_path) as broker:
        link = Link(LinkSettings(port=broker.port, client_id="box"), on_message=take)
        link.subscribe("+", 0)
        async with running(link):
            await link.publish("question", b"x", qos=1)
            async with asyncio.timeout(5):
                while len(seen) < 2:  # noqa: ASYNC110 - a look now and then is enough for a test
                    await asyncio.sleep(0.01)
    assert seen == ["question", "answer"]


# The thread that connects.


class Stalling:
    """A TLS server that shakes no hand before it is told to, and reads one connection to its end."""

    def __init__(self, folder: Path) -> None:
        ca = TestCA()
        self.ca = str(ca.save(folder))
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(ca.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(ISSUED)
            .not_valid_after(ISSUED + timedelta(days=3650))
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=True)
            .sign(ca.key, hashes.SHA256())
        )
        chain = certificate.public_bytes(Encoding.PEM) + key.private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        )
        (folder / "server.pem").write_bytes(chain)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(folder / "server.pem")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.accepted = threading.Event()
        self.shake = threading.Event()
        self.closed = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        connection.settimeout(10)
        self.accepted.set()
        self.shake.wait(10)
        with contextlib.suppress(OSError), self._context.wrap_socket(connection, server_side=True) as secure:
            while secure.recv(4096):
                pass
        self.closed.set()

    def close(self) -> None:
        self.shake.set()
        self._listener.close()
        self._thread.join(10)


@pytest.fixture
def stalling(tmp_path: Path) -> Iterator[Stalling]:
    server = Stalling(tmp_path)
    yield server
    server.close()


def test_b21_a_stop_does_not_wait_for_a_connection_that_stalls_and_its_socket_is_closed(stalling: Stalling) -> None:
    async def stop_while_connecting() -> None:
        async with running(make(stalling.port, ca=stalling.ca), up=False):
            while not stalling.accepted.is_set():  # noqa: ASYNC110 - set by a thread
                await asyncio.sleep(0.01)

    begun = time.monotonic()
    asyncio.run(stop_while_connecting())
    assert time.monotonic() - begun < 3
    stalling.shake.set()
    assert stalling.closed.wait(5)


async def test_b21_a_connection_that_is_made_after_the_stop_is_closed_while_the_loop_goes_on(
    stalling: Stalling,
) -> None:
    link = make(stalling.port, ca=stalling.ca)
    async with running(link, up=False):
        while not stalling.accepted.is_set():  # noqa: ASYNC110 - set by a thread
            await asyncio.sleep(0.01)
    stalling.shake.set()
    assert await asyncio.to_thread(stalling.closed.wait, 5)


# TLS.


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # paho leaves a socket whose handshake failed to Python
async def test_c21_a_client_certificate_without_a_ca_is_never_sent_in_the_clear(tmp_path: Path) -> None:
    ca, key = TestCA(), ec.generate_private_key(ec.SECP256R1())
    certificate, key_file = save_device(tmp_path, ca.certify("pi-7", key), key)
    first: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        told = await reader.read(1)
        if not first.done():
            first.set_result(told)
        writer.close()

    server = await asyncio.start_server(listen, "127.0.0.1", 0)
    link = make(server.sockets[0].getsockname()[1], certificate=str(certificate), key=str(key_file))
    async with running(link, up=False):
        assert await asyncio.wait_for(first, 5) == b"\x16"
        await asyncio.sleep(0.1)
    server.close()


# The goodbye.


async def test_a_closed_link_says_goodbye_after_what_it_had_to_say_and_does_not_come_back() -> None:
    async with RawBroker() as broker:
        link = make(broker.port)
        async with running(link) as root:
            for _ in range(20):
                link.publish("a", bytes(100_000), qos=1)
            await link.close()
            await asyncio.wait_for(root, 5)
            await broker.hears(DISCONNECT)
            await asyncio.sleep(1.2)
    assert [packet.kind for packet in broker.heard if packet.kind in {PUBLISH, DISCONNECT}][-1] == DISCONNECT
    assert (len(broker.kinds(PUBLISH)), broker.connections) == (20, 1)


async def test_a_link_that_is_closed_while_its_broker_is_away_ends() -> None:
    link = make(free_port(), max_backoff_s=60.0)
    async with running(link, up=False) as root:
        await asyncio.sleep(0.1)
        await link.close()
        await asyncio.wait_for(root, 2)


async def test_a_goodbye_keeps_the_will_back(tmp_path: Path) -> None:
    seen: list[Message] = []
    with Mosquitto(tmp_path) as broker:
        watching = Link(LinkSettings(port=broker.port, client_id="watch"), on_message=seen.append)
        watching.subscribe("#", 0)
        leaving = Link(
            LinkSettings(port=broker.port, client_id="box"), on_message=lambda _: None, will=Will("box", b"offline")
        )
        async with running(watching), running(leaving):
            await leaving.publish("box", b"stopped", qos=1)
            await leaving.close()
            await asyncio.sleep(0.3)
    assert [message.payload for message in seen] == [b"stopped"]


async def test_a_filter_that_is_taken_back_is_taken_back_from_a_kept_session_too() -> None:
    async with RawBroker() as broker:
        link = make(broker.port)
        link.subscribe("a")
        async with running(link):
            link.unsubscribe("a")
            await broker.hears(UNSUBSCRIBE, 1)
            broker.cut()
            await broker.hears(UNSUBSCRIBE, 2)
            await asyncio.sleep(0.05)
        assert [packet.connection for packet in broker.kinds(8)] == [1]
