"""What a box tells its fleet: its whole state in one retained message (PROTOCOL 6). Pure: no I/O, no clock."""

from __future__ import annotations

from typing import Final

import msgspec

SCHEMA: Final = 1
MAX_REPORT_BYTES: Final = 96 << 10
"""Below the strictest public broker's 128 KiB a message."""
MAX_FAILED: Final = 32
MAX_WORDS: Final = 500
FEW_WORDS: Final = 80
GAP_S: Final = 5.0
"""The least time between two reports: a box that changes all the time tells its fleet every so often."""
FIGURES_S: Final = 3600.0
"""How old counts of bytes may be that alone have changed."""


class ModelReport(msgspec.Struct, omit_defaults=True):
    """What the box tells of one model; `p95_ms` and `memory_mb` are what the version showed in its trial here."""

    state: str
    version: str = ""
    digest: str = ""
    target: str = ""
    code: str = ""
    message: str = ""
    p95_ms: float = 0.0
    memory_mb: float = 0.0
    fallbacks: list[str] = []
    """Which of the owner's accelerators it runs without, and why."""
    unprotected: list[str] = []
    """What this box's kernel lacks to confine its worker."""


class FailedVersion(msgspec.Struct, frozen=True, omit_defaults=True):
    """A version that is not tried again on this box, and why; `label` is `name@version` where it is known."""

    digest: str
    code: str
    message: str
    label: str = ""


class RepositoryReport(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the box last saw of its repository; `code` and `message` of its last look if that failed."""

    issued: str = ""
    expires: str = ""
    metadata_versions: dict[str, int] = {}
    clock_trusted: bool = True
    code: str = ""
    message: str = ""


class Bytes(msgspec.Struct):
    """Bytes that crossed to the cloud since the agent started, by purpose."""

    fetched: int = 0
    handed_off: int = 0
    answered: int = 0


class Report(msgspec.Struct, kw_only=True):
    """Everything that a fleet needs to know of a box; `left_out` counts what did not fit."""

    schema: int = SCHEMA
    device: str
    state: str
    software: str = ""
    models: dict[str, ModelReport]
    failed: list[FailedVersion] = []
    repository: RepositoryReport = RepositoryReport()
    bytes: Bytes = msgspec.field(default_factory=Bytes)
    left_out: int = 0


def report_bytes(report: Report, max_bytes: int = MAX_REPORT_BYTES) -> bytes:
    """Return a report as JSON of at most `max_bytes`.

    Where it would be larger, first words are shortened (to end in `…`), then the oldest failures and then models that
    are well are left out, and counted in `left_out`.
    """
    report = _shortened(report, MAX_WORDS)
    report.failed = report.failed[-MAX_FAILED:]
    raw = msgspec.json.encode(report)
    if len(raw) > max_bytes:
        report = _shortened(report, FEW_WORDS)
    while len(raw := msgspec.json.encode(report)) > max_bytes and (report.failed or report.models):
        _leave_out(report, -(-(len(raw) - max_bytes) // 100))
    return raw


class Pacer:
    """Says when a report may go: at once where something changed, but never two within `GAP_S`. Times in seconds."""

    def __init__(self) -> None:
        self._told = b""
        self._told_at = -FIGURES_S

    def wait_s(self, now: float, facts: bytes) -> float | None:
        """Return how long to wait with a report of these facts, its counts left aside; None: nothing is new."""
        age_s = now - self._told_at
        if facts == self._told and age_s < FIGURES_S:
            return None
        return max(0.0, GAP_S - age_s)

    def told(self, now: float, facts: bytes) -> None:
        """Note that a report has gone."""
        self._told, self._told_at = facts, now

    def forget(self) -> None:
        """Tell everything again: who heard it may not be there any more."""
        self._told = b""


def facts_of(report: Report) -> bytes:
    """Return a report without its counts of bytes, which alone are no news."""
    return msgspec.json.encode(msgspec.structs.replace(report, bytes=Bytes()))


def _shortened(report: Report, letters: int) -> Report:
    """Return a copy with shorter words; `models` and `failed` are its own."""
    models = {
        name: msgspec.structs.replace(
            model,
            message=_short(model.message, letters),
            fallbacks=[_short(words, letters) for words in model.fallbacks],
            unprotected=[_short(words, letters) for words in model.unprotected],
        )
        for name, model in report.models.items()
    }
    failed = [msgspec.structs.replace(one, message=_short(one.message, letters)) for one in report.failed]
    return msgspec.structs.replace(report, models=models, failed=failed)


def _short(words: str, letters: int) -> str:
    return words if len(words) <= letters else words[: letters - 1] + "…"


def _leave_out(report: Report, number: int) -> None:
    """Leave out what matters least: failures, then models without a code, then the others."""
    gone = min(number, len(report.failed)) if report.failed else 0
    if gone:
        report.failed = report.failed[gone:]
    else:
        by_weight = sorted(report.models, key=lambda name: bool(report.models[name].code))
        gone = min(number, len(by_weight))
        for name in by_weight[:gone]:
            del report.models[name]
    report.left_out += gone
