"""What a session sees of a generating model: texts that are started, moved on together, and stopped. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec
from numpy.typing import NDArray

from models.generation.options import Sampling


class Matcher(Protocol):
    """A grammar that one text follows. Both raise ModelError."""

    def allowed(self) -> NDArray[Any]:
        """Return which tokens may come next, as a mask over the vocabulary."""

    def accept(self, token: int) -> None:
        """Go on with a token that was allowed."""


class Text(msgspec.Struct, eq=False, kw_only=True):
    """A text in the making: the prompt's tokens, then those drawn; at most `max_tokens` of these are asked for."""

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling
    matcher: Matcher | None = None


class Event(msgspec.Struct, frozen=True):
    """A text's next token, or the error that ended it."""

    text: Text
    token: int = -1
    failure: Exception | None = None


class Runtime(Protocol):
    """A generating model. A text that is stopped, or has failed, takes no room and gives no events."""

    context_tokens: int
    """Bounds prompt and answer together, by the model's context and by the memory for its cache."""
    end_tokens: frozenset[int]

    def start(self, text: Text) -> None:
        """Take a text; nothing is computed yet."""

    def stop(self, text: Text) -> None:
        """Let go of a text, whether or not it is at its end."""

    def step(self) -> Sequence[Event]:
        """Compute a token of every text whose prompt is computed, and a part of one prompt."""

    def close(self) -> None:
        """Free the model."""
