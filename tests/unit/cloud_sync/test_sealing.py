"""Hand-offs and replies: what opens, and what must not."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from hypothesis import given
from hypothesis import strategies as st

from cloud_sync.errors import HandoffError
from cloud_sync.sealing import (
    MAX_BODY_BYTES,
    Content,
    Packed,
    load_pool_key,
    open_reply,
    open_request,
    pack_body,
    seal_reply,
    seal_request,
    unpack_body,
)
from cloud_sync.wire import (
    REQUEST_INFO,
    ReplyHeader,
    from_sequence,
    pack_handoff_head,
    parse_handoff,
    parse_reply,
    to_sequence,
)
from tests.fakes.certificates import IDENT, TestCA, TestPool, header, sealed

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

CA = TestCA()
BOX = CA.identity("pi-7")
POOL = TestPool()
SECRET = bytes(range(32))
ANSWER = Content(body=b'{"outputs": 1}', model="big", tokens_in=3, tokens_out=4, compute_ms=12.5)


def reply_header(**changes: object) -> ReplyHeader:
    fields: dict[str, object] = {"id": IDENT, "sequence": to_sequence(7, 0), "final": True, "status": "ok"}
    return ReplyHeader(**(fields | changes))  # type: ignore[arg-type]


def code_of(function: object, *arguments: object) -> str:
    with pytest.raises(HandoffError) as caught:
        function(*arguments)  # type: ignore[operator]
    return caught.value.code


def test_a_request_opens_with_the_pools_key_and_holds_what_was_sealed() -> None:
    message = parse_handoff(sealed(BOX, POOL, b"a prompt", secret=SECRET))
    opened = open_request(message, POOL.private)
    assert opened.secret == SECRET
    assert opened.certificate == BOX.certificate
    assert unpack_body(opened.body) == b"a prompt"


def test_d9_nothing_of_the_body_or_certificate_can_be_read_on_the_wire() -> None:
    payload = sealed(BOX, POOL, b"a very private prompt", secret=SECRET)
    for part in (b"private", BOX.certificate[:40], SECRET):
        assert part not in payload


def test_the_sealed_part_is_hpke_as_the_protocol_says() -> None:
    head = pack_handoff_head(header())
    plaintext = SECRET + (3).to_bytes(2, "big") + b"crt" + (3).to_bytes(2, "big") + b"sig" + b"\x00body"
    suite = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)
    payload = head + suite.encrypt(plaintext, POOL.private.public_key(), b"spillway handoff 1\x00" + head)
    opened = open_request(parse_handoff(payload), POOL.private)
    assert (opened.secret, opened.certificate, opened.signature, opened.body) == (
        SECRET,
        b"crt",
        b"sig",
        Packed(0, b"body"),
    )
    assert REQUEST_INFO == b"spillway handoff 1\x00"


def test_a_request_changed_in_any_byte_of_its_header_does_not_open() -> None:
    payload = sealed(BOX, POOL)
    head = parse_handoff(payload).head
    codes = set()
    for place in range(len(head)):
        for flip in (0x01, 0x20):
            changed = bytearray(payload)
            changed[place] ^= flip
            codes.add(code_of(lambda data: open_request(parse_handoff(data), POOL.private), bytes(changed)))
    assert codes <= {"does_not_open", "bad_header"}


def test_d5_a_request_with_one_flipped_bit_anywhere_in_its_sealed_part_does_not_open() -> None:
    payload = sealed(BOX, POOL)
    start = len(parse_handoff(payload).head)
    for place in range(start, len(payload)):
        changed = bytearray(payload)
        changed[place] ^= 0x10
        assert code_of(open_request, parse_handoff(bytes(changed)), POOL.private) == "does_not_open"


def test_d5_a_request_that_was_cut_does_not_open() -> None:
    payload = sealed(BOX, POOL)
    start = len(parse_handoff(payload).head)
    for end in (start, start + 10, start + 32, start + 47, len(payload) - 1):
        assert code_of(open_request, parse_handoff(payload[:end]), POOL.private) == "does_not_open"


def test_d10_another_pools_key_does_not_open_it() -> None:
    message = parse_handoff(sealed(BOX, POOL))
    assert code_of(open_request, message, X25519PrivateKey.generate()) == "does_not_open"


def test_d10_a_weaker_suite_does_not_open() -> None:
    head = pack_handoff_head(header())
    suite = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_128_GCM)
    payload = head + suite.encrypt(bytes(100), POOL.private.public_key(), REQUEST_INFO + head)
    assert code_of(open_request, parse_handoff(payload), POOL.private) == "does_not_open"


@pytest.mark.parametrize("key", [bytes(32), b"short"])
def test_a_key_that_no_one_can_be_sealed_for_is_an_error(key: bytes) -> None:
    with pytest.raises(HandoffError) as caught:
        seal_request(header(), Packed(0, b""), public_key=key, secret=SECRET, certificate=b"", sign=lambda _data: b"")
    assert caught.value.code == "no_key"


@pytest.mark.parametrize("plaintext", [b"", SECRET, SECRET + b"\x00", SECRET + b"\x00\x05abc", SECRET + bytes(4)])
def test_a_plaintext_that_ends_early_is_an_error(plaintext: bytes) -> None:
    head = pack_handoff_head(header())
    suite = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)
    payload = head + suite.encrypt(plaintext, POOL.private.public_key(), REQUEST_INFO + head)
    assert code_of(open_request, parse_handoff(payload), POOL.private) == "bad_plaintext"


@given(st.binary(max_size=2000))
def test_any_body_comes_out_as_it_went_in(body: bytes) -> None:
    assert unpack_body(pack_body(body)) == body


def test_a_long_text_is_sent_compressed() -> None:
    body = b"the same again and again, " * 1000
    packed = pack_body(body)
    assert packed.flags == 1
    assert len(packed.stored) < len(body) // 20
    assert unpack_body(packed) == body


def test_a_body_that_does_not_shrink_is_sent_as_it_is() -> None:
    body = os.urandom(1000)
    assert pack_body(body) == Packed(0, body)


def test_a_decompression_bomb_is_stopped_at_the_limit() -> None:
    bomb = zstd.compress(bytes(MAX_BODY_BYTES + 1))
    assert len(bomb) < 2000
    assert code_of(unpack_body, Packed(1, bomb)) == "too_large"


def test_a_window_above_8_mib_is_refused() -> None:
    compressor = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 27})
    stored = compressor.compress(os.urandom(100)) + compressor.flush()
    assert code_of(unpack_body, Packed(1, stored)) == "bad_plaintext"


@pytest.mark.parametrize(
    ("packed", "code"),
    [
        (Packed(1, b"not zstd"), "bad_plaintext"),
        (Packed(1, zstd.compress(b"a" * 50)[:-3]), "too_large"),
        (Packed(1, zstd.compress(b"a") + zstd.compress(b"b")), "bad_plaintext"),
        (Packed(2, b""), "too_large"),
        (Packed(4, b""), "bad_plaintext"),
        (Packed(128, b""), "bad_plaintext"),
    ],
)
def test_a_malformed_body_is_an_error_with_a_code(packed: Packed, code: str) -> None:
    assert code_of(unpack_body, packed) == code


def test_a_reply_opens_with_its_requests_secret() -> None:
    message = parse_reply(seal_reply(reply_header(), ANSWER, SECRET))
    assert open_reply(message, SECRET) == ANSWER
    assert message.header == reply_header()


def test_a_reply_forged_without_the_secret_does_not_open() -> None:
    message = parse_reply(seal_reply(reply_header(), ANSWER, bytes(32)))
    assert code_of(open_reply, message, SECRET) == "does_not_open"


def test_a_reply_changed_in_any_byte_does_not_open() -> None:
    payload = seal_reply(reply_header(), ANSWER, SECRET)
    for place in range(len(payload)):
        changed = bytearray(payload)
        changed[place] ^= 0x01
        code = code_of(lambda data: open_reply(parse_reply(data), SECRET), bytes(changed))
        assert code in {"does_not_open", "bad_header"}


def test_a_reply_under_another_sequence_or_made_final_does_not_open() -> None:
    partial = reply_header(final=False, status="partial")
    message = parse_reply(seal_reply(partial, ANSWER, SECRET))
    for changed in (
        reply_header(),
        reply_header(final=False, status="partial", sequence=to_sequence(7, 1)),
        reply_header(final=False, status="partial", sequence=to_sequence(8, 0)),
    ):
        other = parse_reply(seal_reply(changed, ANSWER, SECRET))
        assert code_of(open_reply, msgspec.structs.replace(other, sealed=message.sealed), SECRET) == "does_not_open"


def test_two_gateways_that_answer_one_request_never_use_a_nonce_twice() -> None:
    first = parse_reply(seal_reply(reply_header(sequence=to_sequence(1, 0)), ANSWER, SECRET))
    second = parse_reply(seal_reply(reply_header(sequence=to_sequence(2, 0)), ANSWER, SECRET))
    assert first.sealed[:16] != second.sealed[:16]
    assert from_sequence(to_sequence((1 << 43) - 1, (1 << 20) - 1)) == ((1 << 43) - 1, (1 << 20) - 1)
    assert code_of(to_sequence, 0, 1 << 20) == "too_large"


@given(st.binary(max_size=100))
def test_what_a_gateway_seals_is_read_or_refused_with_one_error(plaintext: bytes) -> None:
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    template = parse_reply(seal_reply(reply_header(), ANSWER, SECRET))
    nonce = bytes(4) + template.header.sequence.to_bytes(8, "big")
    forged = ChaCha20Poly1305(SECRET).encrypt(nonce, plaintext, template.head)
    with contextlib.suppress(HandoffError):
        open_reply(msgspec.structs.replace(template, sealed=forged), SECRET)


def test_a_key_file_is_read_as_the_fleet_program_writes_it(tmp_path: Path) -> None:
    kid, private = load_pool_key(POOL.save(tmp_path))
    assert kid == "k1"
    assert private.private_bytes_raw() == POOL.private.private_bytes_raw()


@pytest.mark.parametrize("text", ["", "{}", '{"kid": "a", "private": "zz"}', '{"kid": "a", "private": "00"}'])
def test_another_file_is_no_key_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "k").write_text(text)
    assert code_of(load_pool_key, tmp_path / "k") == "no_key"
    assert code_of(load_pool_key, tmp_path / "missing") == "no_key"
