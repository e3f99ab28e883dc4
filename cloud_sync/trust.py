"""What the fleet's admins signed, and nothing else: the client rules of TUF 1.0 over a durable store.

The rules are python-tuf's `TrustedMetadataSet`, which does no I/O; limits, time, floors and storage are ours.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Final, NamedTuple
from urllib.parse import quote

import msgspec
from tuf.api import exceptions
from tuf.api.metadata import Metadata, Root, Snapshot, TargetFile, Targets, Timestamp
from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet
from tuf.ngclient.config import EnvelopeType

from cloud_sync.errors import FetchError, TrustError
from cloud_sync.objects import Objects, read
from cloud_sync.retry import Retry
from cloud_sync.trust_store import Floor, TrustStore

MAX_ROOT_BYTES: Final = 512 << 10
MAX_TIMESTAMP_BYTES: Final = 16 << 10
MAX_SNAPSHOT_BYTES: Final = 2 << 20
MAX_TARGETS_BYTES: Final = 8 << 20
MAX_ROOT_ROTATIONS: Final = 1024
MAX_DELEGATIONS: Final = 32
ALGORITHMS: Final = ("sha256", "sha512")
"""The digests that a target may be named by, in the order in which they are taken."""
ABSENT: Final = frozenset({"not_found", "forbidden"})
"""What a bucket says of an object that is not there; without the right to list it says forbidden."""

Delegator = Root | Targets


class TrustFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What was accepted: role versions, when the timestamp was issued and expires, and how the clock stands."""

    versions: dict[str, int]
    issued: str
    expires: str
    clock_trusted: bool


class Signed(NamedTuple):
    """A target and the role, with its delegator, that signed it."""

    file: TargetFile
    role: str
    parent: str


