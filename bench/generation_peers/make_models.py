"""Writes one decoder of random weights in every form that bench/generation.py measures: `make_models.py FOLDER`.

A Llama of 82 M parameters: `float32` and `int4` for onnxruntime-genai, `float32.gguf` and `int4.gguf` (Q4_0) of the
same weights for llama.cpp. Its tokenizer has a token for each byte, so that ASCII has as many tokens as letters.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from onnxruntime_genai.models.builder import create_model, parse_extra_options
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 1024
VOCABULARY = 8192
LAYERS, WIDTH, INNER, HEADS, CACHE_HEADS = 12, 768, 2048, 12, 4
FORMS = {"float32": ("fp32", GGMLQuantizationType.F32), "int4": ("int4", GGMLQuantizationType.Q4_0)}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def save_tokenizer(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = {letter: at for at, letter in enumerate(alphabet)}
    rest = {f"filler{at}": at for at in range(len(letters), VOCABULARY)}
    tokenizer = Tokenizer(models.BPE(vocab=letters | rest, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=CONTEXT).save_pretrained(folder)


def save_model(folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=CACHE_HEADS,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=VOCABULARY - 1,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    weights: dict[str, Any] = model.state_dict()
    return weights


def paired(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Put the halves that rotate together side by side, as llama.cpp has them."""
    shape = (heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return weight.reshape(shape).swapaxes(1, 2).reshape(weight.shape)


def gguf_tensors(weights: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    tensors = {"token_embd.weight": weights["model.embed_tokens.weight"].numpy()}
    tensors["output_norm.weight"] = weights["model.norm.weight"].numpy()
    for layer in range(LAYERS):
        for name, known in NAMES.items():
            weight = weights[f"model.layers.{layer}.{name}.weight"].numpy()
            heads = {"attn_q": HEADS, "attn_k": CACHE_HEADS}.get(known)
            tensors[f"blk.{layer}.{known}.weight"] = paired(weight, heads) if heads else weight
    return tensors


def save_gguf(path: Path, weights: dict[str, Any], kind: GGMLQuantizationType) -> None:
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(CACHE_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"t{at}" for at in range(VOCABULARY)])
    writer.add_token_merges(["t 0"])  # llama.cpp wants one
    writer.add_eos_token_id(VOCABULARY - 1)
    for name, weight in gguf_tensors(weights).items():
        raw = kind if weight.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(name, quants.quantize(np.ascontiguousarray(weight), raw), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    folder = Path(sys.argv[1])
    source = folder / "source"
    source.mkdir(parents=True, exist_ok=True)
    weights = save_model(source)
    for form, (precision, kind) in FORMS.items():
        given = ("", str(source), str(folder / form), precision, "cpu", str(folder / "cache"))
        create_model(*given, **parse_extra_options(*given, []))
        save_gguf(folder / f"{form}.gguf", weights, kind)
    (folder / "made.json").write_text(json.dumps({"context": CONTEXT, "vocabulary": VOCABULARY}), encoding="utf-8")


if __name__ == "__main__":
    main()
