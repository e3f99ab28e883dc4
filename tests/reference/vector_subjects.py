"""Encoders that make vectors of texts, in the folders of sentence-transformers and without them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Normalize, Pooling, Transformer
from transformers import pipeline

from tests.reference import words
from tests.reference.case import Case, Subject
from tests.reference.exporting import export
from tests.reference.text_subjects import BERT, DISTILBERT, POSITIONS, ROBERTA, XLM, Family, length_of

PROMPTS = {"query": "question: ", "passage": "context: "}
MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


def subjects() -> list[Subject]:
    """Return every subject of this module."""
    return [
        _encoder(BERT, ["mean"], normalize=True, js=True),
        _encoder(DISTILBERT, ["cls"], normalize=False, longest=40),
        _encoder(XLM, ["lasttoken"], normalize=True, prompts=PROMPTS),
        _encoder(
            ROBERTA,
            ["max", "weightedmean", "mean_sqrt_len_tokens"],
            normalize=False,
            prompts=PROMPTS,
            left_out=True,
        ),
        _pooled_by_the_graph(BERT),
        _plain(BERT),
    ]  # fmt: skip


def _encoder(
    family: Family,
    modes: list[str],
    *,
    normalize: bool,
    js: bool = False,
    longest: int = POSITIONS,
    prompts: dict[str, str] | None = None,
    left_out: bool = False,
) -> Subject:
    def make(folder: Path, chance: random.Random, inputs: int) -> list[Case]:
        model, tokenizer = family.make("Model", chance)
        export(model, [tokenizer], folder, "feature-extraction", js=js, library_name="transformers")
        encoder = _sentence_transformer(model, tokenizer, folder, modes, longest, normalize=normalize)
        if prompts:
            encoder.prompts, encoder.default_prompt_name = prompts, "query"
            encoder[1].include_prompt = not left_out
        _describe(folder, encoder)
        asked = [*words.texts(chance, inputs), *words.fitting(lambda text: length_of(tokenizer, text), longest, chance)]
        return [_encoded(encoder, text, chance, longest) for text in asked]

    return Subject(f"feature-extraction-{family.name}", "feature-extraction", make, live=family is DISTILBERT)


def _sentence_transformer(
    model: Any, tokenizer: Any, folder: Path, modes: list[str], longest: int, *, normalize: bool
) -> SentenceTransformer:
    reader = Transformer.__new__(Transformer)
    torch.nn.Module.__init__(reader)
    reader.auto_model, reader.tokenizer, reader.max_seq_length, reader.do_lower_case = model, tokenizer, longest, False
    reader.config_keys, reader.model_forward_params = (
        ["max_seq_length", "do_lower_case"],
        set(model.forward.__code__.co_varnames),
    )
    width = model.config.dim if hasattr(model.config, "dim") else model.config.hidden_size
    chosen = {
        f"pooling_mode_{mode if '_' in mode or mode == 'lasttoken' else f'{mode}_tokens'}": True for mode in modes
    }
    off = {"pooling_mode_mean_tokens": False}
    modules = [reader, Pooling(width, **{**off, **chosen}) if modes != ["cls"] else Pooling(width, pooling_mode="cls")]
    return SentenceTransformer(modules=[*modules, Normalize()] if normalize else modules, device="cpu")


def _describe(folder: Path, encoder: SentenceTransformer) -> None:
    """Write what sentence-transformers writes beside a model."""
    modules = []
    for number, module in enumerate(encoder):
        kind = type(module).__name__
        path = "" if number == 0 else f"{number}_{kind}"
        modules.append(
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        )
        if kind == "Pooling":
            (folder / path).mkdir()
            (folder / path / "config.json").write_text(json.dumps(module.get_config_dict()))
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": encoder[0].max_seq_length}))
    if encoder.prompts:
        named = {"prompts": encoder.prompts, "default_prompt_name": encoder.default_prompt_name}
        (folder / "config_sentence_transformers.json").write_text(json.dumps(named))


def _encoded(encoder: SentenceTransformer, text: str, chance: random.Random, longest: int) -> Case:
    parameters: dict[str, Any] = {}
    name = encoder.default_prompt_name
    if encoder.default_prompt_name and chance.random() < 0.4:
        parameters["prompt_name"] = name = chance.choice(list(PROMPTS))
    prompt = encoder.prompts[name] if name else ""
    body = {"inputs": text, "parameters": parameters} if parameters else {"inputs": text}
    if length_of(encoder.tokenizer, prompt + text) > longest:
        return Case(body, error="too_large")
    return Case(body, encoder.encode(text, prompt=prompt or None).tolist())


def _pooled_by_the_graph(family: Family) -> Subject:
    """A graph with a `sentence_embedding` of its own, as Optimum exports what sentence-transformers saved."""

    def make(folder: Path, chance: random.Random, inputs: int) -> list[Case]:
        model, tokenizer = family.make("Model", chance)
        encoder = _sentence_transformer(model, tokenizer, folder, ["mean"], POSITIONS, normalize=True)
        export(encoder, [], folder, "feature-extraction", library_name="sentence_transformers")
        asked = [text for text in words.texts(chance, inputs) if length_of(tokenizer, text) <= POSITIONS]
        single = [Case({"inputs": text}, encoder.encode(text).tolist()) for text in asked]
        return [*single, Case({"inputs": asked[:5]}, encoder.encode(asked[:5]).tolist())]

    return Subject(f"feature-extraction-{family.name}-pooled", "feature-extraction", make)


def _plain(family: Family) -> Subject:
    """A folder that says nothing of vectors: the asker does, or takes the pipeline's matrix."""

    def make(folder: Path, chance: random.Random, inputs: int) -> list[Case]:
        model, tokenizer = family.make("Model", chance)
        export(model, [tokenizer], folder, "feature-extraction", library_name="transformers")
        pipe = pipeline("feature-extraction", model=model, tokenizer=tokenizer, device="cpu")
        asked = [text for text in words.texts(chance, inputs) if length_of(tokenizer, text) <= POSITIONS]
        matrices = [Case({"inputs": text, "parameters": {"pooling": "none"}}, pipe(text)[0]) for text in asked[::5]]
        listed = Case({"inputs": asked[3:7], "parameters": {"pooling": "none"}}, [pipe(text)[0] for text in asked[3:7]])
        return [*matrices, listed, *(_asked_for(pipe, text, chance) for text in asked)]

    return Subject(f"feature-extraction-{family.name}-plain", "feature-extraction", make)


def _asked_for(pipe: Any, text: str, chance: random.Random) -> Case:
    mode = chance.choice([None, *MODES])
    matrix = torch.tensor(pipe(text))
    vector = Pooling(matrix.shape[-1], pooling_mode=mode or "mean")(
        {"token_embeddings": matrix, "attention_mask": torch.ones(matrix.shape[:2])}
    )["sentence_embedding"]
    parameters: dict[str, Any] = {"pooling": mode.removesuffix("_tokens")} if mode else {}
    if chance.random() < 0.5:
        vector = torch.nn.functional.normalize(vector)
        parameters["normalize"] = True
    return Case({"inputs": text, "parameters": parameters}, vector[0].tolist())
