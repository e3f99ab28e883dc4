"""What the demo asks, row by row, and what must come of each."""

from __future__ import annotations

import json
import queue
import threading
import time
from pathlib import Path
from typing import Any

from examples.demo.asker import Asker, Question, Reply, Watcher
from examples.demo.parts import DEVICE, Parts, start_broker, wait_for
from examples.demo.stage import Stage
from examples.demo.table import Table

INPUTS = Path(__file__).parents[1] / "inputs"
BURST = 16
SWAP_QUESTIONS = 300
OUTAGE = 24


class Scenes:
    """The rows of the demo; each asks as an outside client and judges what comes back."""

    def __init__(self, stage: Stage, parts: Parts, table: Table) -> None:
        self._stage = stage
        self._parts = parts
        self._table = table
        self._asker = Asker(DEVICE, stage.local_port)
        self._watcher = Watcher(stage.cloud_port)

    def play(self) -> None:
        """Play every scene."""
        try:
            self._inputs()
            self._prompts()
            self._refusals()
            self._burst()
            self._hot_swap()
            self._tampered()
            self._outage()
        finally:
            self._asker.close()
            self._watcher.close()

    def _inputs(self) -> None:
        """Texts, images and sensor rows that the box answers itself."""
        for text, label in (("今天天气很好", "zh"), ("Das Wetter ist heute schön.", "de")):
            reply = self._ask("language", text.encode(), "text/plain")
            self._judge(text, reply, "local", "fits", lambda value, label=label: value["outputs"][0]["label"] == label)
        for model in ("digits", "digits-int8"):
            reply = self._ask(model, (INPUTS / "digit-3.png").read_bytes(), "image/png")
            self._judge("a PNG of a 3", reply, "local", "fits", lambda value: value["outputs"][0]["label"] == "3")
        rows = (INPUTS / "sea.json").read_bytes()
        reply = self._ask("sea-temperature", rows, "application/json")
        self._judge("12 months of sea temperature", reply, "local", "fits", lambda value: 15 < _first(value) < 32)
        reply = self._ask("co2-forecast", (INPUTS / "co2.json").read_bytes(), "application/json")
        self._judge("104 weeks of CO2 readings", reply, "local", "fits", lambda value: 300 < _first(value) < 450)

    def _prompts(self) -> None:
        """A prompt that fits, the same as a stream, and one that is too long for the box."""
        question = "What does os.path.join do?"
        reply = self._ask("assistant", _chat(question, max_tokens=40), "application/json")
        self._judge(question, reply, "local", "fits", _spoke)
        reply = self._ask("assistant", question.encode(), "text/plain", stream="true")
        right = reply is not None and reply.facts.get("route") == "local" and reply.pieces > 1
        said = f"{reply.pieces} pieces" if reply is not None else "no answer"
        self._table.row(f"{question} (streamed)", said, reply, right=right)
        reply = self._ask("assistant", _chat(self._long(), max_tokens=40), "application/json")
        self._judge(f"{len(self._long())} characters and a question", reply, "cloud", "oversized", _spoke)

    def _refusals(self) -> None:
        """What must be refused, and what must not leave the box."""
        seen = len(self._watcher.handoffs)
        reply = self._ask("assistant", _chat(self._long()), "application/json", privacy="local-only")
        time.sleep(0.3)
        left = len(self._watcher.handoffs) - seen
        note = "nothing crossed the cloud broker" if not left else f"{left} messages left the box"
        self._refused("the same, local-only", reply, "too_large", right=not left, note=note)
        reply = self._ask("language", (INPUTS / "digit-3.png").read_bytes(), "image/png")
        self._refused("an image to a text model", reply, "bad_request")

    def _burst(self) -> None:
        """More at once than the box has room for."""
        asked = [
            self._asker.ask("assistant", _chat(f"What is item {n}?", max_tokens=32), "application/json")
            for n in range(BURST)
        ]
        replies = [_answer(question) for question in asked]
        places = [
            reply.facts.get("route") for reply in replies if reply is not None and reply.facts.get("status") == "ok"
        ]
        local, cloud = places.count("local"), places.count("cloud")
        overflow = next((r for r in replies if r is not None and r.facts.get("reason") == "overflow"), None)
        right = local + cloud == BURST and local > 0 and cloud > 0
        self._table.row(
            f"a burst of {BURST} prompts", f"{local} answered here, {cloud} by the cloud", overflow, right=right
        )

    def _hot_swap(self) -> None:
        """Version 2, smaller, published while requests run."""
        image = (INPUTS / "digit-7.png").read_bytes()
        publish = threading.Thread(target=self._stage.publish_second_digits)
        publish.start()
        answered: list[Reply | None] = []
        end = time.monotonic() + 60
        while time.monotonic() < end:
            asked = [self._asker.ask("digits", image, "image/png") for _ in range(20)]
            answered += [_answer(question) for question in asked]
            last = answered[-1]
            swapped = last is not None and last.facts.get("model") == "digits@2"
            if len(answered) >= SWAP_QUESTIONS and swapped:
                break
        publish.join()
        by = [
            sum(reply is not None and reply.facts.get("model") == f"digits@{n}" for reply in answered) for n in (1, 2)
        ]
        good = sum(reply is not None and _label(reply) == "7" for reply in answered)
        right = good == len(answered) == sum(by) and min(by) > 0
        self._table.row(
            f"digits@2 shipped under {len(answered)} requests",
            f"{by[0]} by version 1, {by[1]} by version 2, {len(answered) - sum(by)} lost",
            answered[-1],
            right=right,
        )

    def _tampered(self) -> None:
        """A pack that somebody changed in the bucket: refused, and version 1 goes on serving."""
        self._stage.publish_tampered_language()
        wait_for("the box's report of the tampered pack", lambda: bool(self._model("language").get("code")), 30)
        reply = self._ask("language", b"Il fait beau aujourd'hui.", "text/plain")
        code = self._model("language").get("code", "")
        right = reply is not None and reply.facts.get("model") == "language@1" and _label(reply) == "fr"
        self._table.row("language@2, tampered with in the bucket", f"refused: {code}; 1 goes on", reply, right=right)

    def _outage(self) -> None:
        """Stop the cloud broker between hand-offs and their answers, and start it again."""
        self._watcher.seen.clear()
        body = _chat(self._long(), max_tokens=200)
        asked = [self._asker.ask("assistant", body, "application/json", deadline_ms="90000") for _ in range(OUTAGE)]
        question = f"cloud broker stops under {OUTAGE} hand-offs"
        if not self._watcher.seen.wait(20):
            self._table.row(question, "no hand-off was seen", None, right=False)
            return
        self._parts.stop("cloud-broker")
        time.sleep(2)
        open_still = sum(question.replies.empty() for question in asked)
        start_broker(self._parts, "cloud-broker", self._stage.cloud_port)
        replies = [_answer(question, 90) for question in asked]
        good = [reply for reply in replies if reply is not None and reply.facts.get("status") == "ok"]
        right = len(good) == OUTAGE and open_still > 0
        said = f"{open_still} open when it went; {len(good)} answered, {OUTAGE - len(good)} lost"
        self._table.row(question, said, good[-1] if good else None, right=right)

    def _ask(self, model: str, body: bytes, content_type: str, **wishes: str) -> Reply | None:
        return _answer(self._asker.ask(model, body, content_type, **wishes))

    def _judge(self, question: str, reply: Reply | None, route: str, reason: str, holds: Any) -> None:
        """Print a row that must be an answer of this route and reason for which `holds` is true."""
        placed = {"status": "ok", "route": route, "reason": reason}
        right = reply is not None and placed.items() <= reply.facts.items() and bool(holds(json.loads(reply.body)))
        self._table.row(question, _shown(reply), reply, right=right)

    def _refused(self, question: str, reply: Reply | None, code: str, *, right: bool = True, note: str = "") -> None:
        error = json.loads(reply.body)["error"] if reply is not None else {}
        right = right and error.get("code") == code
        self._table.row(question, f"{error.get('code')}: {error.get('message')}", reply, right=right, note=note)

    def _model(self, name: str) -> dict[str, str]:
        found: dict[str, str] = json.loads(self._asker.retained.get("models", b"{}")).get(name, {})
        return found

    def _long(self) -> str:
        return (INPUTS / "long-question.txt").read_text("utf-8")


