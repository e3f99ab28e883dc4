"""The fleet's certificate authority: it says which box is which, to brokers and gateways."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cloud_sync.fleet.errors import FleetError
from cloud_sync.fleet.home import Home, save_private

AUTHORITY_DAYS: Final = 7300


def make_authority(home: Home) -> None:
    """Make the authority's key (`ca/ca.key`) and certificate (`ca/ca.pem`)."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("Spillway fleet")
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        _builder(name, name, key.public_key(), AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    save_private(home.folder / "ca" / "ca.key", private_pem(key))
    (home.folder / "ca" / "ca.pem").write_bytes(certificate.public_bytes(Encoding.PEM))


def certify(home: Home, device: str, key: ec.EllipticCurvePublicKey, days: int) -> bytes:
    """Return a device's certificate in PEM, its common name the device's; raises FleetError."""
    authority, signing_key = _load(home)
    certificate = (
        _builder(_name(device), authority.subject, key, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(device)]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signing_key.public_key()), critical=False)
        .sign(signing_key, hashes.SHA256())
    )
    return certificate.public_bytes(Encoding.PEM)


def authority_pem(home: Home) -> bytes:
    """Return the authority's certificate in PEM."""
    return _load(home)[0].public_bytes(Encoding.PEM)


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a private key as PKCS8 in PEM, not encrypted."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _load(home: Home) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    folder = home.folder / "ca"
    try:
        certificate = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
        key = load_pem_private_key((folder / "ca.key").read_bytes(), None)
    except (OSError, ValueError) as error:
        raise FleetError(f"the fleet's certificate authority is not at hand: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise FleetError("the fleet's certificate authority has no elliptic-curve key")
    return certificate, key


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        # A day early, for clocks that lag.
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=days))
    )
