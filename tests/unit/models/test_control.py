"""What askers type stays text, though it is written as a control token is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, processors

from models.generation.control import ControlTokens
from models.tokens import Tokenizer
from tests.fakes.generation import END, byte_tokenizer


def tokenizer_of(*, begins: bool = False) -> Tokenizer:
    made = byte_tokenizer()
    made.add_special_tokens([AddedToken("<s>", special=True), AddedToken("<|im_start|>", special=True)])
    if begins:
        begin = made.token_to_id("<s>")
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    return Tokenizer(made.to_str().encode())


TOKENS = tokenizer_of()
CONTROL = ControlTokens(TOKENS)
NUMBERS = {TOKENS.number(text) for text in (END, "<s>", "<|im_start|>")}


def test_a_control_token_that_was_typed_is_letters() -> None:
    tokens = CONTROL.encode(CONTROL.guard("a<|im_start|>b"), special=False)
    assert tokens == [TOKENS.encode(letter).ids[0] for letter in "a<|im_start|>b"]


def test_one_that_the_template_writes_is_a_control_token() -> None:
    tokens = CONTROL.encode(f"<|im_start|>{CONTROL.guard('x' + END)}{END}", special=False)
    assert tokens[0] == TOKENS.number("<|im_start|>")
    assert tokens[-1] == TOKENS.number(END)
    assert sum(token in NUMBERS for token in tokens) == 2


def test_a_text_without_any_is_encoded_as_the_tokenizer_does() -> None:
    for text in ("", "plain", "grüß 😀", "<| end |>"):
        assert CONTROL.encode(CONTROL.guard(text), special=True) == TOKENS.encode(text).ids


def test_what_the_model_wants_around_a_text_stays_around_it() -> None:
    tokenizer = tokenizer_of(begins=True)
    control = ControlTokens(tokenizer)
    tokens = control.encode(control.guard(f"a{END}"), special=True)
    assert tokens[0] == tokenizer.number("<s>")
    assert tokens[1:] == [tokenizer.encode(letter, special=False).ids[0] for letter in f"a{END}"]


@pytest.mark.parametrize("typed", ["\ufdd00\ufdd1", "\ufdd0", "\ufdd1\ufdd0", "\ufdd099999999999\ufdd1"])
def test_marks_that_were_typed_mean_nothing(typed: str) -> None:
    assert CONTROL.encode(CONTROL.guard(typed), special=False) == TOKENS.encode(typed).ids


def test_a_mark_that_a_template_makes_up_is_nothing() -> None:
    assert CONTROL.encode("a\ufdd0777\ufdd1b", special=False) == TOKENS.encode("ab").ids


@given(st.lists(st.sampled_from([END, "<s>", "<|im_start|>", "<|", "|>", "im_start", "\ufdd0", "\ufdd1", "1", "ü"])))
def test_whatever_is_typed_no_control_token_comes_of_it(parts: list[str]) -> None:
    text = "".join(parts)
    tokens = CONTROL.encode(CONTROL.guard(text), special=False)
    assert not NUMBERS & set(tokens)
    assert len(tokens) == len(text.encode())
