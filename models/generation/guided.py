"""Answers held to a form: a JSON object, or a JSON schema. llguidance says which tokens may come next."""

from __future__ import annotations

import importlib
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from models.errors import ModelError, RequestError
from models.generation.options import Guide
from models.tokens import Tokenizer

ANY_OBJECT: Final = b'{"type":"object"}'
_MAX_MESSAGE: Final = 200


class Grammars:
    """Makes matchers for one model's vocabulary; the library is loaded when the first asker wants a form."""

    def __init__(self, tokenizer: Tokenizer, end_tokens: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._end_tokens = end_tokens
        self._library: Any = None
        self._vocabulary: Any = None

    def matcher(self, guide: Guide) -> GrammarMatcher:
        """Return a matcher for one text; raises RequestError for a schema that no answer could keep."""
        if self._library is None:
            self._load()
        library = self._library
        grammar = library.LLMatcher.grammar_from_json_schema((guide.schema or ANY_OBJECT).decode())
        matcher = library.LLMatcher(self._vocabulary, grammar)
        if error := matcher.get_error():
            reason = " ".join(str(error).split())[:_MAX_MESSAGE]
            raise RequestError("bad_request", f"response_format.json_schema.schema: {reason}")
        return GrammarMatcher(matcher, self._vocabulary.vocab_size)

    def _load(self) -> None:
        if not self._end_tokens:
            raise RequestError("bad_request", "response_format: is not honoured by this model, which has no end token")
        try:
            library = importlib.import_module("llguidance")
        except ImportError:
            raise RequestError(
                "bad_request", "response_format: is not honoured on this box: llguidance is missing"
            ) from None
        try:
            self._vocabulary = library.LLTokenizer(self._tokenizer.json, eos_token=min(self._end_tokens))
        except Exception as error:  # the library's exceptions share no base class
            reason = str(error)[:_MAX_MESSAGE]
            raise RequestError("bad_request", f"response_format: is not honoured by this model: {reason}") from error
        self._library = library


class GrammarMatcher:
    """One text's place in its grammar."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    def allowed(self) -> NDArray[np.bool_]:
        """Return which tokens may come next; raises ModelError where the grammar is at a loss."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        return np.unpackbits(bits, bitorder="little")[: self._vocabulary].astype(np.bool_)

    def accept(self, token: int) -> None:
        """Go on with a token that was allowed; raises ModelError."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if error := self._matcher.get_error():
            raise ModelError(f"the answer's form cannot be kept: {' '.join(str(error).split())[:_MAX_MESSAGE]}")
