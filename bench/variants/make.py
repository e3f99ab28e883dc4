"""Writes models of well-known shapes with random weights, as Optimum exports them.

    python bench/variants/make.py FOLDER

Needs the reference's environment (`make bench-variants` makes it). Speed, size and memory depend on the shape alone.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from optimum.exporters.onnx import main_export
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

WORDS = 30_522
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TINY: dict[str, Any] = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
MINILM: dict[str, Any] = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}


def shapes() -> dict[str, tuple[str, Any]]:
    """Return (task, model) by name; transformers' own defaults are the published base sizes."""
    resnet18 = hf.ResNetConfig(
        depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], layer_type="basic", num_labels=1000
    )
    return {
        "minilm-l6": ("text-classification", hf.BertForSequenceClassification(hf.BertConfig(**MINILM))),
        "distilbert-base": (
            "text-classification",
            hf.DistilBertForSequenceClassification(hf.DistilBertConfig()),
        ),
        "bert-base": ("text-classification", hf.BertForSequenceClassification(hf.BertConfig())),
        "mobilenet-v2": ("image-classification", hf.MobileNetV2ForImageClassification(hf.MobileNetV2Config())),
        "resnet-18": ("image-classification", hf.ResNetForImageClassification(resnet18)),
        "resnet-50": ("image-classification", hf.ResNetForImageClassification(hf.ResNetConfig(num_labels=1000))),
        "vit-tiny": ("image-classification", hf.ViTForImageClassification(hf.ViTConfig(**TINY))),
        "wav2vec2-base": ("audio-classification", hf.Wav2Vec2ForSequenceClassification(hf.Wav2Vec2Config())),
    }


def processor_of(task: str) -> Any:
    """Return what prepares inputs of a task, at the usual sizes."""
    if task == "image-classification":
        return hf.ViTImageProcessor(size={"height": 224, "width": 224})
    if task == "audio-classification":
        return hf.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=False)
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(),
        model_max_length=512,
        **dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True)),
    )


def tokenizer() -> Tokenizer:
    """Return a WordPiece tokenizer of BERT's size whose words are numbers."""
    words = {word: at for at, word in enumerate((*SPECIAL, *(f"w{at}" for at in range(WORDS - len(SPECIAL)))))}
    made = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return made


def main() -> None:
    """Export every shape that is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.manual_seed(1)
    for name, (task, model) in shapes().items():
        if (folder / name).exists():
            continue
        with tempfile.TemporaryDirectory() as work:
            model.eval().save_pretrained(work)
            processor_of(task).save_pretrained(work)
            main_export(work, folder / name, task=task, library_name="transformers", do_validation=False)
        print(name, f"{sum(weights.numel() for weights in model.parameters()) / 1e6:.1f} million weights", flush=True)


if __name__ == "__main__":
    main()
