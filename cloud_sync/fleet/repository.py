"""Changing a repository: load what is trusted, change it, sign it again, the timestamp last and on condition.

Of two admins at once one wins; the other starts again above what the first one wrote (PROTOCOL 6).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeVar

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from cloud_sync.errors import ConflictError
from cloud_sync.fleet.errors import FleetError
from cloud_sync.fleet.home import Home
from cloud_sync.objects import Objects, read
from cloud_sync.trust import MAX_TIMESTAMP_BYTES, Trust, parse_time
from cloud_sync.trust_store import TrustStore

DELEGATED: Final = {"models": ["models/*/*"], "deployments": ["deployments/*"]}
"""The roles that targets delegates to, and the target names that each may sign."""
ATTEMPTS: Final = 20
LONG_AGO: Final = datetime(1970, 1, 1, tzinfo=UTC)
TIMESTAMP: Final = "metadata/timestamp.json"

T = TypeVar("T")


class Draft:
    """The repository as it was loaded, on its way to its next state."""

    def __init__(self, home: Home, objects: Objects, trust: Trust, store: TrustStore, etag: str, now: datetime) -> None:
        self._home = home
        self._objects = objects
        self._trust = trust
        self._etag = etag
        self.now = now
        self._lifetimes = home.config().lifetimes
        self._changed: set[str] = set()
        self._signers: dict[str, list[CryptoSigner]] = {}
        self._roles: dict[str, Metadata[Any]] = {}
        for role in ("root", "timestamp", "snapshot", "targets", *DELEGATED):
            data = store.load(role)
            if data is None:
                raise FleetError(f"the repository has no role {role}")
            self._roles[role] = Metadata.from_bytes(data)

    def signed(self, role: str) -> Any:
        """Return what a role says; `change` it before altering that."""
        return self._roles[role].signed

    def change(self, role: str) -> Any:
        """Return what a role says, to be altered, and sign it again at the end."""
        self._changed.add(role)
        return self._roles[role].signed

    def sign_with(self, role: str, signers: list[CryptoSigner]) -> None:
        """Sign a role with these keys and not with the one at hand."""
        self._signers[role] = signers

    def targets(self, role: str) -> dict[str, TargetFile]:
        """Return what a role signed, by target name."""
        targets: dict[str, TargetFile] = self._roles[role].signed.targets
        return targets

    def read_target(self, path: str, max_bytes: int) -> bytes:
        """Return a target's bytes as they were loaded, verified."""
        return self._trust.target(path, max_bytes)

    def add_target(self, role: str, path: str, data: bytes) -> None:
        """Upload a file under its hash and let a role sign it under a target name."""
        folder, slash, name = path.rpartition("/")
        with contextlib.suppress(ConflictError):  # Named by its content: what is there is the same.
            self._objects.put(f"targets/{folder}{slash}{hashlib.sha256(data).hexdigest()}.{name}", data, only_new=True)
        self.change(role).targets[path] = TargetFile.from_data(path, data, ["sha256"])

    def remaining(self, role: str) -> float:
        """Return what share of a role's life is left, 1 to 0."""
        left: timedelta = self._roles[role].signed.expires - self.now
        return left / timedelta(days=self._lifetimes.of(role))

    def publish(self) -> None:
        """Sign and upload what changed; raises ConflictError where another admin was first."""
        snapshot: Snapshot = self.signed("snapshot")
        if "root" in self._changed:
            self._put_root()
        for role in ("targets", *DELEGATED):
            if role in self._changed:
                snapshot.meta[f"{role}.json"] = self._put_next(role)
        timestamp: Timestamp = self.signed("timestamp")
        timestamp.snapshot_meta = self._put_next("snapshot")
        self._put_timestamp(timestamp)

    def _put_root(self) -> None:
        root: Root = self.signed("root")
        root.version += 1
        root.expires = self._expires("root")
        data = self._sign("root")
        self._objects.put(f"metadata/{root.version}.root.json", data, only_new=True)

    def _put_next(self, role: str) -> MetaFile:
        """Write a role under the next version that nobody took, also by an admin who broke off."""
        signed = self.signed(role)
        signed.expires = self._expires(role)
        for _ in range(ATTEMPTS):
            signed.version += 1
            data = self._sign(role)
            try:
                self._objects.put(f"metadata/{signed.version}.{role}.json", data, only_new=True)
            except ConflictError:
                continue
            return MetaFile(signed.version, len(data), {"sha256": hashlib.sha256(data).hexdigest()})
        raise ConflictError(f"metadata/{signed.version}.{role}.json")

    def _put_timestamp(self, timestamp: Timestamp) -> None:
        before = timestamp.unrecognized_fields.get("issued")
        if before and parse_time(before) > self.now:
            raise FleetError(f"this machine's clock is behind the last signature, which was issued at {before}")
        timestamp.version += 1
        timestamp.expires = self._expires("timestamp")
        timestamp.unrecognized_fields["issued"] = time_text(self.now)
        self._objects.put(TIMESTAMP, self._sign("timestamp"), if_match=self._etag)

    def _expires(self, role: str) -> datetime:
        return self.now + timedelta(days=self._lifetimes.of(role))

    def _sign(self, role: str) -> bytes:
        metadata = self._roles[role]
        metadata.signatures.clear()
        for signer in self._signers.get(role) or [self._home.signer(role)]:
            metadata.sign(signer, append=True)
        return metadata.to_bytes()


