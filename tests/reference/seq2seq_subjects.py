"""Encoder-decoders that translate and summarise: T5-, Marian- and BART-shaped, and one of many languages."""

from __future__ import annotations

import copy
import random
import tempfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    NllbTokenizerFast,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    pipeline,
)

from tests.reference import vocabularies, words
from tests.reference.case import Case, Subject
from tests.reference.exporting import export, small
from tests.reference.text_subjects import POSITIONS, length_of

T5_TASKS = ("translation_en_to_de", "translation_en_to_fr", "translation")
LANGUAGES = ["eng_Latn", "deu_Latn", "fra_Latn"]
_SHAPE = {
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12,
    "max_position_embeddings": POSITIONS,
}

Made = tuple[Any, PreTrainedTokenizerFast]


def subjects() -> list[Subject]:
    """Return every subject of this module."""
    return [
        _subject("t5", "translation", _t5, tasks=T5_TASKS, live=True),
        _subject("t5-summary", "summarization", _t5, js=True),
        _subject("marian", "translation", _marian, merged=False),
        _subject("marian-pieces", "translation", _marian_pieces, live=True),
        _subject("bart", "summarization", _bart),
        _subject("bart-uncached", "summarization", _bart, cached=False, live=True),
        _subject("nllb", "translation", _nllb),
    ]


