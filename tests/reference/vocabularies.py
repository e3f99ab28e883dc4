"""Small real tokenizers of each kind, trained on the small world's texts, in the classes of `transformers`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertTokenizerFast,
    DistilBertTokenizerFast,
    MarianTokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizerFast,
    T5TokenizerFast,
)

from tests.reference.words import CORPUS

SIZE = 420
_TEXTS = list(CORPUS) * 3 + [text.upper() for text in CORPUS]

Maker = Callable[[int], PreTrainedTokenizerFast]


def wordpiece(most_tokens: int, *, lowercase: bool = True, kind: Any = BertTokenizerFast) -> PreTrainedTokenizerFast:
    """Return BERT's kind: accents and case folded (or neither), words in pieces that begin with ##."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    # Some letters are left out, so that there are words that the vocabulary does not know.
    tokenizer.train_from_iterator(
        _TEXTS,
        trainers.WordPieceTrainer(vocab_size=SIZE, special_tokens=special, limit_alphabet=90, show_progress=False),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return kind(tokenizer_object=tokenizer, model_max_length=most_tokens, do_lower_case=lowercase)


def wordpiece_cased(most_tokens: int) -> PreTrainedTokenizerFast:
    """Return BERT's kind with its case kept."""
    return wordpiece(most_tokens, lowercase=False)


def wordpiece_distil(most_tokens: int) -> PreTrainedTokenizerFast:
    """Return DistilBERT's kind: BERT's, for a model that does not tell the parts of a pair apart."""
    return wordpiece(most_tokens, kind=DistilBertTokenizerFast)


def byte_bpe(most_tokens: int) -> PreTrainedTokenizerFast:
    """Return RoBERTa's kind: bytes as letters, a word with the space before it."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        _TEXTS,
        trainers.BpeTrainer(vocab_size=SIZE, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False
    )
    return RobertaTokenizerFast(tokenizer_object=tokenizer, model_max_length=most_tokens)


def unigram(most_tokens: int) -> PreTrainedTokenizerFast:
    """Return XLM-RoBERTa's kind: pieces with their likelihood, a space written as a letter."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = _unigram(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=most_tokens,
        bos_token="<s>", eos_token="</s>", sep_token="</s>", cls_token="<s>", unk_token="<unk>", pad_token="<pad>",
        mask_token=AddedToken("<mask>", lstrip=True, special=True),
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def unigram_t5(most_tokens: int) -> PreTrainedTokenizerFast:
    """Return T5's kind: as `unigram`, with only an end token around a text."""
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer = _unigram(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return T5TokenizerFast(tokenizer_object=tokenizer, model_max_length=most_tokens, extra_ids=0)


def _unigram(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=SIZE, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(_TEXTS, trainer)
    return tokenizer


def marian(most_tokens: int, folder: Path, normalizer: str) -> MarianTokenizer:
    """Return Marian's kind: a sentencepiece model for each language, and one table of all their pieces."""
    tables: dict[str, int] = {"</s>": 0, "<unk>": 1, ">>deu<<": 2}
    for name, texts in (("source", _TEXTS), ("target", [text[::-1] for text in _TEXTS])):
        settings = {"vocab_size": 200, "model_type": "unigram", "normalization_rule_name": normalizer}
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_prefix=str(folder / name), minloglevel=2, character_coverage=0.98,
            hard_vocab_limit=False, bos_id=-1, **settings,
        )  # fmt: skip
        (folder / f"{name}.model").rename(folder / f"{name}.spm")
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / f"{name}.spm"))
        for number in range(pieces.get_piece_size()):
            tables.setdefault(pieces.id_to_piece(number), len(tables))
    tables["<pad>"] = len(tables)
    (folder / "vocab.json").write_text(json.dumps(tables))
    return MarianTokenizer(
        str(folder / "source.spm"), str(folder / "target.spm"), str(folder / "vocab.json"),
        source_lang="en", target_lang="de", model_max_length=most_tokens,
    )  # fmt: skip
