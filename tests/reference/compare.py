"""Asks our sessions what the reference was asked: `python -m tests.reference.compare FOLDER` prints a table."""

from __future__ import annotations

import argparse
import base64
import io
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from PIL import Image

from models.body import parse_body
from models.errors import RequestError
from models.evaluate import matches
from models.manifest import Limits, Manifest
from models.record import answer_alone
from models.request import Request
from models.session import Session, open_session
from tests.fakes.artifacts import manifest_of
from tests.reference.case import CASES, Case, body_of, read_cases

TOLERANCE = 1e-4


@dataclass
class Found:
    """How one model's answers compare: cases, the largest difference of a number, and what was wrong."""

    cases: int = 0
    largest: float = 0.0
    problems: list[str] = field(default_factory=list)


def compare(folder: Path) -> Found:
    """Ask the model in a folder every recorded question."""
    recorded = read_cases(folder)
    manifest = msgspec.structs.replace(
        _manifest(folder), task=recorded.task, format=recorded.format, limits=Limits(**recorded.limits)
    )
    session = open_session(folder, manifest, manifest.variants[0], threads=1, slots=4)
    found = Found()
    try:
        for number, case in enumerate(recorded.cases):
            _judge(found, session, case, f"{folder.name}[{number}]")
    finally:
        session.close()
    return found


def _manifest(folder: Path) -> Manifest:
    """List every file of the folder but the cases."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CASES)
    files = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    return manifest_of(files, name=folder.name, frame_bytes=1 << 20)


def _judge(found: Found, session: Session, case: Case, name: str) -> None:
    found.cases += 1
    outputs, code, message = _ask(session, case)
    if code != case.error:
        found.problems.append(f"{name}: expected {case.error or 'an answer'}, got {code or 'one'}: {message}")
    elif not code:
        problem = matches(seen(case.expected), seen(outputs), TOLERANCE)
        if problem is not None:
            found.problems.append(f"{name}: {problem}; asked {str(case.body)[:200]}")
        else:
            found.largest = max(found.largest, difference(case.expected, outputs))


def seen(value: Any) -> Any:
    """Return an answer with its masks as rows of pixels, since the same mask can be packed in many ways."""
    if isinstance(value, dict) and isinstance(value.get("mask"), str):
        mask = Image.open(io.BytesIO(base64.b64decode(value["mask"])))
        return {**value, "mask": [mask.mode, mask.size, np.packbits(np.asarray(mask) > 0, axis=1).tolist()]}
    if isinstance(value, dict) and isinstance(value.get("box"), dict):
        # Exactly these pixels, where a trial on a box lets each corner be off by one.
        return {**value, "box": sorted(value["box"].items())}
    if isinstance(value, dict):
        return {name: seen(member) for name, member in value.items()}
    return [seen(member) for member in value] if isinstance(value, list) else value


def _ask(session: Session, case: Case) -> tuple[Any, str, str]:
    """Return (outputs, code, message)."""
    try:
        body = parse_body(case.content_type, body_of(case))
    except RequestError as error:
        return None, error.code, error.message
    request = Request(model="m", content_type=body.content_type, body=body.body, dialect=body.dialect)
    piece = answer_alone(session, request)
    if piece.code:
        return None, piece.code, piece.message
    return msgspec.json.decode(piece.body)["outputs"], "", ""


def difference(expected: Any, actual: Any) -> float:
    """Return the largest difference of two numbers at one place; ranked labels are compared by label."""
    if isinstance(expected, dict):
        return max((difference(value, actual[name]) for name, value in expected.items()), default=0.0)
    if isinstance(expected, list):
        if expected and isinstance(expected[0], dict) and expected[0].keys() == {"label", "score"}:
            given = {entry["label"]: entry["score"] for entry in actual}
            pairs = [(entry["score"], given.get(entry["label"], entry["score"])) for entry in expected]
        else:
            pairs = list(zip(expected, actual, strict=True))
        return max((difference(want, got) for want, got in pairs), default=0.0)
    if isinstance(expected, int | float) and not isinstance(expected, bool):
        return abs(float(expected) - float(actual))
    return 0.0


def main() -> None:
    """Compare every subject of a folder; exit 1 where an answer differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    total = Found()
    print("| model | cases | largest difference | wrong |\n|---|---|---|---|")
    for folder in sorted(path.parent for path in arguments.folder.rglob(CASES)):
        found = compare(folder)
        print(f"| {folder.name} | {found.cases} | {found.largest:.1e} | {len(found.problems)} |")
        total.cases += found.cases
        total.largest = max(total.largest, found.largest)
        total.problems += found.problems
    print(f"| all | {total.cases} | {total.largest:.1e} | {len(total.problems)} |")
    print(*total.problems[:40], sep="\n")
    sys.exit(1 if total.problems or not total.cases else 0)


if __name__ == "__main__":
    main()
