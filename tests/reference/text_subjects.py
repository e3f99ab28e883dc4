"""Encoders that read texts: classifiers of texts and of tokens, finders of answers, makers of vectors."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedTokenizerFast, pipeline

from tests.reference import vocabularies, words
from tests.reference.case import Case, Subject
from tests.reference.exporting import export, small

POSITIONS = 64
"""Tokens that every model here takes."""

ENTITIES = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "MISC"]
_SHAPE = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
_DISTIL = {"dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 12}


@dataclass(frozen=True)
class Family:
    """One architecture: the prefix of its classes, its tokenizer, and the shape of a small one."""

    name: str
    prefix: str
    vocabulary: Callable[[int], PreTrainedTokenizerFast]
    shape: dict[str, Any]

    def make(self, head: str, chance: random.Random, **settings: Any) -> tuple[Any, PreTrainedTokenizerFast]:
        """Return a small model with this head, and its tokenizer."""
        tokenizer = self.vocabulary(POSITIONS)
        config = getattr(transformers, f"{self.prefix}Config")(
            vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **self.shape, **settings
        )
        return small(chance, getattr(transformers, f"{self.prefix}{head}"), config), tokenizer


BERT = Family("bert", "Bert", vocabularies.wordpiece, {**_SHAPE, "max_position_embeddings": POSITIONS})
CASED = Family("bert-cased", "Bert", vocabularies.wordpiece_cased, {**_SHAPE, "max_position_embeddings": POSITIONS})
DISTILBERT = Family(
    "distilbert", "DistilBert", vocabularies.wordpiece_distil, {**_DISTIL, "max_position_embeddings": POSITIONS}
)
ROBERTA = Family("roberta", "Roberta", vocabularies.byte_bpe, {**_SHAPE, "max_position_embeddings": POSITIONS + 2})
XLM = Family("xlm-roberta", "XLMRoberta", vocabularies.unigram, {**_SHAPE, "max_position_embeddings": POSITIONS + 2})


def subjects() -> list[Subject]:
    """Return every subject of this module."""
    return [
        _classifier(DISTILBERT, "", num_labels=2, js=True),
        _classifier(ROBERTA, "-many", num_labels=3, problem_type="multi_label_classification"),
        _classifier(BERT, "-one", num_labels=1, live=True),
        _classifier(XLM, "-regression", num_labels=2, problem_type="regression"),
        _classifier(BERT, "-pairs", num_labels=3, pairs=True),
        _classifier(ROBERTA, "-pairs", num_labels=3, pairs=True, live=True),
        *(_tagger(family) for family in (BERT, CASED, ROBERTA, XLM)),
        *(_finder(family) for family in (BERT, ROBERTA, XLM)),
    ]


def _classifier(
    family: Family, suffix: str, *, pairs: bool = False, js: bool = False, live: bool = False, **settings: Any
) -> Subject:
    def make(folder: Path, chance: random.Random, inputs: int) -> list[Case]:
        model, tokenizer = family.make("ForSequenceClassification", chance, **settings)
        export(model, [tokenizer], folder, "text-classification", js=js)
        asked = list(_pairs(chance, inputs) if pairs else words.texts(chance, inputs))
        asked += [] if pairs else list(_edge(tokenizer, chance))
        pipe = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
        return [*_classified(pipe, asked, chance), *_listed(pipe, asked)]

    return Subject(f"text-classification-{family.name}{suffix}", "text-classification", make, live=live)


def _pairs(chance: random.Random, count: int) -> list[dict[str, str]]:
    drawn = [{"text": words.text(chance, 8), "text_pair": words.text(chance, 8)} for _ in range(count)]
    return [{"text": "", "text_pair": ""}, {"text": "a", "text_pair": ""}, {"text": "alone"}, *drawn]


def _edge(tokenizer: PreTrainedTokenizerFast, chance: random.Random) -> tuple[str, str]:
    return words.fitting(lambda text: length_of(tokenizer, text), POSITIONS, chance)


def length_of(tokenizer: PreTrainedTokenizerFast, asked: Any) -> int:
    """Return the tokens of a text or of a pair."""
    encoded = tokenizer(**asked) if isinstance(asked, dict) else tokenizer(asked)
    return len(encoded["input_ids"])


def _classified(pipe: Any, asked: list[Any], chance: random.Random) -> list[Case]:
    cases = []
    for inputs in asked:
        parameters: dict[str, Any] = chance.choice([{}, {"top_k": 1}, {"top_k": 2}, {"top_k": None}, {"top_k": 50}])
        if chance.random() < 0.3:
            parameters = parameters | {"function_to_apply": chance.choice(["softmax", "sigmoid", "none"])}
        body = {"inputs": inputs, "parameters": parameters} if parameters else {"inputs": inputs}
        if length_of(pipe.tokenizer, inputs) > POSITIONS:
            cases.append(Case(body, error="too_large"))
            continue
        answer = pipe(inputs, **{"top_k": 1, **parameters})
        cases.append(Case(body, answer))
    return cases


def _listed(pipe: Any, asked: list[Any]) -> list[Case]:
    fitting = [inputs for inputs in asked if length_of(pipe.tokenizer, inputs) <= POSITIONS]
    groups = [fitting[:1], fitting[1:4], fitting[-9:]]
    return [Case({"inputs": group}, pipe(group, top_k=1)) for group in groups]


def _tagger(family: Family) -> Subject:
    def make(folder: Path, chance: random.Random, inputs: int) -> list[Case]:
        labels = dict(enumerate(ENTITIES))
        model, tokenizer = family.make("ForTokenClassification", chance, id2label=labels, label2id={})
        export(model, [tokenizer], folder, "token-classification", js=family is BERT)
        pipe = pipeline("token-classification", model=model, tokenizer=tokenizer, device="cpu")
        asked = [*words.texts(chance, inputs), *_edge(tokenizer, chance)]
        long = [words.text(chance, 80) for _ in range(max(3, inputs // 4))]
        single = [_tagged(pipe, text, chance) for text in [*asked, *long]]
        listed = Case({"inputs": asked[2:5]}, pipe(asked[2:5], aggregation_strategy="simple"))
        return [*single, listed]

    return Subject(
        f"token-classification-{family.name}",
        "token-classification",
        make,
        live=family.name in {"bert-cased", "xlm-roberta"},
    )


def _tagged(pipe: Any, text: str, chance: random.Random) -> Case:
    parameters: dict[str, Any] = chance.choice(
        [{}, *({"aggregation_strategy": name} for name in ("none", "simple", "first", "average", "max"))]
    )
    if chance.random() < 0.3:
        parameters = parameters | {"ignore_labels": chance.choice([[], ["PER", "B-LOC"], ["O", "MISC"]])}
    if chance.random() < 0.6 and parameters.get("aggregation_strategy") != "none":
        parameters = parameters | {"stride": chance.choice([0, 1, 8, 30, 61 if pipe.tokenizer.sep_token_id else 60])}
    body = {"inputs": text, "parameters": parameters}
    if "stride" not in parameters and length_of(pipe.tokenizer, text) > POSITIONS:
        return Case(body, error="too_large")
    return Case(body, pipe(text, **{"aggregation_strategy": "simple", **parameters}))


def _finder(family: Family) -> Subject:
    def make(folder: Path, chance: random.Random, inputs: int) -> list[Case]:
        model, tokenizer = family.make("ForQuestionAnswering", chance)
        export(model, [tokenizer], folder, "question-answering", js=family is ROBERTA)
        pipe = pipeline("question-answering", model=model, tokenizer=tokenizer, device="cpu")
        contexts = [*words.texts(chance, inputs), *(words.text(chance, 90) for _ in range(inputs))]
        return [
            _found(pipe, {"question": words.text(chance, 6) or "why", "context": context or "a"}, chance)
            for context in contexts
        ]

    return Subject(f"question-answering-{family.name}", "question-answering", make, live=family is XLM)


def _found(pipe: Any, asked: dict[str, str], chance: random.Random) -> Case:
    parameters: dict[str, Any] = {}
    if chance.random() < 0.4:
        parameters["top_k"] = chance.choice([1, 2, 5, 20])
    if chance.random() < 0.3:
        parameters["max_answer_len"] = chance.choice([1, 3, 40])
    if chance.random() < 0.3:
        parameters["handle_impossible_answer"] = True
    if chance.random() < 0.3:
        parameters["align_to_words"] = False
    whole = length_of(pipe.tokenizer, {"text": asked["question"], "text_pair": asked["context"]})
    alone = len(pipe.tokenizer(asked["question"], add_special_tokens=False)["input_ids"])
    room = POSITIONS - alone - pipe.tokenizer.num_special_tokens_to_add(pair=True)
    if room < 1 and whole > POSITIONS:
        return Case({"inputs": asked, "parameters": parameters}, error="too_large")
    # The pipeline fails where its usual stride leaves no room beside the question; then ours is a smaller one.
    usual = min(POSITIONS // 2, 128)
    if chance.random() < 0.3 or room <= usual:
        parameters["doc_stride"] = chance.randrange(max(1, room))
    return Case({"inputs": asked, "parameters": parameters}, pipe(**asked, **parameters))
