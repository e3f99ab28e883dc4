"""What a model does and how much it takes, by the files that Hugging Face's tools write. Pure: no I/O, no clock."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from cloud_sync.fleet.errors import FleetError
from models.manifest import Limits

TASKS: Final = (
    "text-classification",
    "token-classification",
    "question-answering",
    "feature-extraction",
    "translation",
    "summarization",
    "text-generation",
    "image-classification",
    "object-detection",
    "image-segmentation",
    "audio-classification",
    "automatic-speech-recognition",
    "tabular-classification",
    "tabular-regression",
    "time-series-forecasting",
    "tensors",
)
"""Every task of PROTOCOL 2."""

SEQUENCES: Final = frozenset({"translation", "summarization"})
"""Tasks of an encoder and a decoder."""

_TEXTS: Final = frozenset({"text-classification", "token-classification", "question-answering", "feature-extraction"})
_BATCHES: Final = {
    **dict.fromkeys(_TEXTS, 32),
    "tabular-classification": 256,
    "tabular-regression": 256,
    "time-series-forecasting": 32,
    "image-classification": 8,
    "text-generation": 4,
}

_HEADS: Final = {
    "TokenClassification": ("token-classification",),
    "QuestionAnswering": ("question-answering",),
    "ImageClassification": ("image-classification",),
    "ImageClassificationWithTeacher": ("image-classification",),
    "ObjectDetection": ("object-detection",),
    "SemanticSegmentation": ("image-segmentation",),
    "ImageSegmentation": ("image-segmentation",),
    "InstanceSegmentation": ("image-segmentation",),
    "UniversalSegmentation": ("image-segmentation",),
    "AudioClassification": ("audio-classification",),
    "CTC": ("automatic-speech-recognition",),
    "CausalLM": ("text-generation",),
    "ConditionalGeneration": ("translation", "summarization"),
}
"""What stands after `For` in the name of an architecture of transformers."""

_SOUND_FAMILIES: Final = frozenset(
    {"data2vec-audio", "hubert", "sew", "sew-d", "unispeech", "unispeech-sat", "wav2vec2", "wav2vec2-bert", "wavlm"}
)
"""Model types whose sequences are sounds."""

_FAMILIES: Final = {
    "marian": ("translation",),
    "m2m_100": ("translation",),
    "pegasus": ("summarization",),
    "led": ("summarization",),
}
_TAGS: Final = {
    **{task: task for task in TASKS},
    "sentence-similarity": "feature-extraction",
    "zero-shot-classification": "text-classification",
    "text-ranking": "text-classification",
}
"""Words of Hugging Face's model cards for a task of ours."""

_SHIFTED: Final = frozenset({"camembert", "ibert", "longformer", "mpnet", "roberta", "xlm-roberta", "xlm-roberta-xl"})
_NO_LIMIT: Final = 1_000_000
"""What tokenizers without a length of their own say is far above this."""


class Clues(msgspec.Struct, frozen=True, kw_only=True):
    """What the files beside a graph say; an empty table where the file is not there."""

    config: Mapping[str, Any] = {}
    tokenizer: Mapping[str, Any] = {}
    sentence: Mapping[str, Any] = {}
    card: Mapping[str, Any] = {}
    is_sentence_model: bool = False
    """Whether the folder has the `modules.json` or `1_Pooling` of sentence-transformers."""
    is_generator: bool = False
    """Whether the folder has onnxruntime-genai's `genai_config.json`."""
    is_bare: bool = False
    """Whether there is a graph and no `config.json`."""


def find_task(clues: Clues, asked: str = "", asked_in: str = "--task") -> tuple[str, str]:
    """Return (task, what says so); raises FleetError that says what to type."""
    if asked:
        if asked not in TASKS:
            raise FleetError(f"{asked_in}: task {asked!r} is none of {', '.join(TASKS)}")
        return asked, asked_in
    if clues.is_sentence_model:
        return "feature-extraction", "a folder of sentence-transformers"
    if clues.is_generator:
        return "text-generation", "genai_config.json"
    tag = str(clues.card.get("pipeline_tag", ""))
    told = _TAGS.get(tag)
    possible, why = _by_config(clues.config)
    if len(possible) == 1:
        return possible[0], why
    if told is not None and (told in possible or not possible):
        return told, f"README.md: pipeline_tag {tag}"
    if clues.is_bare and not tag:
        return "tensors", "a graph without config.json"
    raise _unknown(possible, why, tag)


def find_limits(task: str, clues: Clues) -> Limits:
    """Return what one request and one batch may hold, by the configuration and the tokenizer."""
    batch = _BATCHES.get(task, 1)
    return Limits(context_tokens=_context_tokens(task, clues), batch=batch)


def parse_card(text: str) -> dict[str, Any]:
    """Return the plain `name: value` lines of a model card's YAML head; lists and tables in it are passed over."""
    head, _, rest = text.partition("\n")
    if head.strip() != "---":
        return {}
    lines = rest.split("\n---", 1)[0].splitlines()
    pairs = (line.partition(":") for line in lines if line[:1].strip() not in {"", "-", "#"})
    return {name.strip(): value.strip().strip("\"'") for name, colon, value in pairs if colon and value.strip()}


def _by_config(config: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
    """Return the tasks that a configuration allows, and what in it says so."""
    kind = str(config.get("model_type", ""))
    if kind in _FAMILIES:
        return _FAMILIES[kind], f"config.json: model_type {kind}"
    names = config.get("architectures") or []
    name = str(names[0]) if isinstance(names, list) and names else ""
    why = f"config.json: architectures {name}"
    head = name.rpartition("For")[2]
    if head == "SequenceClassification":
        return ("audio-classification",) if kind in _SOUND_FAMILIES else ("text-classification",), why
    if head in _HEADS:
        return _narrowed(_HEADS[head], config), why
    if name.endswith("LMHeadModel"):
        return ("text-generation",), why
    if name.endswith("Model") and not config.get("is_encoder_decoder"):
        return ("feature-extraction",), why
    return (), why if name else "config.json names no architecture" if config else "there is no config.json"


def _narrowed(tasks: tuple[str, ...], config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the tasks that `task_specific_params` names, where it names any of them."""
    params = config.get("task_specific_params")
    named = {str(name).split("_")[0] for name in params} if isinstance(params, dict) else set()
    return tuple(task for task in tasks if task in named) or tasks


def _unknown(possible: tuple[str, ...], why: str, tag: str) -> FleetError:
    said = f"{why}; README.md says pipeline_tag {tag}" if tag else why
    choices = possible or TASKS
    return FleetError(f"what the model does cannot be told ({said}); add --task {' or --task '.join(choices)}")


def _context_tokens(task: str, clues: Clues) -> int:
    if task not in _TEXTS | SEQUENCES:
        return 0
    bounds = [
        _length(clues.sentence.get("max_seq_length")),
        _length(clues.tokenizer.get("model_max_length")),
        _positions(clues.config),
    ]
    return min((bound for bound in bounds if bound), default=0)


def _positions(config: Mapping[str, Any]) -> int:
    """Return how many positions the model has; RoBERTa's kind counts two more than it can use."""
    for name in ("max_position_embeddings", "n_positions", "max_source_positions"):
        if positions := _length(config.get(name)):
            return positions - 2 if config.get("model_type") in _SHIFTED else positions
    return 0


def _length(value: object) -> int:
    """Return a number of tokens, 0 for what is none or stands for no limit."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _NO_LIMIT
    return int(value) if known and isinstance(value, int | float) else 0