def _t5(chance: random.Random) -> Made:
    tokenizer = vocabularies.unigram_t5(POSITIONS)
    tasks = {
        "summarization": {"prefix": "summarize: ", "min_length": 5, "no_repeat_ngram_size": 3, "max_length": 30},
        "translation_en_to_de": {"prefix": "translate English to German: ", "max_length": 300},
        "translation_en_to_fr": {"prefix": "translate English to French: ", "num_beams": 4},
    }
    config = T5Config(
        vocab_size=len(tokenizer), d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1, task_specific_params=tasks, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return _ending(small(chance, T5ForConditionalGeneration, config, spread=0.6), "lm_head", 1), tokenizer


def _marian(chance: random.Random) -> Made:
    tokenizer = vocabularies.unigram_t5(POSITIONS)
    config = MarianConfig(
        vocab_size=len(tokenizer), **_SHAPE, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
        forced_eos_token_id=1, bad_words_ids=[[0], [30, 31]], max_length=40, num_beams=4, scale_embedding=True,
    )  # fmt: skip
    return _ending(small(chance, MarianMTModel, config), "model.shared", 1), tokenizer


def _marian_pieces(chance: random.Random) -> Made:
    """Marian with its own slow tokenizer, which has no tokenizer.json."""
    with tempfile.TemporaryDirectory() as work:
        tokenizer = vocabularies.marian(POSITIONS, Path(work), chance.choice(["nmt_nfkc", "identity", "nfkc_cf"]))
        tokenizer.save_pretrained(work)
        tokenizer = type(tokenizer).from_pretrained(work)
    config = MarianConfig(
        vocab_size=len(tokenizer), **_SHAPE, pad_token_id=tokenizer.pad_token_id, eos_token_id=0, max_length=30,
        decoder_start_token_id=tokenizer.pad_token_id, bad_words_ids=[[tokenizer.pad_token_id]],
    )  # fmt: skip
    return _ending(small(chance, MarianMTModel, config), "model.shared", 0), tokenizer


def _bart(chance: random.Random) -> Made:
    tokenizer = vocabularies.byte_bpe(POSITIONS)
    config = BartConfig(
        vocab_size=len(tokenizer), **_SHAPE, pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2,
        forced_bos_token_id=0, forced_eos_token_id=2, max_length=32, min_length=6, no_repeat_ngram_size=3, num_beams=4,
        early_stopping=True, length_penalty=2.0, prefix=" ",
    )  # fmt: skip
    return _ending(small(chance, BartForConditionalGeneration, config), "model.shared", 2), tokenizer


def _nllb(chance: random.Random) -> Made:
    plain = vocabularies.unigram(POSITIONS).backend_tokenizer
    plain.add_special_tokens(LANGUAGES)
    code = plain.token_to_id("eng_Latn")
    plain.post_processor = processors.TemplateProcessing(
        single="eng_Latn $A </s>", pair="eng_Latn $A $B </s>", special_tokens=[("eng_Latn", code), ("</s>", 2)]
    )
    tokenizer = NllbTokenizerFast(
        tokenizer_object=plain, src_lang="eng_Latn", tgt_lang=None, model_max_length=POSITIONS,
        additional_special_tokens=LANGUAGES,
    )  # fmt: skip
    shape = {**_SHAPE, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
    config = M2M100Config(
        vocab_size=len(tokenizer), **shape, pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2,
        max_length=30,
    )  # fmt: skip
    return _ending(small(chance, M2M100ForConditionalGeneration, config), "model.shared", 2), tokenizer


def _ending(model: Any, table: str, end: int) -> Any:
    """Make the end token likely enough that some answers end before their bound."""
    with torch.no_grad():
        model.get_submodule(table).weight[end] *= 1.6
    return model


def _subject(
    name: str,
    task: str,
    made: Callable[[random.Random], Made],
    *,
    js: bool = False,
    merged: bool = True,
    cached: bool = True,
    tasks: tuple[str, ...] = (),
    live: bool = False,
) -> Subject:
    def make(folder: Path, chance: random.Random, inputs: int) -> list[Case]:
        model, tokenizer = made(chance)
        export(
            model,
            [tokenizer],
            folder,
            f"text2text-generation{'-with-past' if cached else ''}",
            js=js,
            no_post_process=not merged,
        )
        _leave_one(folder)
        # A pipeline writes its task's settings into its model.
        pipes = {
            kind: pipeline(kind, model=copy.deepcopy(model), tokenizer=tokenizer, device="cpu")
            for kind in tasks or (task,)
        }
        asked = [*words.texts(chance, inputs), *words.fitting(lambda text: length_of(tokenizer, text), 50, chance)]
        if not tokenizer.is_fast:
            # `tokenizers` folds a letter together with its marks, sentencepiece each by itself.
            asked = [text for text in asked if not any(map(unicodedata.combining, text))]
        return [_written(pipes[kind], text, chance) for text in asked for kind in [chance.choice(list(pipes))]]

    return Subject(f"{task}-{name}", task, make, live=live)


def _leave_one(folder: Path) -> None:
    """Leave out the decoders that the merged one stands for: Optimum writes all, transformers.js asks for one."""
    for merged in folder.rglob("decoder_model_merged.onnx"):
        for name in ("decoder_model.onnx", "decoder_with_past_model.onnx"):
            (merged.parent / name).unlink()


def _written(pipe: Any, text: str, chance: random.Random) -> Case:
    parameters: dict[str, Any] = {}
    for name, values in (
        ("max_new_tokens", [1, 5, 12, 50]),
        ("min_new_tokens", [3]),
        ("repetition_penalty", [1.3]),
        ("no_repeat_ngram_size", [1, 2]),
    ):
        if chance.random() < 0.25:
            parameters[name] = chance.choice(values)
    asked: dict[str, Any] = dict(parameters)
    languages = {}
    if isinstance(pipe.tokenizer, NllbTokenizerFast):
        languages = {"src_lang": chance.choice(LANGUAGES), "tgt_lang": chance.choice(LANGUAGES)}
    elif len(parts := pipe.task.split("_")) == 4:
        asked |= {"src_lang": parts[1], "tgt_lang": parts[3]}
    body = {"inputs": text, "parameters": {**asked, **languages}} if asked or languages else {"inputs": text}
    if _length(pipe, text) > POSITIONS:
        return Case(body, error="too_large")
    answer = pipe(text, num_beams=1, do_sample=False, **parameters, **languages)
    return Case(body, answer[0])


def _length(pipe: Any, text: str) -> int:
    return length_of(pipe.tokenizer, (getattr(pipe, "prefix", None) or "") + text)
