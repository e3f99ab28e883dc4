"""Texts into tokens with a model's own `tokenizer.json`; never padded here, and cut only into windows."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

import msgspec
from tokenizers import Encoding
from tokenizers import Tokenizer as _Tokenizer
from tokenizers.decoders import DecodeStream

from models.artifact import Artifact
from models.errors import ModelError, RequestError
from models.pieces import SPACE, SPECIAL, UNKNOWN, Pieces, parse_pieces, parse_vocabulary, tokenizer_json

MAX_TOKENIZER_BYTES: Final = 64 << 20
ASSUMED_TOKEN_BYTES: Final = 256
"""More of a text than one token of any sensible text stands for, where a vocabulary sets no bound."""

_FOLDING: Final = frozenset({"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Sequence"})
_FOLDED_BYTES: Final = 4
"""The most bytes that the foldings of Unicode make one byte of: a mathematical letter into a plain one."""

_UNBOUNDED: Final = 1_000_000
"""From here on `model_max_length` means that the tokenizer knows no bound."""

_USUAL_NAMES: Final = {"cls_token": "[CLS]", "unk_token": "[UNK]", "pad_token": "[PAD]"}

_LANGUAGE_CODE: Final = re.compile(">>.+<<")

_T = TypeVar("_T")

# One request's texts are few; a pool of threads for them costs more memory than it saves time.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class Tokens(msgspec.Struct, frozen=True):
    """One text's tokens; `types` tells the parts of a pair apart."""

    ids: list[int]
    types: list[int]


Text = str | tuple[str, str]
"""A text, or a pair of texts that the model reads together."""


class Reading:
    """One text or pair in tokens, with where each of them lies: `offsets` count letters (code points) of its text.

    `special` marks the tokens that the model puts around a text, `parts` tells 0 and 1 of a pair apart (None: neither).
    """

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding
        self.ids: Final[list[int]] = encoding.ids
        self.types: Final[list[int]] = encoding.type_ids
        self.special: Final[list[int]] = encoding.special_tokens_mask
        self.offsets: Final[list[tuple[int, int]]] = encoding.offsets
        self.parts: Final[list[int | None]] = encoding.sequence_ids
        self.words: Final[list[int | None]] = encoding.word_ids

    def word_span(self, token: int, part: int) -> tuple[int, int] | None:
        """Return where the word of a token begins and ends in its text; None where the tokenizer knows no words."""
        word = self.words[token]
        span: tuple[int, int] | None = None if word is None else self._encoding.word_to_chars(word, part)
        return span


class Special(msgspec.Struct, frozen=True, kw_only=True):
    """What a tokenizer's configuration adds to `tokenizer.json`; a token that it has not is None, a bound 0."""

    cls: int | None
    unknown: int | None
    pad: int | None
    max_tokens: int
    pads_left: bool


class Tokenizer:
    """A `tokenizer.json` opened; safe to use from several threads. Raises ModelError, and on a text RequestError.

    `longest_token_bytes` is the most UTF-8 bytes of a text that one token can stand for; 0 where no bound is known.
    `joins_words` is whether its tokens tell by themselves where words begin.
    """

    def __init__(self, data: bytes) -> None:
        try:
            self._tokenizer = _contained(lambda: _Tokenizer.from_buffer(data))
        except _TokenizerError as error:
            raise ModelError(f"tokenizer.json: {str(error)[:200]}") from error
        # Windows are asked for by a setting of the whole tokenizer, which nobody else may meet.
        self._using = threading.Lock()
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.longest_token_bytes: Final = self._longest_token_bytes
        self.joins_words: Final = bool(getattr(self._tokenizer.model, "continuing_subword_prefix", None))

    def encode(self, text: str, *, special: bool = True) -> Tokens:
        """Return a text's tokens, with those that the model puts around it where `special`."""
        return _tokens(self._encode_batch([text], special)[0])

    def encode_letters(self, text: str) -> list[int]:
        """Return a text's tokens, the names of control tokens in it being letters as any others."""
        with self._using:
            try:
                self._tokenizer.encode_special_tokens = True
                return _on_text(lambda: self._tokenizer.encode(text, add_special_tokens=False)).ids
            finally:
                self._tokenizer.encode_special_tokens = False

    @property
    def special_texts(self) -> list[str]:
        """How the control tokens are written."""
        return [token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special]

    @property
    def json(self) -> str:
        """The tokenizer as a `tokenizer.json`."""
        return self._tokenizer.to_str()

    def encode_batch(self, texts: Sequence[Text]) -> list[Tokens]:
        """Return each text's tokens, or each pair's, with those that the model puts around it."""
        return [_tokens(encoding) for encoding in self._encode_batch(list(texts), special=True)]

    def _encode_batch(self, texts: list[Text], special: bool) -> list[Encoding]:  # noqa: FBT001
        with self._using:
            return _on_text(lambda: self._tokenizer.encode_batch_fast(texts, add_special_tokens=special))

    def read(self, text: str, pair: str | None = None) -> Reading:
        """Return a text's tokens, or a pair's, with where they lie in it."""
        with self._using:
            return Reading(_on_text(lambda: self._tokenizer.encode(text, pair)))

    def windows(
        self, text: str, pair: str | None = None, *, max_tokens: int, stride: int, cut: str = "longest_first"
    ) -> list[Reading]:
        """Return windows of at most `max_tokens` that overlap by `stride` tokens and hold the whole text.

        Of a pair, `cut` names what is cut into windows: `only_first` or `only_second`; the other stands in each.
        """
        with self._using:
            try:
                self._tokenizer.enable_truncation(max_tokens, stride=stride, strategy=cut)
                encoding = _on_text(lambda: self._tokenizer.encode(text, pair))
            finally:
                self._tokenizer.no_truncation()
        return [Reading(window) for window in (encoding, *encoding.overflowing)]

    def token(self, number: int) -> str:
        """Return how the vocabulary writes a token; raises ModelError for a number that it has not."""
        token = self._tokenizer.id_to_token(number)
        if token is None:
            raise ModelError(f"tokenizer.json has no token {number}")
        return token

    def number(self, token: str) -> int | None:
        """Return a token's number, or None."""
        return self._tokenizer.token_to_id(token)

    def decode(self, numbers: Sequence[int]) -> str:
        """Return the text of tokens, without the special ones."""
        try:
            return _contained(lambda: self._tokenizer.decode(list(numbers), skip_special_tokens=True))
        except _TokenizerError as error:
            raise ModelError("the tokenizer has no text for what the model wrote") from error

    def join(self, tokens: list[str]) -> str:
        """Return the text of tokens that are written as the vocabulary writes them."""
        decoder = self._tokenizer.decoder
        return " ".join(tokens) if decoder is None else _on_text(lambda: decoder.decode(tokens))

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


