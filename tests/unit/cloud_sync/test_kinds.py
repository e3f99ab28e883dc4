"""What a model does and takes, told from the files beside its graph."""

from __future__ import annotations

from typing import Any

import pytest

from cloud_sync.fleet.errors import FleetError
from cloud_sync.fleet.kinds import TASKS, Clues, find_limits, find_task, parse_card
from models.manifest import Limits
from models.session import _TASKS


def config(architecture: str, **more: Any) -> Clues:
    return Clues(config={"architectures": [architecture], **more})


@pytest.mark.parametrize(
    ("clues", "task"),
    [
        (config("BertForSequenceClassification"), "text-classification"),
        (config("Wav2Vec2ForSequenceClassification", model_type="wav2vec2"), "audio-classification"),
        (config("ASTForAudioClassification"), "audio-classification"),
        (config("XLMRobertaForTokenClassification"), "token-classification"),
        (config("DistilBertForQuestionAnswering"), "question-answering"),
        (config("ViTForImageClassification"), "image-classification"),
        (config("YolosForObjectDetection"), "object-detection"),
        (config("SegformerForSemanticSegmentation"), "image-segmentation"),
        (config("Mask2FormerForUniversalSegmentation"), "image-segmentation"),
        (config("HubertForCTC"), "automatic-speech-recognition"),
        (config("BertModel"), "feature-extraction"),
        (config("MarianMTModel", model_type="marian", is_encoder_decoder=True), "translation"),
        (config("PegasusForConditionalGeneration", model_type="pegasus"), "summarization"),
        (config("BartForConditionalGeneration", task_specific_params={"summarization": {}}), "summarization"),
        (config("LlamaForCausalLM"), "text-generation"),
        (config("GPT2LMHeadModel"), "text-generation"),
        (config("MaskFormerModel"), "feature-extraction"),
        (Clues(is_sentence_model=True, config={"architectures": ["BertForMaskedLM"]}), "feature-extraction"),
        (Clues(config={"model_type": "x"}, card={"pipeline_tag": "sentence-similarity"}), "feature-extraction"),
        (Clues(is_bare=True), "tensors"),
        (Clues(is_bare=True, is_generator=True), "text-generation"),
    ],
)
def test_the_task_is_told_by_the_configuration(clues: Clues, task: str) -> None:
    assert find_task(clues)[0] == task


def test_a_model_card_decides_between_two_tasks_and_against_none() -> None:
    t5 = {"architectures": ["T5ForConditionalGeneration"]}
    assert find_task(Clues(config=t5, card={"pipeline_tag": "translation"}))[0] == "translation"
    bert = {"architectures": ["BertForSequenceClassification"]}
    assert find_task(Clues(config=bert, card={"pipeline_tag": "translation"}))[0] == "text-classification"


@pytest.mark.parametrize(
    ("clues", "says"),
    [
        (config("T5ForConditionalGeneration"), "add --task translation or --task summarization"),
        (config("BertForMaskedLM"), r"architectures BertForMaskedLM.*add --task text-classification"),
        (Clues(config={"hidden_size": 3}), "names no architecture"),
        (Clues(is_bare=True, card={"pipeline_tag": "fill-mask"}), "pipeline_tag fill-mask"),
    ],
)
def test_a_task_that_cannot_be_told_is_an_error_that_says_what_to_type(clues: Clues, says: str) -> None:
    with pytest.raises(FleetError, match=says):
        find_task(clues)


def test_a_task_that_was_asked_for_is_taken_and_must_be_one() -> None:
    assert find_task(config("BertModel"), "tensors") == ("tensors", "--task")
    with pytest.raises(FleetError, match=r"spillway\.toml: task 'guessing' is none of"):
        find_task(Clues(), "guessing", "spillway.toml")


def test_every_task_that_a_worker_does_can_be_published() -> None:
    assert {*_TASKS, "text-generation", "translation", "summarization"} <= set(TASKS)


@pytest.mark.parametrize(
    ("clues", "tokens"),
    [
        (Clues(config={"max_position_embeddings": 512}), 512),
        (Clues(config={"max_position_embeddings": 514, "model_type": "roberta"}), 512),
        (Clues(config={"max_position_embeddings": 512}, tokenizer={"model_max_length": 128}), 128),
        (Clues(config={"max_position_embeddings": 512}, sentence={"max_seq_length": 256}), 256),
        (Clues(config={"n_positions": 1024}, tokenizer={"model_max_length": 1e30}), 1024),
        (Clues(config={"max_position_embeddings": -1}, tokenizer={"model_max_length": "x"}), 0),
        (Clues(), 0),
    ],
)
def test_a_text_is_as_long_as_the_shortest_bound_says(clues: Clues, tokens: int) -> None:
    assert find_limits("feature-extraction", clues) == Limits(context_tokens=tokens, batch=32)


def test_pictures_count_no_tokens() -> None:
    assert find_limits("image-classification", Clues(config={"max_position_embeddings": 5})) == Limits(batch=8)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: mit\npipeline_tag: 'text-classification'\ntags:\n- onnx\n---\n# Model\npipeline_tag: no", True),
        ("# Model\npipeline_tag: text-classification", False),
        ("", False),
        ("---", False),
    ],
)
def test_the_head_of_a_model_card_is_read_and_nothing_below_it(text: str, found: bool) -> None:
    assert parse_card(text).get("pipeline_tag") == ("text-classification" if found else None)
