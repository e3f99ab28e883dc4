"""The least that answers over MQTT: a process that sends each request's body back where it asks for it.

`python -m bench.echo PORT link` uses the agent's own link, `… paho` the paho client on the same event loop. Both answer
with QoS 1 and the properties of an answer, and acknowledge the request by hand once their answer is acknowledged.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from cloud_sync.link import Link
from cloud_sync.messages import Details, LinkSettings, Message

FACTS = (
    ("status", "ok"),
    ("final", "true"),
    ("route", "local"),
    ("reason", "fits"),
    ("model", "echo@1"),
)


async def by_link(port: int) -> None:
    settings = LinkSettings(port=port, client_id="echo-link", receive_maximum=1064)

    def receive(message: Message) -> None:
        asked = message.details
        told = Details(correlation=asked.correlation, content_type="application/json", user=FACTS)
        done = link.publish(asked.response_topic or "", message.payload, qos=1, details=told)
        done.add_done_callback(lambda _: link.acknowledge(message))

    link = Link(settings, on_message=receive)
    link.subscribe("spillway/echo-link/infer/+/+", 1)
    await link.run()


class ByPaho:
    """paho without its thread, its socket watched by the loop."""

    def __init__(self, port: int, name: str, topic: str) -> None:
        self._asked: dict[int, int] = {}
        self._topic = topic
        client = self.client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id=name, protocol=MQTTProtocolVersion.MQTTv5, manual_ack=True
        )
        client.max_inflight_messages_set(0)
        client.on_connect = self._on_connect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        properties = Properties(PacketTypes.CONNECT)
        properties.ReceiveMaximum = 1064
        client.connect("127.0.0.1", port, properties=properties)
        sock = client.socket()
        assert isinstance(sock, socket.socket)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock, self._read)

    def _read(self) -> None:
        self.client.loop_read()
        while self.client.want_write():
            self.client.loop_write()

    def _on_connect(self, *_: Any) -> None:
        self.client.subscribe(self._topic, 1)

    def _on_message(self, _client: Any, _data: Any, message: paho.MQTTMessage) -> None:
        asked = message.properties
        told = Properties(PacketTypes.PUBLISH)
        told.CorrelationData = asked.CorrelationData  # type: ignore[union-attr]
        told.ContentType = "application/json"
        told.UserProperty = list(FACTS)
        sent = self.client.publish(asked.ResponseTopic, message.payload, 1, properties=told)  # type: ignore[union-attr]
        self._asked[sent.mid] = message.mid

    def _on_publish(self, _client: Any, _data: Any, mid: int, *_: Any) -> None:
        self.client.ack(self._asked.pop(mid), 1)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(1)
            self.client.loop_misc()


async def main(port: int, kind: str) -> None:
    if kind == "link":
        await by_link(port)
    else:
        await ByPaho(port, "echo-paho", "spillway/echo-paho/infer/+/+").run()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2]))