def _answer(question: Question, timeout_s: float = 60) -> Reply | None:
    try:
        return question.answer(timeout_s)
    except queue.Empty:
        return None


def _chat(text: str, max_tokens: int = 48) -> bytes:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, "temperature": 0}
    return json.dumps(body).encode()


def _spoke(value: Any) -> bool:
    return bool(value["choices"][0]["message"]["content"].strip())


def _label(reply: Reply) -> str:
    value = json.loads(reply.body)
    return str(value["outputs"][0]["label"]) if "outputs" in value else ""


def _first(value: Any) -> float:
    """Return the first number in an answer."""
    outputs = value["outputs"]
    while isinstance(outputs, list):
        outputs = outputs[0]
    return float(outputs)


def _shown(reply: Reply | None) -> str:
    """Return an answer as a person would say it."""
    if reply is None:
        return "no answer"
    match json.loads(reply.body):
        case {"outputs": [{"label": label, "score": score}, *_]}:
            return f"{label} ({score:.2f})"
        case {"outputs": list(numbers)}:
            flat = numbers[0] if numbers and isinstance(numbers[0], list) else numbers
            return ", ".join(f"{number:.1f}" for number in flat[:6])
        case {"choices": [{"message": {"content": text}}, *_]}:
            return str(text)
        case other:
            return json.dumps(other)
