"""Certificate authorities, devices and pools that exist for one test."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from cloud_sync.deployment import Pool, PoolKey
from cloud_sync.gateway.authority import Authority
from cloud_sync.identity import Identity, SigningKey
from cloud_sync.sealing import Packed, seal_request
from cloud_sync.wire import HandoffHeader

ISSUED = datetime(2026, 11, 1, tzinfo=UTC)
NOW = datetime(2026, 11, 22, tzinfo=UTC)
IDENT = "00112233445566778899aabbccddeeff"


class TestCA:
    """A fleet's certificate authority."""

    __test__ = False

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Test fleet")])
        builder = self._builder(self.name, self.key.public_key(), 3650)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        self.certificate = builder.sign(self.key, hashes.SHA256())

    def authority(self) -> Authority:
        return Authority([self.certificate])

    def certify(
        self,
        device: str,
        key: SigningKey,
        *,
        days: int = 365,
        usage: ObjectIdentifier = ExtendedKeyUsageOID.CLIENT_AUTH,
    ) -> bytes:
        """Return a certificate in DER."""
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, device)])
        builder = self._builder(name, key.public_key(), days)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(Encoding.DER)

    def identity(self, device: str, *, days: int = 365, ed: bool = False) -> Identity:
        key: SigningKey = ed25519.Ed25519PrivateKey.generate() if ed else ec.generate_private_key(ec.SECP256R1())
        return Identity(device, self.certify(device, key, days=days), key)

    def save(self, folder: Path) -> Path:
        """Write `ca.pem`; return its path."""
        path = folder / "ca.pem"
        path.write_bytes(self.certificate.public_bytes(Encoding.PEM))
        return path

    def _builder(
        self, name: x509.Name, key: ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey, days: int
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self.name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(ISSUED)
            .not_valid_after(ISSUED + timedelta(days=days))
        )


def save_device(folder: Path, certificate: bytes, key: SigningKey) -> tuple[Path, Path]:
    """Write a device's certificate and key in PEM; return their paths."""
    pem = x509.load_der_x509_certificate(certificate).public_bytes(Encoding.PEM)
    (folder / "device.pem").write_bytes(pem)
    (folder / "device.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return folder / "device.pem", folder / "device.key"


class TestPool:
    """A pool of gateways: its private key, and how deployments name it."""

    __test__ = False

    def __init__(self, name: str = "default", kid: str = "k1", not_after: str = "") -> None:
        self.private = X25519PrivateKey.generate()
        self.kid = kid
        self.public = self.private.public_key().public_bytes_raw()
        self.pool = Pool(name, f"spillway/handoff/{name}", [PoolKey(kid, self.public.hex(), not_after)])

    def save(self, folder: Path) -> Path:
        """Write the key file as `spillway-fleet pool-key` does; return its path."""
        path = folder / f"{self.kid}.key"
        private = self.private.private_bytes_raw().hex()
        path.write_text(f'{{"kid":"{self.kid}","private":"{private}","public":"{self.public.hex()}"}}\n')
        return path


def header(**changes: object) -> HandoffHeader:
    """Return a hand-off's header with some fields changed."""
    fields: dict[str, object] = {
        "kid": "k1",
        "id": IDENT,
        "device": "pi-7",
        "pool": "default",
        "model": "assistant",
        "ttl_ms": 30_000,
        "content_type": "text/plain",
        "stream": False,
    }
    return HandoffHeader(**(fields | changes))  # type: ignore[arg-type]


def sealed(
    identity: Identity, pool: TestPool, body: bytes = b"hello", *, secret: bytes | None = None, **changes: object
) -> bytes:
    """Return a hand-off message as a box makes it."""
    return seal_request(
        header(**({"kid": pool.kid, "device": identity.device} | changes)),
        Packed(0, body),
        public_key=pool.public,
        secret=secret or os.urandom(32),
        certificate=identity.certificate,
        sign=identity.sign,
    )
