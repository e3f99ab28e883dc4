"""Who a box is, and what a gateway believes of it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID

from cloud_sync.errors import HandoffError
from cloud_sync.gateway.authority import Authority, load_authority
from cloud_sync.identity import load_identity, verify_signature
from tests.fakes.certificates import ISSUED, NOW, TestCA, save_device

CA = TestCA()


def refused(authority: Authority, certificate: bytes, device: str, now: datetime = NOW) -> str:
    with pytest.raises(HandoffError) as caught:
        authority.check(certificate, device, now)
    assert caught.value.code == "bad_certificate"
    return caught.value.message


@pytest.mark.parametrize("ed", [False, True])
def test_a_signature_is_checked_against_the_certificates_key(ed: bool) -> None:
    box = CA.identity("pi-7", ed=ed)
    key = CA.authority().check(box.certificate, "pi-7", NOW)
    signature = box.sign(b"data")
    verify_signature(key, signature, b"data")
    for wrong, data in ((signature, b"other"), (b"", b"data"), (signature[:-1] + bytes([signature[-1] ^ 1]), b"data")):
        with pytest.raises(HandoffError) as caught:
            verify_signature(key, wrong, data)
        assert caught.value.code == "bad_signature"


def test_keys_of_other_kinds_sign_nothing() -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    with pytest.raises(HandoffError) as caught:
        verify_signature(key.public_key(), b"", b"")
    assert caught.value.code == "bad_signature"


def test_an_identity_is_read_from_its_files(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    certificate, path = save_device(tmp_path, CA.certify("pi-7", key), key)
    box = load_identity(certificate, path, "pi-7")
    assert box.device == "pi-7"
    verify_signature(CA.authority().check(box.certificate, "pi-7", NOW), box.sign(b"x"), b"x")


def test_files_that_hold_no_identity_are_an_error(tmp_path: Path) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    certificate, path = save_device(tmp_path, CA.certify("pi-7", key), key)
    other = rsa.generate_private_key(65537, 2048).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "rsa.key").write_bytes(other)
    (tmp_path / "empty").touch()
    for pair in (
        (certificate, tmp_path / "rsa.key"),
        (certificate, tmp_path / "empty"),
        (certificate, tmp_path / "missing"),
        (tmp_path / "empty", path),
        (path, path),
    ):
        with pytest.raises(HandoffError) as caught:
            load_identity(*pair, "pi-7")
        assert caught.value.code == "bad_identity"


def test_a_certificate_of_another_device_is_refused() -> None:
    box = CA.identity("pi-8")
    assert "pi-7" in refused(CA.authority(), box.certificate, "pi-7")


def test_a_certificate_of_a_foreign_authority_with_the_same_name_is_refused() -> None:
    refused(TestCA().authority(), CA.identity("pi-7").certificate, "pi-7")


def test_a_certificate_that_a_device_issued_is_refused() -> None:
    evil = TestCA()
    own = ec.generate_private_key(ec.SECP256R1())
    CA.authority().check(CA.certify("pi-6", own), "pi-6", NOW)
    evil.key, evil.name = own, x509.load_der_x509_certificate(CA.certify("pi-6", own)).subject
    refused(CA.authority(), evil.identity("pi-7").certificate, "pi-7")


def test_a_servers_certificate_is_not_a_devices() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = CA.certify("pi-7", key, usage=ExtendedKeyUsageOID.SERVER_AUTH)
    refused(CA.authority(), certificate, "pi-7")


def test_a_certificate_counts_by_the_gateways_clock_from_its_first_to_its_last_second() -> None:
    authority, box = CA.authority(), CA.identity("pi-7", days=10)
    end = ISSUED + timedelta(days=10)
    for _ in range(2):  # the second time from memory
        authority.check(box.certificate, "pi-7", ISSUED)
        authority.check(box.certificate, "pi-7", end)
        refused(authority, box.certificate, "pi-7", ISSUED - timedelta(seconds=1))
        assert "2026-11-11" in refused(authority, box.certificate, "pi-7", end + timedelta(seconds=1))
    refused(CA.authority(), box.certificate, "pi-7", datetime(1970, 1, 1, tzinfo=UTC))


@pytest.mark.parametrize("certificate", [b"", b"garbage", bytes(9000)])
def test_bytes_that_are_no_certificate_are_refused(certificate: bytes) -> None:
    refused(CA.authority(), certificate, "pi-7")


def test_the_authority_is_read_from_its_file(tmp_path: Path) -> None:
    load_authority(CA.save(tmp_path)).check(CA.identity("pi-7").certificate, "pi-7", NOW)
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError):
        load_authority(tmp_path / "empty")
