"""Decoders that continue texts: Llama-, Qwen- and GPT-2-shaped, of random weights, asked for the likeliest tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.reference import vocabularies, words
from tests.reference.case import Case, Subject
from tests.reference.exporting import export, small

CONTEXT = 96
LONGEST = 24
_SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": CONTEXT}
_ENDS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "tie_word_embeddings": False}

Made = tuple[Any, PreTrainedTokenizerFast]


def subjects() -> list[Subject]:
    """Return every subject of this module."""
    return [_subject("llama", _llama), _subject("qwen", _qwen, js=True), _subject("gpt2", _gpt2)]


def _llama(chance: random.Random, size: int) -> Any:
    config = LlamaConfig(vocab_size=size, **_SHAPE, **_ENDS, num_key_value_heads=1, intermediate_size=24)
    return small(chance, LlamaForCausalLM, config)


def _qwen(chance: random.Random, size: int) -> Any:
    config = Qwen2Config(vocab_size=size, **_SHAPE, **_ENDS, num_key_value_heads=1, intermediate_size=24)
    return small(chance, Qwen2ForCausalLM, config)


def _gpt2(chance: random.Random, size: int) -> Any:
    config = GPT2Config(vocab_size=size, n_embd=16, n_layer=2, n_head=2, n_positions=CONTEXT, **_ENDS)
    return small(chance, GPT2LMHeadModel, config)


def _subject(name: str, made: Callable[[random.Random, int], Any], *, js: bool = False) -> Subject:
    def make(folder: Path, chance: random.Random, inputs: int) -> list[Case]:
        tokenizer = vocabularies.byte_bpe(CONTEXT)
        model = _speakable(made(chance, len(tokenizer)), tokenizer)
        export(model, [tokenizer], folder, "text-generation-with-past", js=js)
        # The reference takes control tokens from whoever types them; we do not.
        typed = tokenizer.all_special_tokens
        texts = [text for text in words.texts(chance, inputs) if text.strip() and not any(at in text for at in typed)]
        cases = [_case(model, tokenizer, text, chance) for text in texts]
        text, longer = words.fitting(lambda text: len(tokenizer(text)["input_ids"]), CONTEXT - LONGEST, chance)
        full = CONTEXT - len(tokenizer(text)["input_ids"])
        too_long = {"inputs": longer, "parameters": {"max_new_tokens": LONGEST, "do_sample": False}}
        return [*cases, _asked(model, tokenizer, text, {"max_new_tokens": full}), Case(too_long, error="too_large")]

    return Subject(name=name, task="text-generation", make=make)


def _speakable(model: Any, tokenizer: PreTrainedTokenizerFast) -> Any:
    """Let the model write ASCII only, so that its text tells its tokens; and make the end likely enough to come."""
    table = model.get_output_embeddings().weight
    with torch.no_grad():
        for token in range(len(tokenizer)):
            text = tokenizer.decode([token])
            if token in tokenizer.all_special_ids or not text.isascii() or "\ufffd" in text:
                table[token] = 0
        table[2] = torch.randn_like(table[2]) * 0.4
    return model


def _case(model: Any, tokenizer: PreTrainedTokenizerFast, text: str, chance: random.Random) -> Case:
    parameters: dict[str, Any] = {"max_new_tokens": chance.randint(1, LONGEST)}
    if chance.random() < 0.3:
        parameters["repetition_penalty"] = round(chance.uniform(1.05, 1.5), 2)
    if chance.random() < 0.2:
        parameters["min_new_tokens"] = parameters["max_new_tokens"]
    return _asked(model, tokenizer, text, parameters)


def _asked(model: Any, tokenizer: PreTrainedTokenizerFast, text: str, parameters: dict[str, Any]) -> Case:
    body = {"inputs": text, "parameters": {**parameters, "do_sample": False}}
    prompt = tokenizer(text, return_tensors="pt")["input_ids"]
    if prompt.shape[1] + parameters["max_new_tokens"] > CONTEXT:
        return Case(body, error="too_large")
    written = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **parameters)
    answer = tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True)
    return Case(body, {"generated_text": answer})
