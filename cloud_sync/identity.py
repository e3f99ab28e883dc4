"""Who a box is towards gateways: the certificate of its cloud link, and the key that signs its hand-offs.

Light, because the agent imports it: it reads no certificate. Gateways do, in `cloud_sync.gateway.authority`.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from cloud_sync.errors import HandoffError

SigningKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey

_ECDSA: Final = ec.ECDSA(hashes.SHA256())


class Identity:
    """A box's certificate (DER) and the means to sign in its name."""

    def __init__(self, device: str, certificate: bytes, key: SigningKey) -> None:
        self.device = device
        self.certificate = certificate
        self._key = key

    def sign(self, data: bytes) -> bytes:
        """Return the signature over `data`: ECDSA P-256 with SHA-256 (DER), or Ed25519, as the key is."""
        if isinstance(self._key, ed25519.Ed25519PrivateKey):
            return self._key.sign(data)
        return self._key.sign(data, _ECDSA)


def load_identity(certificate: Path, key: Path, device: str) -> Identity:
    """Read the PEM files of a box; raises HandoffError `bad_identity`."""
    try:
        der = ssl.PEM_cert_to_DER_cert(certificate.read_text("ascii").strip())
        private = load_pem_private_key(key.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise HandoffError("bad_identity", f"{certificate} and {key}: {error}") from error
    return Identity(device, der, _signing_key(private, key))


def _signing_key(private: object, path: Path) -> SigningKey:
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return private
    if isinstance(private, ec.EllipticCurvePrivateKey) and isinstance(private.curve, ec.SECP256R1):
        return private
    raise HandoffError("bad_identity", f"{path}: must hold a P-256 or an Ed25519 key")


def verify_signature(public_key: object, signature: bytes, data: bytes) -> None:
    """Check a box's signature against the key of its certificate; raises HandoffError `bad_signature`."""
    try:
        if isinstance(public_key, ed25519.Ed25519PublicKey):
            public_key.verify(signature, data)
        elif isinstance(public_key, ec.EllipticCurvePublicKey) and isinstance(public_key.curve, ec.SECP256R1):
            public_key.verify(signature, data, _ECDSA)
        else:
            raise HandoffError("bad_signature", "the certificate's key is neither P-256 nor Ed25519")
    except InvalidSignature as error:
        raise HandoffError("bad_signature", "was not signed with the certificate's key") from error
