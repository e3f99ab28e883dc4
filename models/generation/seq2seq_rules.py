"""Which token a model that turns texts into texts writes next: greedy, by the rules of its folder and its asker.

Pure: no I/O, no clock. The rules are those of `transformers`' logits processors, in their order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.errors import ModelError

USUAL_NEW_TOKENS: Final = 256
"""Tokens of an answer where neither the folder nor the asker bounds it, as the pipelines have it."""
_UNSET_LENGTH: Final = 20
"""`max_length` of a folder that never set it."""

_UNKNOWN: Final[Mapping[str, tuple[object, ...]]] = {
    "encoder_repetition_penalty": (None, 1.0),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1.0),
    "sequence_bias": (None,),
}
"""Settings that would change a greedy answer and are not honoured, unless they have one of these values."""

_NEVER: Final = -np.inf


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """What bounds and steers an answer; lengths count the start token, except those of new tokens."""

    decoder_start_token_id: int = 0
    eos_token_id: tuple[int, ...] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: tuple[int, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    min_length: int = 0
    min_new_tokens: int | None = None
    max_length: int | None = None
    max_new_tokens: int | None = None

    @property
    def most_new_tokens(self) -> int:
        """How long an answer may get, its end token included."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return USUAL_NEW_TOKENS if self.max_length is None else max(1, self.max_length - 1)

    @property
    def least_tokens(self) -> int:
        """How long an answer must get before it may end, its start token included."""
        return self.min_length if self.min_new_tokens is None else self.min_new_tokens + 1


_LISTS: Final = frozenset({"eos_token_id", "forced_eos_token_id"})


def load_rules(config: Mapping[str, object], generation: Mapping[str, object]) -> Rules:
    """Return the rules of a `config.json` and a `generation_config.json`; raises ModelError."""
    # Folders from before generation_config.json have everything in config.json.
    settings = dict(generation or config)
    start = settings.get("decoder_start_token_id", config.get("decoder_start_token_id"))
    settings["decoder_start_token_id"] = settings.get("bos_token_id") if start is None else start
    if settings.get("max_length") == _UNSET_LENGTH:
        settings["max_length"] = None
    rules = with_settings(Rules(), settings)
    if not isinstance(settings["decoder_start_token_id"], int):
        raise ModelError("generation_config.json: decoder_start_token_id is missing")
    if rules.max_length is None and rules.max_new_tokens is None:
        return msgspec.structs.replace(rules, max_new_tokens=USUAL_NEW_TOKENS)
    return rules


def with_settings(rules: Rules, settings: Mapping[str, object]) -> Rules:
    """Return the rules with a folder's settings over them; raises ModelError for one that is not honoured."""
    for name, neutral in _UNKNOWN.items():
        if settings.get(name) not in neutral:
            raise ModelError(f"generation_config.json: {name} is not honoured here")
    known = {field.name for field in msgspec.structs.fields(Rules)}
    given = {name: value for name, value in settings.items() if name in known and value is not None}
    for name in _LISTS & given.keys():
        given[name] = [given[name]] if isinstance(given[name], int) else given[name]
    try:
        return msgspec.convert(msgspec.to_builtins(rules) | given, Rules)
    except msgspec.ValidationError as error:
        raise ModelError(f"generation_config.json: {error}") from error


def next_token(
    logits: NDArray[Any], written: Sequence[int], asked: Sequence[int], rules: Rules, most_tokens: int
) -> int:
    """Return the likeliest token that the rules allow.

    `written` are the tokens so far, the start token first; `asked` those of the text; `most_tokens` bounds `written`.
    """
    scores = logits.astype(np.float32, copy=True)
    if rules.repetition_penalty != 1.0:
        _penalise(scores, written, rules.repetition_penalty)
    _forbid(scores, written, asked, rules)
    if len(written) == 1 and rules.forced_bos_token_id is not None:
        scores = _only(scores, (rules.forced_bos_token_id,))
    if len(written) == most_tokens - 1 and rules.forced_eos_token_id:
        scores = _only(scores, rules.forced_eos_token_id)
    _strike(scores, rules.suppress_tokens)
    if len(written) == (1 if rules.forced_bos_token_id is None else 2):
        _strike(scores, rules.begin_suppress_tokens)
    if np.isnan(scores).any():
        raise ModelError("the model gave a value that is not a number")
    return int(scores.argmax())


def _forbid(scores: NDArray[np.float32], written: Sequence[int], asked: Sequence[int], rules: Rules) -> None:
    """Strike out what would repeat, what is a bad word, and an end that comes too early."""
    for size, text in ((rules.no_repeat_ngram_size, written), (rules.encoder_no_repeat_ngram_size, asked)):
        if size > 0:
            _strike(scores, _followers(text, written, size))
    for *before, last in rules.bad_words_ids:
        fits = len(before) < len(written) and list(written[len(written) - len(before) :]) == before
        if fits and (before or last not in rules.eos_token_id):
            _strike(scores, (last,))
    if len(written) < rules.least_tokens:
        _strike(scores, rules.eos_token_id)


def _penalise(scores: NDArray[np.float32], written: Sequence[int], penalty: float) -> None:
    seen = np.unique(np.asarray(written))
    values = scores[seen]
    scores[seen] = np.where(values < 0, values * np.float32(penalty), values / np.float32(penalty))


def _followers(text: Sequence[int], written: Sequence[int], size: int) -> list[int]:
    """Return the tokens that would complete a run of `size` tokens that the text has already."""
    if len(written) + 1 < size:
        return []
    before = list(written[len(written) - size + 1 :])
    starts = range(len(text) - size + 1)
    return [text[at + size - 1] for at in starts if list(text[at : at + size - 1]) == before]


def _strike(scores: NDArray[np.float32], tokens: Sequence[int]) -> None:
    if tokens:
        scores[list(tokens)] = _NEVER


def _only(scores: NDArray[np.float32], tokens: Sequence[int]) -> NDArray[np.float32]:
    forced = np.full_like(scores, _NEVER)
    forced[list(tokens)] = 0
    return forced