class Trust:
    """One pass over a repository. `now` is the system clock's UTC time at the start, `built` the build's."""

    def __init__(
        self,
        objects: Objects,
        store: TrustStore,
        pinned: bytes,
        *,
        now: datetime,
        built: datetime,
        retry: Retry | None = None,
    ) -> None:
        self._objects = objects
        self._retry = retry or Retry()
        self._store = store
        self._now = now
        self._built = built
        self._used: set[str] = set()
        self._raw: dict[str, bytes] = {}
        self._set = _first_root(store.load(Root.type), pinned)

    def refresh(self) -> TrustFacts:
        """Bring root, timestamp, snapshot and targets up to date; raises TrustError, FetchError or StoreError."""
        self._refresh_root()
        self._set.reference_time = self._reference()
        self._refresh_timestamp()
        self._set.reference_time = self._reference()
        self._refresh_snapshot()
        self._load_targets(Targets.type, Root.type)
        return self._facts()

    def targets_of(self, role: str) -> dict[str, TargetFile]:
        """Return what a role delegated by targets signed, by target name; raises TrustError."""
        return self._load_targets(role, Targets.type).targets

    def find(self, path: str) -> Signed | None:
        """Return what was signed under a target name, or None: delegations in order, depth first (TUF 1.0, 5.6.7)."""
        to_visit = [(Targets.type, Root.type)]
        visited: set[str] = set()
        while to_visit and len(visited) <= MAX_DELEGATIONS:
            role, parent = to_visit.pop()
            if role in visited:
                continue
            targets = self._load_targets(role, parent)
            if path in targets.targets:
                return Signed(targets.targets[path], role, parent)
            visited.add(role)
            children: list[tuple[str, str]] = []
            for child, terminating in targets.delegations.get_roles_for_target(path) if targets.delegations else ():
                children.append((child, role))
                if terminating:
                    to_visit = []
                    break
            to_visit.extend(reversed(children))
        return None

    def target(self, path: str, max_bytes: int) -> bytes:
        """Return a signed file's bytes; raises TrustError `missing_target`, `arbitrary_software` or `endless_data`."""
        target = self._signed(path).file
        algorithm = next((name for name in ALGORITHMS if target.hashes.get(name)), "")
        if not algorithm:
            raise TrustError("bad_metadata", f"{path} is signed without a {' or '.join(ALGORITHMS)}")
        digest = target.hashes[algorithm]
        if target.length > max_bytes:
            raise TrustError("endless_data", f"{path} is signed with {target.length} bytes, over {max_bytes}")
        self._used.add(digest)
        return self._store.target(digest, algorithm) or self._fetch_target(target, digest)

    def accept_sequence(self, path: str, sequence: int) -> None:
        """Hold a deployment's sequence against its floor, and raise that; raises TrustError `rollback`."""
        signed = self._signed(path)
        delegator = self._delegator(signed.parent)
        signers = _signers(delegator, signed.role, self._raw[signed.role])
        self._raise_floors([Floor(path, sequence, signed.role, signers)], delegator)

    def forget_unused(self) -> None:
        """Drop the kept signed files that this pass did not ask for."""
        self._store.forget_targets(self._used)

    def _refresh_root(self) -> None:
        newest: bytes | None = None
        try:
            for _ in range(MAX_ROOT_ROTATIONS):
                data = self._fetch_root(self._set.root.version + 1)
                if data is None:
                    break
                before = self._set.root
                with _judged(Root.type):
                    self._set.update_root(data)
                for delegator in (before, self._set.root):
                    _signers(delegator, Root.type, data)
                newest = data
            else:
                raise TrustError("endless_data", f"over {MAX_ROOT_ROTATIONS} versions of root in one pass")
        finally:
            if newest is not None:
                self._store.save(Root.type, newest)
        self._raise_floors([Floor(Root.type, self._set.root.version, Root.type, [])], self._set.root)

    def _fetch_root(self, version: int) -> bytes | None:
        try:
            return self._fetch(f"{version}.root", MAX_ROOT_BYTES)
        except FetchError as error:
            if error.code in ABSENT:
                return None
            raise

    def _refresh_timestamp(self) -> None:
        data = self._store.load(Timestamp.type)
        if data is not None:
            with contextlib.suppress(exceptions.RepositoryError):
                self._set.update_timestamp(data)
        fetched = self._fetch(Timestamp.type, MAX_TIMESTAMP_BYTES)
        with _judged(Timestamp.type):
            try:
                self._set.update_timestamp(fetched)
                data = fetched
            except exceptions.EqualVersionNumberError:
                pass  # What is kept stays.
        timestamp = self._set.timestamp
        signers = _signers(self._set.root, Timestamp.type, data or fetched)
        floors = [
            Floor(Timestamp.type, timestamp.version, Timestamp.type, signers, _issued(timestamp)),
            Floor(Snapshot.type, timestamp.snapshot_meta.version, Timestamp.type, signers),
        ]
        self._check_floors(floors, self._set.root)
        self._store.save(Timestamp.type, data or fetched)
        self._store.put_floors(floors)

    def _refresh_snapshot(self) -> None:
        data = self._store.load(Snapshot.type)
        if data is None or not _taken(lambda kept: self._set.update_snapshot(kept, trusted=True), data):
            meta = self._set.timestamp.snapshot_meta
            data = self._fetch(f"{meta.version}.snapshot", _limit(meta.length, MAX_SNAPSHOT_BYTES))
            with _judged(Snapshot.type, mixed=_version(data) != meta.version):
                self._set.update_snapshot(data)
        signers = _signers(self._set.root, Snapshot.type, data)
        floors = [Floor(name, meta.version, Snapshot.type, signers) for name, meta in self._set.snapshot.meta.items()]
        self._check_floors(floors, self._set.root)
        self._store.save(Snapshot.type, data)
        self._store.put_floors(floors)

    def _load_targets(self, role: str, parent: str) -> Targets:
        if not self._set.contains(role, parent):
            data = self._store.load(role)
            if data is None or not _taken(lambda kept: self._set.update_delegated_targets(kept, role, parent), data):
                data = self._fetch_targets(role, parent)
            _signers(self._delegator(parent), role, data)
            self._raw[role] = data
        targets = self._set[role]
        assert isinstance(targets, Targets)
        return targets

    def _fetch_targets(self, role: str, parent: str) -> bytes:
        meta = self._set.snapshot.meta.get(f"{role}.json")
        if meta is None:
            raise TrustError("mix_and_match", f"the snapshot does not know the role {role}")
        data = self._fetch(f"{meta.version}.{quote(role, safe='')}", _limit(meta.length, MAX_TARGETS_BYTES))
        with _judged(role, mixed=True):
            self._set.update_delegated_targets(data, role, parent)
        self._store.save(role, data)
        return data

    def _fetch_target(self, target: TargetFile, digest: str) -> bytes:
        folder, slash, name = target.path.rpartition("/")
        data = self._read(f"targets/{folder}{slash}{digest}.{name}", target.length)
        try:
            target.verify_length_and_hashes(data)
        except exceptions.LengthOrHashMismatchError as error:
            raise TrustError("arbitrary_software", f"{target.path}: {error}") from error
        self._store.keep_target(digest, data)
        return data

    def _fetch(self, name: str, max_bytes: int) -> bytes:
        return self._read(f"metadata/{name}.json", max_bytes)

    def _read(self, key: str, max_bytes: int) -> bytes:
        return self._retry.run(lambda: read(self._objects, key, max_bytes)[0])

    def _signed(self, path: str) -> Signed:
        signed = self.find(path)
        if signed is None:
            raise TrustError("missing_target", f"{path} was not signed by those who may sign it")
        return signed

    def _delegator(self, role: str) -> Delegator:
        delegator = self._set[role]
        assert isinstance(delegator, Delegator)
        return delegator

    def _raise_floors(self, floors: list[Floor], delegator: Delegator) -> None:
        self._check_floors(floors, delegator)
        self._store.put_floors(floors)

    def _check_floors(self, floors: list[Floor], delegator: Delegator) -> None:
        for floor in floors:
            for known in self._store.floors(floor.name):
                if floor.version < known.version and _binds(known, delegator):
                    raise TrustError("rollback", f"{floor.name} is version {floor.version}, {known.version} was seen")

    def _reference(self) -> datetime:
        """Return the time that metadata is held against: never before the floor."""
        return max(self._now, self._floor_time())

    def _floor_time(self) -> datetime:
        """Return the highest of the build's time and the signed times seen; no clock raises it (DESIGN 9)."""
        floors = [floor for floor in self._store.floors(Timestamp.type) if _binds(floor, self._set.root)]
        return max([self._built, *(parse_time(floor.issued) for floor in floors if floor.issued)])

    def _facts(self) -> TrustFacts:
        timestamp = self._set.timestamp
        versions = {role.type: role.version for role in (self._set.root, timestamp, self._set.snapshot)}
        versions |= {name.removesuffix(".json"): meta.version for name, meta in self._set.snapshot.meta.items()}
        return TrustFacts(
            versions=versions,
            issued=_issued(timestamp),
            expires=timestamp.expires.strftime("%Y-%m-%dT%H:%M:%SZ"),
            clock_trusted=self._now >= self._floor_time(),
        )


