"""An asker that is not ours: paho on a thread of its own, as a device would use it."""

from __future__ import annotations

import collections
import itertools
import json
import threading
import time
from typing import Any, Self

import msgspec
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from tests.support.agent_process import DEVICE
from tests.support.waiting import until

BASE = f"spillway/{DEVICE}"


class Reply(msgspec.Struct, frozen=True):
    """One reply as it came."""

    topic: str
    body: bytes
    facts: dict[str, str]
    correlation: bytes | None
    content_type: str | None
    qos: int
    retain: bool
    at: float

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def code(self) -> str | None:
        """The error's code in the plain dialect; None for an answer."""
        told = self.json.get("error")
        return str(told["code"]) if isinstance(told, dict) else told

    @property
    def final(self) -> bool:
        """Whether it is the last one."""
        return self.facts.get("final") == "true"


class Asker:
    """Asks under the name `me`, and keeps every reply by its correlation."""

    def __init__(
        self, port: int, name: str = "me", *, version: MQTTProtocolVersion = MQTTProtocolVersion.MQTTv5
    ) -> None:
        self.name = name
        self.replies: dict[bytes | None, list[Reply]] = collections.defaultdict(list)
        self.retained: dict[str, bytes] = {}
        self.acknowledged: set[int] = set()
        self._version = version
        self._numbers = itertools.count(1)
        self._ready = threading.Event()
        self._client = paho.Client(CallbackAPIVersion.VERSION2, client_id=f"asker-{name}", protocol=version)
        self._client.max_inflight_messages_set(2000)
        self._client.max_queued_messages_set(0)
        self._client.on_connect = self._on_connect
        self._client.on_subscribe = lambda *_: self._ready.set()
        self._client.on_message = self._on_message
        self._client.on_publish = lambda _c, _u, mid, _r, _p: self.acknowledged.add(mid)
        self._client.reconnect_delay_set(1, 1)
        self._client.connect_async("127.0.0.1", port)

    def __enter__(self) -> Self:
        self._client.loop_start()
        assert self._ready.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def ask(
        self,
        model: str,
        body: bytes,
        *,
        correlation: bytes | None = None,
        topic: str = "",
        qos: int = 1,
        retain: bool = False,
        user: tuple[tuple[str, str], ...] = (),
        **properties: object,
    ) -> bytes | None:
        """Publish a request and return its correlation; `properties` are MQTT 5's, by paho's names."""
        if correlation is None and self._version == MQTTProtocolVersion.MQTTv5:
            correlation = b"%s-%d" % (self.name.encode(), next(self._numbers))
        packed = None
        if self._version == MQTTProtocolVersion.MQTTv5:
            packed = Properties(PacketTypes.PUBLISH)
            packed.CorrelationData = correlation
            if user:
                packed.UserProperty = list(user)
            for name, value in properties.items():
                setattr(packed, name, value)
        self._client.publish(topic or f"{BASE}/infer/{model}/{self.name}", body, qos, retain, packed)
        return correlation

    def final(self, correlation: bytes | None, timeout_s: float = 20.0) -> Reply:
        """Wait for the final reply to a correlation."""
        until(lambda: any(reply.final for reply in self.replies[correlation]), timeout_s)
        return next(reply for reply in self.replies[correlation] if reply.final)

    def answer(self, model: str, body: bytes, timeout_s: float = 20.0, **more: Any) -> Reply:
        """Ask and wait for the final reply."""
        return self.final(self.ask(model, body, **more), timeout_s)

    def finals(self) -> dict[bytes | None, list[Reply]]:
        """Return the final replies by correlation."""
        return {key: [reply for reply in replies if reply.final] for key, replies in self.replies.items()}

    def state(self, model: str) -> str:
        """Return the state that the box tells of a model; empty where it tells none."""
        told = json.loads(self.retained.get(f"{BASE}/models", b"{}"))
        return str(told.get(model, {}).get("state", ""))

    def await_serving(self, *models: str, timeout_s: float = 60.0) -> Self:
        """Wait until the box says that these models serve."""
        until(lambda: all(self.state(model) == "serving" for model in models), timeout_s, told=self._states)
        return self

    def _states(self) -> str:
        return str(self.retained)

    def _on_connect(self, client: paho.Client, *_: object) -> None:
        names = (f"reply/{self.name}/#", "results/#", "status", "models", "health")
        client.subscribe([(f"{BASE}/{name}", 1) for name in names])

    def _on_message(self, _client: paho.Client, _userdata: object, message: paho.MQTTMessage) -> None:
        if message.topic.startswith((f"{BASE}/reply/", f"{BASE}/results/")):
            properties = message.properties
            correlation = getattr(properties, "CorrelationData", None)
            self.replies[correlation].append(
                Reply(
                    topic=message.topic,
                    body=bytes(message.payload),
                    facts=dict(getattr(properties, "UserProperty", ())),
                    correlation=correlation,
                    content_type=getattr(properties, "ContentType", None),
                    qos=message.qos,
                    retain=message.retain,
                    at=time.monotonic(),
                )
            )
        else:
            self.retained[message.topic] = bytes(message.payload)