def _on_text(call: Callable[[], _T]) -> _T:
    """Call into the library with an asker's text; raises RequestError."""
    try:
        return _contained(call)
    except _TokenizerError as error:
        raise RequestError("model_failed", "the model's tokenizer failed on this text") from error


def _tokens(encoding: Encoding) -> Tokens:
    return Tokens(ids=encoding.ids, types=encoding.type_ids)


class MarianTokenizer(Tokenizer):
    """Marian's two vocabularies: one by which texts are read, one in which answers are written.

    A text may begin with the code of its answer's language, `>>deu<<`.
    """

    def __init__(self, source: Pieces, vocabulary: Sequence[str], written: Sequence[str]) -> None:
        super().__init__(tokenizer_json(source, vocabulary))
        self._numbers = {piece: number for number, piece in enumerate(vocabulary)}
        self._written = written

    def encode(self, text: str, *, special: bool = True) -> Tokens:
        """Return a text's tokens, its language's code as one of them."""
        code = _LANGUAGE_CODE.match(text)
        tokens = super().encode(_LANGUAGE_CODE.sub("", text) if code else text, special=special)
        if code is None:
            return tokens
        number = self._numbers.get(code[0], self._numbers[UNKNOWN])
        return Tokens(ids=[number, *tokens.ids], types=[0, *tokens.types])

    def decode(self, numbers: Sequence[int]) -> str:
        """Return the text of an answer's tokens, without the special ones."""
        if max(numbers, default=0) >= len(self._written):
            raise ModelError("the tokenizer has no text for what the model wrote")
        pieces = (self._written[number] for number in numbers)
        return "".join(piece for piece in pieces if piece not in SPECIAL).replace(SPACE, " ").strip()


def load_tokenizer(artifact: Artifact) -> Tokenizer:
    """Open the artifact's tokenizer, `tokenizer.json` or Marian's files; raises ModelError."""
    if "tokenizer.json" not in artifact.files and {"source.spm", "vocab.json"} <= artifact.files:
        vocabulary = parse_vocabulary(artifact.read_json("vocab.json"), "vocab.json")
        target = artifact.read_json("target_vocab.json")
        written = parse_vocabulary(target, "target_vocab.json") if target else vocabulary
        return MarianTokenizer(parse_pieces(artifact.read("source.spm", MAX_TOKENIZER_BYTES)), vocabulary, written)
    return Tokenizer(artifact.read("tokenizer.json", MAX_TOKENIZER_BYTES))


def load_special(artifact: Artifact, tokenizer: Tokenizer) -> Special:
    """Return what `tokenizer_config.json` and `special_tokens_map.json` say of a tokenizer."""
    config = artifact.read_json("special_tokens_map.json") | artifact.read_json("tokenizer_config.json")
    length = config.get("model_max_length")
    bounded = isinstance(length, int) and 0 < length < _UNBOUNDED
    return Special(
        cls=_number(tokenizer, config, "cls_token"),
        unknown=_number(tokenizer, config, "unk_token"),
        pad=_number(tokenizer, config, "pad_token"),
        max_tokens=int(length) if bounded else 0,  # type: ignore[call-overload]
        pads_left=config.get("padding_side") == "left",
    )


def _number(tokenizer: Tokenizer, config: Mapping[str, Any], name: str) -> int | None:
    value = config.get(name, _USUAL_NAMES[name])
    if isinstance(value, dict):
        value = value.get("content")
    return tokenizer.number(value) if isinstance(value, str) else None