def _first_root(kept: bytes | None, pinned: bytes) -> TrustedMetadataSet:
    """Take the root kept from the last pass, unless it is damaged or the pinned one is newer."""
    with _judged("pinned root"):
        first = TrustedMetadataSet(pinned, EnvelopeType.METADATA)
    if kept is not None:
        with contextlib.suppress(exceptions.RepositoryError):
            later = TrustedMetadataSet(kept, EnvelopeType.METADATA)
            if later.root.version > first.root.version:
                return later
    return first


def _taken(take: Callable[[bytes], object], data: bytes) -> bool:
    """Whether a kept file still holds as it is."""
    try:
        take(data)
    except exceptions.RepositoryError:
        return False
    return True


def _limit(signed: int | None, ours: int) -> int:
    return min(signed or ours, ours)


def _version(data: bytes) -> int | None:
    try:
        metadata: Metadata[Snapshot] = Metadata.from_bytes(data)
    except exceptions.RepositoryError:
        return None
    return metadata.signed.version


def _signers(delegator: Delegator, role: str, data: bytes) -> list[str]:
    """Return the keys that signed accepted metadata; raises TrustError where one key counted under several names."""
    metadata: Metadata[Root] = Metadata.from_bytes(data)
    result = delegator.get_verification_result(role, metadata.signed_bytes, metadata.signatures)
    distinct = {msgspec.json.encode(key.to_dict(), order="sorted") for key in result.signed.values()}
    if len(distinct) < result.threshold:
        raise TrustError("bad_signature", f"{role}: {len(distinct)} of {result.threshold} keys, one under two names")
    return sorted(result.signed)


def _binds(floor: Floor, delegator: Delegator) -> bool:
    if floor.role == Root.type:
        return True
    try:
        role = delegator.get_delegated_role(floor.role)
    except ValueError:
        return False
    return len(set(floor.signers) & set(role.keyids)) >= role.threshold


def _issued(timestamp: Timestamp) -> str:
    issued = timestamp.unrecognized_fields.get("issued", "")
    if issued:
        parse_time(issued)
    return str(issued)


def parse_time(issued: object) -> datetime:
    """Return the time that a signed `issued` field names; raises TrustError `bad_metadata`."""
    try:
        return datetime.strptime(str(issued), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except ValueError as error:
        raise TrustError("bad_metadata", f"timestamp: issued {issued!r} is no time") from error


@contextlib.contextmanager
def _judged(role: str, *, mixed: bool = False) -> Iterator[None]:
    """Turn python-tuf's errors into ours; `mixed` says that a wrong version or hash means files of two states."""
    try:
        yield
    except exceptions.ExpiredMetadataError as error:
        raise TrustError("freeze", f"{role}: {error}") from error
    except exceptions.UnsignedMetadataError as error:
        raise TrustError("bad_signature", f"{role}: {error}") from error
    except exceptions.LengthOrHashMismatchError as error:
        raise TrustError("mix_and_match", f"{role}: {error}") from error
    except exceptions.BadVersionNumberError as error:
        raise TrustError("mix_and_match" if mixed else "rollback", f"{role}: {error}") from error
    except exceptions.RepositoryError as error:
        raise TrustError("bad_metadata", f"{role}: {error}") from error
