"""A TUF repository whose keys the test holds, so that it can sign what an attacker would."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from typing import Any

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

from tests.fakes.objects import MemoryObjects

NOW = datetime(2027, 1, 10, tzinfo=UTC)
PATHS = {"models": ["models/*/*"], "deployments": ["deployments/*"]}
TOP = ("root", "targets", "snapshot", "timestamp")


class Signing:
    """Every role with its keys; `publish` signs the state as it is and puts it into `objects`."""

    def __init__(self, *, threshold: int = 1) -> None:
        self.objects = MemoryObjects()
        self.threshold = threshold
        self.keys = {role: [CryptoSigner.generate_ed25519() for _ in range(threshold)] for role in (*TOP, *PATHS)}
        self.now = NOW
        self.issued = True
        self.root = Root(expires=NOW + timedelta(days=900), consistent_snapshot=True)
        for role in TOP:
            for key in self.keys[role]:
                self.root.add_key(key.public_key, role)
            self.root.roles[role].threshold = threshold
        self.targets = Targets(expires=NOW + timedelta(days=300))
        self.delegated = {role: Targets(expires=NOW + timedelta(days=300)) for role in PATHS}
        self._delegate()
        self.snapshot = Snapshot(expires=NOW + timedelta(days=30))
        self.timestamp = Timestamp(expires=NOW + timedelta(days=7), snapshot_meta=MetaFile(1))
        self.put_root()
        self.pinned = self.objects.held["metadata/1.root.json"]
        for role in ("targets", *PATHS):
            self.put_role(role)
        self.put_top()

    def signed(self, role: str) -> Any:
        """What a role says."""
        if role in self.delegated:
            return self.delegated[role]
        return getattr(self, role)

    def sign(self, role: str, signers: list[CryptoSigner] | None = None) -> bytes:
        """The role's metadata with the signatures of its keys, or of others."""
        metadata: Metadata[Any] = Metadata(self.signed(role))
        for signer in self.keys[role] if signers is None else signers:
            metadata.sign(signer, append=True)
        return metadata.to_bytes()

    def add(self, role: str, path: str, data: bytes) -> None:
        """Let a role sign a target and upload it."""
        self.signed(role).targets[path] = TargetFile.from_data(path, data, ["sha256"])
        folder, slash, name = path.rpartition("/")
        self.objects.held[f"targets/{folder}{slash}{hashlib.sha256(data).hexdigest()}.{name}"] = data

    def publish(self, *roles: str) -> None:
        """Raise the versions of these roles, of the snapshot and the timestamp, and put all."""
        for role in roles:
            self.signed(role).version += 1
            self.put_role(role)
        self.snapshot.version += 1
        self.timestamp.version += 1
        self.put_top()

    def put_root(self, signers: list[CryptoSigner] | None = None) -> None:
        """Sign and put the root under its version."""
        self.objects.held[f"metadata/{self.root.version}.root.json"] = self.sign("root", signers)

    def put_role(self, role: str) -> None:
        """Sign and put a targets role under its version."""
        data = self.sign(role)
        version = self.signed(role).version
        self.objects.held[f"metadata/{version}.{role}.json"] = data

    def put_top(self) -> None:
        """Sign and put the snapshot and the timestamp over what is."""
        for role in ("targets", *PATHS):
            version = self.signed(role).version
            self.snapshot.meta[f"{role}.json"] = _meta(version, self.objects.held[f"metadata/{version}.{role}.json"])
        data = self.sign("snapshot")
        self.objects.held[f"metadata/{self.snapshot.version}.snapshot.json"] = data
        self.timestamp.snapshot_meta = _meta(self.snapshot.version, data)
        self.put_timestamp()

    def put_timestamp(self) -> None:
        """Sign and put the timestamp as it is."""
        if self.issued:
            self.timestamp.unrecognized_fields["issued"] = self.now.strftime("%Y-%m-%dT%H:%M:%SZ")
        self.objects.held["metadata/timestamp.json"] = self.sign("timestamp")

    def rotate(self, *roles: str) -> None:
        """Give roles new keys by a new root."""
        old_root = self.keys["root"]
        for role in roles:
            for key in self.keys[role]:
                self.root.revoke_key(key.public_key.keyid, role)
            self.keys[role] = [CryptoSigner.generate_ed25519() for _ in range(self.threshold)]
            for key in self.keys[role]:
                self.root.add_key(key.public_key, role)
            self.root.roles[role].threshold = self.threshold
        self.root.version += 1
        self.put_root([*old_root, *self.keys["root"]] if "root" in roles else None)

    def _delegate(self) -> None:
        keys = {key.public_key.keyid: key.public_key for role in PATHS for key in self.keys[role]}
        roles = {
            role: DelegatedRole(
                role, [key.public_key.keyid for key in self.keys[role]], self.threshold, terminating=True, paths=paths
            )
            for role, paths in PATHS.items()
        }
        self.targets.delegations = Delegations(dict(keys), roles)


def _meta(version: int, data: bytes) -> MetaFile:
    return MetaFile(version, len(data), {"sha256": hashlib.sha256(data).hexdigest()})
