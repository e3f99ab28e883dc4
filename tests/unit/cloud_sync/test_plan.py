"""What is published of a folder, told from its listing alone."""

from __future__ import annotations

import pytest

from cloud_sync.fleet.errors import FleetError
from cloud_sync.fleet.plan import Choice, Seen, choose, shared_files

SETTINGS = ("config.json", "tokenizer.json", "tokenizer_config.json")


def seen(*paths: str, **weights: list[str]) -> Seen:
    return Seen(
        dict.fromkeys((*SETTINGS, *paths), 100), {path.replace("__", "/"): names for path, names in weights.items()}
    )


def names(choice: Choice) -> list[str]:
    return [variant.name for variant in choice.variants]


def test_a_folder_for_transformers_js_gives_one_variant_of_each_precision_the_most_exact_first() -> None:
    kinds = ("", "_bnb4", "_fp16", "_int8", "_q4", "_q4f16", "_quantized", "_uint8")
    choice = choose(seen(*(f"onnx/model{kind}.onnx" for kind in kinds)), "text-classification")
    assert names(choice) == ["default", "quantized", "q4"]
    assert choice.variants[1].files == sorted([*SETTINGS, "onnx/model_quantized.onnx"])
    assert {path for path in choice.left_out if path.endswith(".onnx")} == {
        f"onnx/model{kind}.onnx" for kind in ("_bnb4", "_fp16", "_int8", "_q4f16", "_uint8")
    }


def test_variants_that_are_named_come_in_that_order_and_ask_for_what_they_need() -> None:
    listing = seen(
        "onnx/model.onnx", "onnx/model_fp16.onnx", "onnx/model_qint8_arm64.onnx", "onnx/model_quint8_avx2.onnx"
    )
    choice = choose(listing, "feature-extraction", ["fp16", "qint8_arm64", "quint8_avx2", "default"])
    assert names(choice) == ["fp16", "qint8_arm64", "quint8_avx2", "default"]
    assert [variant.requires.accelerator for variant in choice.variants] == ["cuda", "", "", ""]
    assert [variant.requires.architectures for variant in choice.variants] == [[], ["aarch64"], ["x86_64"], []]
    assert {variant.requires.backend for variant in choice.variants} == {"onnxruntime"}


def test_a_variant_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(FleetError, match="--variants int4: the folder has default, q4"):
        choose(seen("onnx/model.onnx", "onnx/model_q4.onnx"), "text-classification", ["int4"])


def test_weights_beside_a_graph_go_with_it_and_with_no_other() -> None:
    listing = seen(
        "onnx/model.onnx",
        "onnx/model.onnx_data",
        "onnx/model_q4.onnx",
        **{"onnx__model.onnx": ["onnx/model.onnx_data"]},
    )
    choice = choose(listing, "text-classification")
    assert "onnx/model.onnx_data" in choice.variants[0].files
    assert "onnx/model.onnx_data" not in choice.variants[1].files
    assert not choice.left_out


@pytest.mark.parametrize(
    ("decoders", "taken"),
    [
        (["decoder_model_merged"], ["decoder_model_merged"]),
        (["decoder_model_merged", "decoder_model", "decoder_with_past_model"], ["decoder_model_merged"]),
        (["decoder_model", "decoder_with_past_model"], ["decoder_model", "decoder_with_past_model"]),
        (["decoder_model"], ["decoder_model"]),
    ],
)
def test_an_encoder_takes_the_decoder_that_says_all(decoders: list[str], taken: list[str]) -> None:
    choice = choose(seen("encoder_model.onnx", *(f"{name}.onnx" for name in decoders)), "translation")
    graphs = [path for path in choice.variants[0].files if path.endswith(".onnx")]
    assert graphs == sorted([*(f"{name}.onnx" for name in taken), "encoder_model.onnx"])


def test_a_precision_that_lacks_its_decoder_is_no_variant() -> None:
    listing = seen("onnx/encoder_model.onnx", "onnx/decoder_model_merged.onnx", "onnx/encoder_model_q4.onnx")
    assert names(choose(listing, "translation")) == ["default"]
    with pytest.raises(FleetError, match="encoder"):
        choose(seen("encoder_model.onnx"), "translation")


def test_weights_of_other_frameworks_and_second_tokenizers_stay_behind_and_it_is_said_why() -> None:
    left = choose(
        seen(
            "model.onnx",
            "pytorch_model.bin",
            "model.safetensors",
            "flax_model.msgpack",
            "vocab.txt",
            "requirements.txt",
        ),
        "text-classification",
    ).left_out
    assert left == {
        "pytorch_model.bin": "weights of PyTorch",
        "model.safetensors": "weights of PyTorch",
        "flax_model.msgpack": "weights of Flax",
        "vocab.txt": "tokenizer.json says the same",
        "requirements.txt": "nothing on a box reads it",
    }


def test_speech_keeps_its_letters_and_sentence_models_their_pooling() -> None:
    shared, _ = shared_files(seen("vocab.json"), "automatic-speech-recognition")
    assert "vocab.json" in shared
    shared, _ = shared_files(
        seen("modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"), "feature-extraction"
    )
    assert {"modules.json", "1_Pooling/config.json"} <= set(shared)
    assert "2_Dense/model.safetensors" not in shared


def test_the_graphs_under_onnx_are_those_of_a_folder_that_has_both() -> None:
    choice = choose(seen("model.onnx", "onnx/model.onnx"), "text-classification")
    assert "onnx/model.onnx" in choice.variants[0].files
    assert "model.onnx" in choice.left_out


def test_a_folder_of_genai_is_taken_whole_but_for_foreign_weights() -> None:
    choice = choose(seen("genai_config.json", "model.onnx", "model.onnx.data", "model.safetensors"), "text-generation")
    assert choice.format == "genai"
    assert choice.variants[0].files == sorted([*SETTINGS, "genai_config.json", "model.onnx", "model.onnx.data"])
    assert list(choice.left_out) == ["model.safetensors"]


def test_a_lone_graph_of_any_name_is_a_model() -> None:
    assert choose(Seen({"Weather 7.tflite": 5}), "tensors").variants[0].files == ["Weather 7.tflite"]
    assert choose(Seen({"net.onnx": 5}), "tensors").format == "onnx"


@pytest.mark.parametrize(
    ("paths", "says"),
    [
        (["a.onnx", "b.onnx"], "a.onnx, b.onnx"),
        (["a.onnx", "b.tflite"], "both a.onnx and b.tflite"),
        (["model.safetensors"], "optimum-cli export onnx"),
        ([], "no .onnx, .tflite or genai_config.json"),
    ],
)
def test_what_cannot_be_told_is_an_error_that_says_what_to_do(paths: list[str], says: str) -> None:
    with pytest.raises(FleetError, match=says):
        choose(seen(*paths), "text-classification")