def edit(home: Home, change: Callable[[Draft], T], *, now: Callable[[], datetime] | None = None) -> T:
    """Load, change and publish; again from the start where another admin was first."""
    objects = home.open_objects()
    for _ in range(ATTEMPTS):
        draft = load(home, objects, now=(now or _now)())
        result = change(draft)
        try:
            draft.publish()
        except ConflictError:
            continue
        # Read as a box would, and remembered, so that nobody can show this machine an older state.
        load(home, objects, now=draft.now)
        return result
    raise FleetError(f"{ATTEMPTS} times another admin was first; try again")


def load(home: Home, objects: Objects, *, now: datetime) -> Draft:
    """Return the repository's newest state, verified and never older than this machine has seen."""
    for _ in range(ATTEMPTS):
        before, etag = read(objects, TIMESTAMP, MAX_TIMESTAMP_BYTES)
        store = TrustStore(home.trust)
        # An admin must be able to sign again what has expired, so no time is held against it.
        trust = Trust(objects, store, home.pinned_root(), now=LONG_AGO, built=LONG_AGO)
        trust.refresh()
        for role in DELEGATED:
            trust.targets_of(role)
        if store.load("root") is None:
            store.save("root", home.pinned_root())
        if store.load("timestamp") == before:
            return Draft(home, objects, trust, store, etag, now)
    raise FleetError("the repository changes faster than it can be read; try again")


def time_text(moment: datetime) -> str:
    """Write a UTC time as the signed files do."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def first_metadata(home: Home, now: datetime) -> dict[str, bytes]:
    """Make the first version of every role; return the objects by key, in the order to write them."""
    lifetimes = home.config().lifetimes
    expires = {role: now + timedelta(days=lifetimes.of(role)) for role in lifetimes.__struct_fields__}
    signers = {role: home.new_key(role) for role in expires}
    root = Root(expires=expires["root"], consistent_snapshot=True)
    for role in ("root", "targets", "snapshot", "timestamp"):
        root.add_key(signers[role].public_key, role)
    targets = Targets(expires=expires["targets"], delegations=_delegations(signers))
    signed: dict[str, Any] = {"root": root, "targets": targets}
    signed |= {role: Targets(expires=expires[role]) for role in DELEGATED}
    objects: dict[str, bytes] = {}
    snapshot = Snapshot(expires=expires["snapshot"])
    for role, value in signed.items():
        data = _signed_bytes(value, signers[role])
        objects[f"metadata/1.{role}.json"] = data
        if role != "root":
            snapshot.meta[f"{role}.json"] = MetaFile(1, len(data), {"sha256": hashlib.sha256(data).hexdigest()})
    data = _signed_bytes(snapshot, signers["snapshot"])
    objects["metadata/1.snapshot.json"] = data
    meta = MetaFile(1, len(data), {"sha256": hashlib.sha256(data).hexdigest()})
    timestamp = Timestamp(expires=expires["timestamp"], snapshot_meta=meta)
    timestamp.unrecognized_fields["issued"] = time_text(now)
    objects[TIMESTAMP] = _signed_bytes(timestamp, signers["timestamp"])
    return objects


def _signed_bytes(value: Any, signer: CryptoSigner) -> bytes:
    metadata: Metadata[Any] = Metadata(value)
    metadata.sign(signer)
    return metadata.to_bytes()


def _delegations(signers: dict[str, CryptoSigner]) -> Delegations:
    keys = {signers[role].public_key.keyid: signers[role].public_key for role in DELEGATED}
    roles = {
        role: DelegatedRole(role, [signers[role].public_key.keyid], 1, terminating=True, paths=paths)
        for role, paths in DELEGATED.items()
    }
    return Delegations(dict(keys), roles)
