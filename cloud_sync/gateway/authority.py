"""Whether a certificate makes its holder the device it says: issued by the fleet's CA, in time, under that name."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509 import BasicConstraints, ExtendedKeyUsage
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import Criticality, ExtensionPolicy, Policy, PolicyBuilder, Store, VerificationError

from cloud_sync.errors import HandoffError

MAX_CERTIFICATE_BYTES: Final = 8192
MAX_KNOWN: Final = 10_000


def _check_usage(_policy: Policy, _certificate: x509.Certificate, usage: ExtendedKeyUsage | None) -> None:
    """Refuse a certificate made for another use, such as the broker's own."""
    if usage is not None and ExtendedKeyUsageOID.CLIENT_AUTH not in usage:
        raise ValueError("is not for client authentication")


_ISSUERS: Final = ExtensionPolicy.permit_all().require_present(BasicConstraints, Criticality.AGNOSTIC, None)
_DEVICES: Final = ExtensionPolicy.permit_all().may_be_present(ExtendedKeyUsage, Criticality.AGNOSTIC, _check_usage)


class Authority:
    """The fleet's CA certificates. Remembers whom it has checked, so that a busy device costs little."""

    def __init__(self, issuers: list[x509.Certificate]) -> None:
        self._store = Store(issuers)
        self._known: OrderedDict[bytes, x509.Certificate] = OrderedDict()

    def check(self, certificate: bytes, device: str, now: datetime) -> CertificatePublicKeyTypes:
        """Return the key of `device`; raises HandoffError `bad_certificate` with what is wrong.

        `certificate` is DER and issued by one of the CAs directly; its common name is the device. A certificate
        counts from its first to its last second by the gateway's clock, whatever the box's says.
        """
        digest = hashlib.sha256(certificate).digest()
        leaf = self._known.get(digest) or self._verified(certificate, digest, now)
        if not leaf.not_valid_before_utc <= now <= leaf.not_valid_after_utc:
            raise HandoffError("bad_certificate", f"counts until {leaf.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ} only")
        names = [name.value for name in leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        if names != [device]:
            raise HandoffError("bad_certificate", f"is not that of {device}")
        return leaf.public_key()

    def _verified(self, certificate: bytes, digest: bytes, now: datetime) -> x509.Certificate:
        if len(certificate) > MAX_CERTIFICATE_BYTES:
            raise HandoffError("bad_certificate", f"is over {MAX_CERTIFICATE_BYTES} bytes")
        policy = PolicyBuilder().store(self._store).time(now)
        verifier = policy.extension_policies(ca_policy=_ISSUERS, ee_policy=_DEVICES).build_client_verifier()
        try:
            leaf = x509.load_der_x509_certificate(certificate)
            verifier.verify(leaf, [])
        except (ValueError, VerificationError) as error:
            raise HandoffError("bad_certificate", f"is not one that the fleet's CA vouches for now: {error}") from error
        self._known[digest] = leaf
        if len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)
        return leaf


def load_authority(path: Path) -> Authority:
    """Read CA certificates (PEM, one or more); raises OSError or ValueError."""
    issuers = x509.load_pem_x509_certificates(path.read_bytes())
    return Authority(issuers)


def now_utc() -> datetime:
    """Return the gateway's time."""
    return datetime.now(UTC)
