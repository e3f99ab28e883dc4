"""What is kept of each version that runs: what it has shown here, and how it does beside the one before; durable."""

from __future__ import annotations

import logging

import msgspec

from agent.config import Watching
from agent.watch import Figures, Regression, Seen, Watch
from cloud_sync.errors import StoreError
from cloud_sync.state import MAX_FAILED, Current, Failure, State

log = logging.getLogger(__name__)

PROVEN_S = 300.0
"""How long the agent must run after an activation before its own end is no sign against the new version."""


class Record(msgspec.Struct):
    """One model's current version; `watch` while it is new, `proven` once the agent ran on with it."""

    digest: str = ""
    decision: str = ""
    proven: bool = True
    served_s: float = 0.0
    figures: Figures = msgspec.field(default_factory=Figures)
    before_digest: str = ""
    before: Figures = msgspec.field(default_factory=Figures)
    watch: Watch | None = None

    def take(self, seen: Seen, rules: Watching, budget_ms: float) -> Regression | None:
        """Take an answer in; return what the version does worse than the one before, once that is certain."""
        self.figures.take(seen)
        regression = self.watch.judge(seen, self.before, rules, budget_ms) if self.watch is not None else None
        if regression is not None:
            self.watch = None
        return regression

    def age(self, passed_s: float, window_s: float) -> None:
        """Let time pass in which the agent ran; the watch ends after its window."""
        self.served_s += passed_s
        self.proven = self.proven or self.served_s >= PROVEN_S
        if self.watch is not None:
            self.watch.watched_s += passed_s
            if self.watch.watched_s > window_s:
                self.watch = None

    def peak_mb(self, digest: str) -> float:
        """Return the most that this version has held here; 0 where it is not known."""
        known = {self.before_digest: self.before.peak_mb, self.digest: self.figures.peak_mb}
        return known.get(digest, 0.0)

    def gone_back(self, digest: str) -> Record:
        """Return the record of the version before, which is current again and is not watched."""
        return Record(digest=digest, figures=self.before if digest == self.before_digest else Figures())


def fresh_record(
    old: Record | None, digest: str, decision: str, *, p95_ms: float, memory_mb: float, watched: bool
) -> Record:
    """Return the record of a version that has passed its trial, beside what the version before it has shown."""
    figures = Figures(trial_ms=p95_ms, trial_mb=memory_mb, peak_mb=memory_mb)
    if old is None:
        return Record(digest=digest, decision=decision, proven=False, figures=figures)
    return Record(
        digest=digest,
        decision=decision,
        proven=False,
        figures=figures,
        before_digest=old.digest,
        before=old.figures,
        watch=Watch() if watched else None,
    )


class Records:
    """The records on the disk, written where they have changed."""

    def __init__(self, state: State) -> None:
        self.failures: dict[str, Failure] = {}
        """The digests that are not tried again, and why; as the disk has them."""
        self._state = state
        self._kept: dict[str, bytes] = {}

    async def open(self) -> None:
        """Read the failures; raises StoreError."""
        self.failures = await self._state.failed()

    async def fail(self, digest: str, failure: Failure) -> None:
        """Note that a version failed here; where the disk does not take it, the next start tries it again."""
        self._keep_failure(digest, failure)
        try:
            await self._state.mark_failed(digest, failure)
        except StoreError as error:
            log.warning("the failure of %s is not kept: %s", failure.label, error)

    async def go_back(self, name: str, current: Current, record: Record, bad: tuple[str, Failure]) -> None:
        """Note at once that a version failed and that the one before is current; where the disk takes it."""
        self._keep_failure(*bad)
        raw = msgspec.json.encode(record)
        try:
            await self._state.activate(name, current, raw, bad)
        except StoreError as error:
            log.warning("the way back from %s is not kept: %s", bad[1].label, error)
        else:
            self._kept[name] = raw

    def _keep_failure(self, digest: str, failure: Failure) -> None:
        self.failures.pop(digest, None)
        self.failures[digest] = failure
        while len(self.failures) > MAX_FAILED:
            del self.failures[next(iter(self.failures))]

    async def forgive(self, digest: str) -> None:
        """Let a version be tried again; raises StoreError."""
        await self._state.clear_failed(digest)
        self.failures.pop(digest, None)

    async def load(self, name: str, digest: str) -> Record:
        """Return the record of a version; a new one where there is none, or it is of another version."""
        raw = await self._state.record(name)
        if raw is not None:
            try:
                record = msgspec.json.decode(raw, type=Record)
            except msgspec.MsgspecError as error:
                log.warning("the record of %s cannot be read: %s", name, error)
            else:
                if record.digest == digest:
                    self._kept[name] = raw
                    return record
        return Record(digest=digest)

    async def save(self, name: str, record: Record) -> None:
        """Keep a record if it has changed; a disk that does not take it costs no more than what it would tell."""
        raw = msgspec.json.encode(record)
        if not record.digest or self._kept.get(name) == raw:
            return
        try:
            await self._state.keep_record(name, raw)
        except StoreError as error:
            log.warning("the record of %s is not kept: %s", name, error)
        else:
            self._kept[name] = raw

    async def activate(self, name: str, current: Current, record: Record) -> None:
        """Note durably and at once what is current and its record; raises StoreError."""
        raw = msgspec.json.encode(record)
        await self._state.activate(name, current, raw)
        self._kept[name] = raw
