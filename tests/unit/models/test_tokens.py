"""A tokenizer's panics, its bounds, and text from tokens one by one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers

from models.errors import ModelError
from models.tokens import Tokenizer
from tests.fakes.generation import END, byte_tokenizer


def opened() -> Tokenizer:
    return Tokenizer(byte_tokenizer().to_str().encode())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b'{"decoder":[}}}',
        b"\xff\xfe",
        b'{"version":"1.0","model":{"type":"BPE","vocab":{},"merges":["a b"]}}',
        b'{"model":{"type":"Unknown"}}',
        b"[" * 100_000,
    ],
)
def test_e10_a_tokenizer_that_is_none_is_the_models_fault(data: bytes) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Tokenizer(data)


def test_a_tokenizers_own_cutting_and_padding_are_left_out() -> None:
    cutting = byte_tokenizer()
    cutting.enable_truncation(4)
    cutting.enable_padding(length=64)
    tokens = Tokenizer(cutting.to_str().encode()).encode("twelve bytes")
    assert len(tokens.ids) == 12


def test_a_byte_level_vocabulary_bounds_the_bytes_of_a_token() -> None:
    assert opened().longest_token_bytes == len(END)


def test_a_vocabulary_that_changes_texts_has_no_such_bound() -> None:
    stripping = byte_tokenizer()
    stripping.normalizer = normalizers.Strip()
    assert Tokenizer(stripping.to_str().encode()).longest_token_bytes == 0


def test_the_bound_allows_for_the_foldings_of_unicode() -> None:
    folding = byte_tokenizer()
    folding.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer = Tokenizer(folding.to_str().encode())
    text = "\N{MATHEMATICAL BOLD CAPITAL A}" * 100
    assert tokenizer.longest_token_bytes == 4 * len(END)
    assert tokenizer.least_tokens(text) <= len(tokenizer.encode(text).ids) == 100


@given(st.text(max_size=50))
def test_pieces_are_whole_letters_that_add_up_to_the_text(text: str) -> None:
    tokenizer = opened()
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in tokenizer.encode(text).ids]
    assert "".join(pieces) == text.replace(END, "")


def test_bytes_that_are_no_letters_do_not_end_the_stream() -> None:
    tokenizer = opened()
    letters = {byte: tokenizer.encode(chr(byte)).ids[-1] for byte in range(0x80, 0x100)}
    stream = tokenizer.stream()
    tokens = [*letters.values(), *tokenizer.encode("and on it goes").ids]
    assert "".join(stream.push(token) for token in tokens).endswith("on it goes")


def test_e18_hostile_texts_are_counted_like_any_other() -> None:
    tokenizer = opened()
    texts = ["\x00\x1b[2J", "\u202eevil", "a" * 100_000, "{{7*7}}", "\ufeff", "💣" * 1000]
    assert [len(tokens.ids) for tokens in tokenizer.encode_batch(texts)] == [len(text.encode()) for text in texts]
