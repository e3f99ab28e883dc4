"""Keeps what an asker types from becoming a control token: `<|im_start|>` in a message is text, not a turn's beginning.

Control tokens in askers' texts are replaced by marks before the template sees them, and each mark by its letters in
plain tokens after. A text without any is encoded exactly as if nobody had looked.
"""

from __future__ import annotations

import re
from typing import Final

from models.tokens import Tokenizer

# Unicode's noncharacters: no text needs them, no template trims them.
_OPEN: Final = "\ufdd0"
_CLOSE: Final = "\ufdd1"
_MARK: Final = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")


class ControlTokens:
    """The control tokens of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: Final = [*sorted(tokenizer.special_texts, key=len, reverse=True), _OPEN, _CLOSE]
        # Some tokenizers fold case before they look for these.
        self._pattern: Final = re.compile("|".join(map(re.escape, self._texts)), re.IGNORECASE)

    def guard(self, text: str) -> str:
        """Return an asker's text with a mark in place of each control token."""
        return self._pattern.sub(self._mark, text)

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Return the tokens of a templated text, its marks in plain letters; `special` as for the tokenizer."""
        pieces = _MARK.split(text)
        if len(pieces) == 1:
            return self._tokenizer.encode(text, special=special).ids
        tokens: list[int] = []
        for at, piece in enumerate(pieces):
            if at % 2:
                tokens += self._tokenizer.encode_letters(self._letters(piece))
            elif piece:
                tokens += self._tokenizer.encode(piece, special=False).ids
        return self._around(tokens) if special else tokens

    def _mark(self, match: re.Match[str]) -> str:
        # Which letters were typed is forgotten where case was folded: control tokens differ in it from no other word.
        index = next(at for at, text in enumerate(self._texts) if text.lower() == match[0].lower())
        return f"{_OPEN}{index}{_CLOSE}"

    def _letters(self, index: str) -> str:
        """Return what a mark stands for; nothing where a template has made up a mark."""
        at = int(index[:9])
        return self._texts[at] if at < len(self._texts) else ""

    def _around(self, tokens: list[int]) -> list[int]:
        """Put the tokens that the model wants around every text around these."""
        plain = self._tokenizer.encode("a", special=False).ids
        dressed = self._tokenizer.encode("a", special=True).ids
        starts = [at for at in range(len(dressed) - len(plain) + 1) if dressed[at : at + len(plain)] == plain]
        at = starts[0] if starts else 0
        return [*dressed[:at], *tokens, *dressed[at + len(plain) :]]
