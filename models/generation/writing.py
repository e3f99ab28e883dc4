"""One text in the making: tokens in, text out, up to its end, a stop string or its length. Pure: no I/O, no clock."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from models.generation.stops import StopWatch
from models.tokens import TextStream


class Writing:
    """The text that tokens have given so far; `finish_reason` is OpenAI's, empty while it runs."""

    def __init__(self, stream: TextStream, watch: StopWatch, *, end_tokens: AbstractSet[int], max_tokens: int) -> None:
        self._stream = stream
        self._watch = watch
        self._end_tokens = end_tokens
        self._max_tokens = max_tokens
        self.text = ""
        self.tokens = 0
        self.finish_reason = ""

    def push(self, token: int) -> str:
        """Take the next token and return the text that it makes certain; raises RequestError."""
        self.tokens += 1
        if token in self._end_tokens:
            piece = self._finish("stop")
        else:
            piece = self._watch.push(self._stream.push(token))
            if self._watch.stopped:
                self.finish_reason = "stop"
            elif self.tokens >= self._max_tokens:
                piece += self._finish("length")
        self.text += piece
        return piece

    def _finish(self, reason: str) -> str:
        self.finish_reason = reason
        return self._watch.finish()
