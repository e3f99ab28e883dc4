"""In-memory twins of a generating runtime and of a decoder's cache, and the small tokenizer that their tests speak."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from models.errors import ModelError
from models.generation.graph import CacheShape
from models.generation.runtime import Event, Text

END = "<|end|>"
TEMPLATE = (
    "{%- for message in messages -%}<|{{ message.role }}|>{{ message.content }}{{ eos_token }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer with one token for each byte, and an end token that is special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    return tokenizer


class ScriptedRuntime:
    """Answers every prompt with what `script` makes of its tokens, a prompt begun in each step; keeps what was asked.

    A prompt takes `parts` steps; a script's end is a failure.
    """

    def __init__(self, script: Callable[[Sequence[int]], Sequence[int]], context_tokens: int, end: int) -> None:
        self.context_tokens = context_tokens
        self.end_tokens = frozenset({end})
        self.parts = 1
        self.started: list[Text] = []
        self.running: dict[Text, Iterator[int]] = {}
        self._script = script
        self._reading: dict[Text, int] = {}

    def start(self, text: Text) -> None:
        self.started.append(text)
        self._reading[text] = self.parts

    def stop(self, text: Text) -> None:
        self._reading.pop(text, None)
        self.running.pop(text, None)

    def step(self) -> list[Event]:
        events = [self._event(text) for text in list(self.running)]
        for text in list(self._reading)[:1]:
            self._reading[text] -= 1
            if self._reading[text] <= 0:
                del self._reading[text]
                self.running[text] = iter(self._script(text.prompt))
                events.append(self._event(text))
        return events

    def close(self) -> None:
        self._reading.clear()
        self.running.clear()

    def _event(self, text: Text) -> Event:
        token = next(self.running[text], None)
        if token is None:
            del self.running[text]
            return Event(text, failure=ModelError("the script is at its end"))
        return Event(text, token)


class CountingCache:
    """A cache whose model says, after each text, the sum of all its tokens modulo the vocabulary.

    What it holds of a token is the token itself, so that a wrong place or a lost token changes the answer. `prefills`
    and `decodes` say what was run; a token in `broken` makes the run that meets it fail.
    """

    def __init__(self, vocabulary: int = 50) -> None:
        self._vocabulary = vocabulary
        self.shape = CacheShape(tensors=1, heads=1, size=1, dtype=np.dtype(np.float32))
        self.part_tokens = 128
        self.broken: set[int] = set()
        self.held: dict[int, list[int]] = {}
        self.prefills: list[tuple[int, int]] = []
        self.decodes: list[tuple[int, ...]] = []

    def open(self, seat: int) -> None:
        self.held[seat] = []

    def close(self, seat: int) -> None:
        del self.held[seat]

    def length(self, seat: int) -> int:
        return len(self.held[seat])

    def prefill(self, seat: int, tokens: Sequence[int]) -> NDArray[np.float32]:
        self._check(tokens)
        self.prefills.append((seat, len(tokens)))
        self.held[seat] += tokens
        return self._logits(seat)

    def decode(self, seats: Sequence[int], tokens: Sequence[int]) -> NDArray[np.float32]:
        self._check(tokens)
        self.decodes.append(tuple(seats))
        for seat, token in zip(seats, tokens, strict=True):
            self.held[seat].append(token)
        return np.stack([self._logits(seat) for seat in seats])

    def read(self, seat: int, start: int, stop: int) -> NDArray[Any]:
        return np.array(self.held[seat][start:stop], dtype=np.float32).reshape(1, 1, -1, 1)

    def write(self, seat: int, values: NDArray[Any]) -> None:
        self.held[seat] += [int(value) for value in values.ravel()]

    def _check(self, tokens: Sequence[int]) -> None:
        if self.broken & set(tokens):
            raise ModelError("a broken token")

    def _logits(self, seat: int) -> NDArray[np.float32]:
        logits = np.zeros(self._vocabulary, dtype=np.float32)
        logits[sum(self.held[seat]) % self._vocabulary] = 1.0
        return logits
