"""An in-memory twin of a generating runtime, and the small byte-level tokenizer that its tests speak."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from models.errors import ModelError
from models.generation.options import Sampling

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


class ScriptedGeneration:
    """Gives its tokens one by one, after `parts` of the prompt; fails where the script ends."""

    def __init__(self, tokens: Sequence[int], parts: int) -> None:
        self._tokens = iter(tokens)
        self._parts = parts

    def step(self) -> int | None:
        self._parts -= 1
        if self._parts > 0:
            return None
        token = next(self._tokens, None)
        if token is None:
            raise ModelError("the script is at its end")
        return token


class ScriptedRuntime:
    """Answers every prompt with what `script` makes of its tokens, and remembers what was asked."""

    def __init__(self, script: Callable[[Sequence[int]], Sequence[int]], context_tokens: int, end: int) -> None:
        self.context_tokens = context_tokens
        self.end_tokens = frozenset({end})
        self.parts = 1
        self.started: list[tuple[list[int], int, Sampling]] = []
        self._script = script

    def start(self, prompt: Sequence[int], max_tokens: int, sampling: Sampling) -> ScriptedGeneration:
        self.started.append((list(prompt), max_tokens, sampling))
        return ScriptedGeneration(self._script(prompt), self.parts)
