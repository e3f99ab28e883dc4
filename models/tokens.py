"""Texts into tokens with a model's own `tokenizer.json`; never cut, never padded here."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import msgspec
from tokenizers import Encoding
from tokenizers import Tokenizer as _Tokenizer
from tokenizers.decoders import DecodeStream

from models.errors import ModelError, RequestError

MAX_TOKENIZER_BYTES: Final = 64 << 20
ASSUMED_TOKEN_BYTES: Final = 256
"""More of a text than one token of any sensible text stands for, where a vocabulary sets no bound."""

_FOLDING: Final = frozenset({"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Sequence"})
_FOLDED_BYTES: Final = 4
"""The most bytes that the foldings of Unicode make one byte of: a mathematical letter into a plain one."""

_T = TypeVar("_T")

# One request's texts are few; a pool of threads for them costs more memory than it saves time.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class Tokens(msgspec.Struct, frozen=True):
    """One text's tokens; `types` tells the parts of a pair apart."""

    ids: list[int]
    types: list[int]


class Tokenizer:
    """A `tokenizer.json` opened; safe to use from several threads. Raises ModelError, and on a text RequestError.

    `longest_token_bytes` is the most UTF-8 bytes of a text that one token can stand for; 0 where no bound is known.
    """

    def __init__(self, data: bytes) -> None:
        try:
            self._tokenizer = _contained(lambda: _Tokenizer.from_buffer(data))
        except _TokenizerError as error:
            raise ModelError(f"tokenizer.json: {str(error)[:200]}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.longest_token_bytes: Final = self._longest_token_bytes

    def encode(self, text: str, *, special: bool = True) -> Tokens:
        """Return a text's tokens, with those that the model puts around it where `special`."""
        return _tokens(self._encode_batch([text], special)[0])

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """Return each text's tokens, with those that the model puts around it."""
        return [_tokens(encoding) for encoding in self._encode_batch(list(texts), special=True)]

    def _encode_batch(self, texts: list[str], special: bool) -> list[Encoding]:  # noqa: FBT001
        try:
            return _contained(lambda: self._tokenizer.encode_batch_fast(texts, add_special_tokens=special))
        except _TokenizerError as error:
            raise RequestError("model_failed", "the model's tokenizer failed on this text") from error

    def stream(self) -> TextStream:
        """Return a way from tokens that come one by one to their text."""
        return TextStream(self._tokenizer)

    def least_tokens(self, text: str) -> int:
        """Return a number of tokens that the text has at least, without looking into it."""
        return len(text.encode()) // (self.longest_token_bytes or ASSUMED_TOKEN_BYTES)

    @property
    def _longest_token_bytes(self) -> int:
        """Known for byte-level vocabularies: others fold spaces away, or have one token for every unknown word."""
        layout = msgspec.json.decode(self._tokenizer.to_str(), type=_Layout)
        kinds = _kinds(layout.normalizer)
        if "ByteLevel" not in _kinds(layout.pre_tokenizer) or not kinds <= _FOLDING:
            return 0
        longest = max((len(token.encode()) for token in self._tokenizer.get_vocab()), default=0)
        return longest * _FOLDED_BYTES if kinds else longest


class TextStream:
    """The text of tokens that come one by one, without the special ones; letters are given whole or not at all."""

    def __init__(self, tokenizer: _Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def push(self, token: int) -> str:
        """Return the text that the token completes, empty in the middle of a letter."""
        try:
            return _contained(lambda: self._stream.step(self._tokenizer, token)) or ""
        except _TokenizerError:
            # The library gives up on bytes that are no UTF-8, which a model may well write; what follows is read anew.
            self._stream = DecodeStream(skip_special_tokens=True)
            return "\N{REPLACEMENT CHARACTER}"


class _Part(msgspec.Struct):
    type: str = ""
    normalizers: list[_Part] = []
    pretokenizers: list[_Part] = []


class _Layout(msgspec.Struct):
    normalizer: _Part | None = None
    pre_tokenizer: _Part | None = None


def _kinds(part: _Part | None) -> set[str]:
    """Return the types of a part of a tokenizer and of those inside it."""
    if part is None:
        return set()
    return {part.type}.union(*(_kinds(inner) for inner in part.normalizers + part.pretokenizers))


class _TokenizerError(Exception):
    """The library failed, by an exception or by a panic."""


def _contained(call: Callable[[], _T]) -> _T:
    """Call into the library; a panic of its Rust code arrives as a BaseException that no `except Exception` holds."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic has no class that could be named
        raise _TokenizerError(str(error)) from error


def _tokens(encoding: Encoding) -> Tokens:
    return Tokens(ids=encoding.ids, types=encoding.type_ids)
