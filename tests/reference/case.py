"""What a reference answered: the values that both sides of the comparison read and write.

Used by the reference's own environment too, so nothing outside the standard library is imported here.
"""

from __future__ import annotations

import base64
import importlib
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CASES = "cases.json"
DIGITS = 7
"""Of a number in an answer, more than the tolerance can tell apart."""


@dataclass(frozen=True)
class Case:
    """One question to one model: a JSON body, or `content` of a `content_type`; and its answer.

    `expected` is what must stand under `outputs`; `error` is the code of PROTOCOL 3 that is right instead of it.
    `made` names a content that code makes (`pictures`, `waves`), so that it need not be kept.
    """

    body: Any = None
    expected: Any = None
    error: str = ""
    content_type: str = "application/json"
    content: bytes = b""
    made: str = ""


@dataclass(frozen=True)
class Subject:
    """One small model and its questions; `make` writes its files into the folder and returns them, with answers.

    `make` gets the folder, a source of chance and how many generated inputs are wanted. All chance comes from there.
    A subject that is `live` alone is not among the recorded ones, which must stay small.
    """

    name: str
    task: str
    make: Callable[[Path, random.Random, int], Sequence[Case]]
    format: str = "onnx"
    limits: dict[str, int] = field(default_factory=dict)
    live: bool = False


@dataclass(frozen=True)
class Recorded:
    """A subject as it lies in its folder, beside the model's files."""

    task: str
    format: str
    limits: dict[str, int]
    cases: list[Case]


def write_cases(folder: Path, subject: Subject, cases: Sequence[Case]) -> None:
    """Write a subject's questions and answers, one a line."""
    head = json.dumps({"task": subject.task, "format": subject.format, "limits": subject.limits})
    lines = ",\n".join(_dump(_members(case)) for case in cases)
    (folder / CASES).write_text(f'{head[:-1]}, "cases": [\n{lines}\n]}}\n', encoding="utf-8")


def read_cases(folder: Path) -> Recorded:
    """Read what `write_cases` wrote."""
    values = json.loads((folder / CASES).read_text(encoding="utf-8"))
    cases = [_case(members) for members in values["cases"]]
    return Recorded(task=values["task"], format=values["format"], limits=values["limits"], cases=cases)


def body_of(case: Case) -> bytes:
    """Return the bytes that are asked."""
    if case.made:
        maker = "waves" if case.content_type.startswith("audio/") else "pictures"
        content: bytes = importlib.import_module(f"tests.reference.{maker}").made(case.made)
        return content
    return case.content or json.dumps(case.body, ensure_ascii=False).encode()


def _members(case: Case) -> dict[str, Any]:
    members: dict[str, Any] = {"error": case.error} if case.error else {"expected": shortened(case.expected)}
    if case.made:
        return {"content_type": case.content_type, "made": case.made, **members}
    if case.content:
        return {"content_type": case.content_type, "base64": base64.b64encode(case.content).decode(), **members}
    return {"body": case.body, **members}


def _case(members: dict[str, Any]) -> Case:
    return Case(
        body=members.get("body"),
        expected=members.get("expected"),
        error=members.get("error", ""),
        content_type=members.get("content_type", "application/json"),
        content=base64.b64decode(members.get("base64", "")),
        made=members.get("made", ""),
    )


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def shortened(value: Any) -> Any:
    """Return an answer as plain JSON values, its numbers with no more digits than are compared."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(name): shortened(member) for name, member in value.items()}
    if isinstance(value, list | tuple):
        return [shortened(member) for member in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("the reference answered with a value that is no number")
        return round(value, DIGITS)
    return value
