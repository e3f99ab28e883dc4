"""Questions with the answers that are right, from a file of JSON lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import msgspec

from cloud_sync.fleet.errors import FleetError
from models.body import JSON
from models.manifest import Golden

_LABEL: Final = "label"
_FILE: Final = "file"
_KINDS: Final = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".wav": "audio/wav",
    ".txt": "text/plain",
}
_UNRECORDED: Final = msgspec.Raw(b"null")


class Sample(msgspec.Struct, frozen=True):
    """One line: a question, and what is right; `label` is None where the line has none."""

    question: Golden
    label: Any = None


def load_samples(path: Path, *, labelled: bool) -> list[Sample]:
    """Read a set; each line has `inputs` (or `messages`) or `file`, and `label`. Raises FleetError naming the line."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise FleetError(f"{path} cannot be read: {error.strerror}") from error
    samples = [_sample(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not samples:
        raise FleetError(f"{path} holds no samples")
    for number, sample in enumerate(samples, 1):
        if labelled and sample.label is None:
            raise FleetError(f"{path}, sample {number}: label is missing")
    return samples


def _sample(path: Path, number: int, line: bytes) -> Sample:
    try:
        members = msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise FleetError(f"{path}, line {number}: {error}") from error
    label = members.pop(_LABEL, None)
    if _FILE in members:
        return Sample(_from_file(path, number, str(members[_FILE])), label)
    if not {"inputs", "messages"} & members.keys():
        raise FleetError(f"{path}, line {number}: has neither inputs, messages nor file")
    return Sample(Golden(JSON, msgspec.json.encode(members), _UNRECORDED, 0.0), label)


def _from_file(path: Path, number: int, name: str) -> Golden:
    file = path.parent / name
    kind = _KINDS.get(file.suffix.lower())
    if kind is None:
        raise FleetError(f"{path}, line {number}: {name} is none of {', '.join(_KINDS)}")
    try:
        return Golden(kind, file.read_bytes(), _UNRECORDED, 0.0)
    except OSError as error:
        raise FleetError(f"{path}, line {number}: {file} cannot be read: {error.strerror}") from error
