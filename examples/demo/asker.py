"""An outside MQTT client: paho alone, nothing of Spillway, so that the demo shows what any client sees."""

from __future__ import annotations

import itertools
import queue
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties


@dataclass
class Reply:
    """One reply: its body, its user properties, and when it came (ms after the question)."""

    body: bytes
    facts: dict[str, str]
    ms: float
    pieces: int = 0


@dataclass
class Question:
    """A question under way."""

    asked_at: float
    replies: queue.SimpleQueue[Reply] = field(default_factory=queue.SimpleQueue)

    def answer(self, timeout_s: float = 60.0) -> Reply:
        """Return the final reply; raises queue.Empty where none comes in time."""
        pieces = 0
        while True:
            reply = self.replies.get(timeout=timeout_s)
            if reply.facts.get("final") == "true":
                reply.pieces = pieces + 1
                return reply
            pieces += 1


class Asker:
    """Asks one box questions over its broker."""

    def __init__(self, device: str, port: int, name: str = "demo") -> None:
        self._device = device
        self._name = name
        self._numbers = itertools.count(1)
        self._questions: dict[bytes, Question] = {}
        self.retained: dict[str, bytes] = {}
        self._up = threading.Event()
        self._client = paho.Client(CallbackAPIVersion.VERSION2, client_id=name, protocol=MQTTProtocolVersion.MQTTv5)
        self._client.max_inflight_messages_set(1000)
        self._client.on_socket_open = _without_delay
        self._client.on_connect = self._subscribe
        self._client.on_subscribe = lambda *_: self._up.set()
        self._client.on_message = self._receive
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        if not self._up.wait(10):
            raise ConnectionError("the local broker does not answer")

    def ask(self, model: str, body: bytes, content_type: str, **wishes: str) -> Question:
        """Ask; `wishes` become user properties (`_` for `-`)."""
        correlation = f"{self._name}-{next(self._numbers)}".encode()
        properties = Properties(PacketTypes.PUBLISH)
        properties.ResponseTopic = f"spillway/{self._device}/reply/{self._name}/{model}"
        properties.CorrelationData = correlation
        properties.ContentType = content_type
        properties.UserProperty = [(name.replace("_", "-"), value) for name, value in wishes.items()]
        question = self._questions[correlation] = Question(time.monotonic())
        topic = f"spillway/{self._device}/infer/{model}/{self._name}"
        self._client.publish(topic, body, qos=1, properties=properties)
        return question

    def close(self) -> None:
        """Leave the broker."""
        self._client.disconnect()
        self._client.loop_stop()

    def _subscribe(self, client: paho.Client, *_: object) -> None:
        client.subscribe([(f"spillway/{self._device}/reply/{self._name}/#", 1), (f"spillway/{self._device}/models", 1)])

    def _receive(self, _client: paho.Client, _userdata: object, message: paho.MQTTMessage) -> None:
        if message.topic.endswith("/models"):
            self.retained["models"] = bytes(message.payload)
            return
        properties = message.properties
        question = self._questions.get(getattr(properties, "CorrelationData", b""))
        if question is not None:
            facts = dict(getattr(properties, "UserProperty", ()))
            question.replies.put(Reply(bytes(message.payload), facts, (time.monotonic() - question.asked_at) * 1e3))


def _without_delay(_client: paho.Client, _userdata: object, sock: Any) -> None:
    """Send small packets at once: without this a question waits 40 ms for the acknowledgement of the last."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class Watcher:
    """Sees what crosses the cloud broker."""

    def __init__(self, port: int) -> None:
        self.handoffs: list[bytes] = []
        self.seen = threading.Event()
        self._client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id="watcher", protocol=MQTTProtocolVersion.MQTTv5
        )
        self._client.on_connect = lambda client, *_: client.subscribe("spillway/handoff/#", 0)
        self._client.on_message = self._receive
        self._client.reconnect_delay_set(1, 1)
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()

    def close(self) -> None:
        """Leave the broker."""
        self._client.disconnect()
        self._client.loop_stop()

    def _receive(self, _client: paho.Client, _userdata: object, message: paho.MQTTMessage) -> None:
        self.handoffs.append(bytes(message.payload))
        self.seen.set()
