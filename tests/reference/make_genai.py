"""Makes `recorded/llama-genai`: a small Llama as onnxruntime-genai's builder writes it, and transformers' answers.

`python -m tests.reference.make_genai FOLDER`, in the environment of bench/generation.py: the builder wants a newer
transformers than Optimum does.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from onnxruntime_genai.models.builder import create_model, parse_extra_options
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.reference import words
from tests.reference.case import Case, Subject, write_cases

CONTEXT = 512
LONGEST = 40
END = "<|end|>"
LEFT_OUT = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def tokenizer_of() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each byte, and an end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, model_max_length=CONTEXT)


def model_of(tokenizer: PreTrainedTokenizerFast) -> Any:
    """Return a model of random weights that writes ASCII only, so that its text tells its tokens."""
    torch.manual_seed(5)
    end = tokenizer.eos_token_id
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=CONTEXT, tie_word_embeddings=False, bos_token_id=None,
            eos_token_id=end, pad_token_id=end,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.ndim > 1:
                weights.normal_(0, 1 if "embed" in name else 0.35)
        for token in range(len(tokenizer)):
            if token != end and not tokenizer.decode([token]).isprintable():
                model.lm_head.weight[token] = 0
            if not tokenizer.decode([token]).isascii():
                model.lm_head.weight[token] = 0
    return model


def cases_of(model: Any, tokenizer: PreTrainedTokenizerFast, chance: random.Random) -> list[Case]:
    """Ask for the likeliest tokens after texts of every length."""
    texts = [text for text in words.texts(chance, 6) if text.strip() and END not in text]
    texts += [words.sentence(chance, count) for count in (20, 40, 60)]
    cases = []
    for text in texts:
        length = chance.randint(1, LONGEST)
        prompt = tokenizer(text, return_tensors="pt")["input_ids"]
        body = {"inputs": text, "parameters": {"max_new_tokens": length, "do_sample": False}}
        if prompt.shape[1] + length > CONTEXT:
            cases.append(Case(body, error="too_large"))
            continue
        written = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=length)
        answer = tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True)
        cases.append(Case(body, {"generated_text": answer}))
    return cases


def main() -> None:
    """Write the folder anew."""
    folder = Path(sys.argv[1])
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer = tokenizer_of()
    model = model_of(tokenizer)
    with tempfile.TemporaryDirectory() as work:
        source = Path(work) / "source"
        model.save_pretrained(source)
        tokenizer.save_pretrained(source)
        given = ("", str(source), str(folder), "fp32", "cpu", str(Path(work) / "cache"))
        create_model(*given, **parse_extra_options(*given, []))
    for name in LEFT_OUT:
        (folder / name).unlink(missing_ok=True)
    subject = Subject(name=folder.name, task="text-generation", make=lambda *_: [], format="genai")
    write_cases(folder, subject, cases_of(model, tokenizer, random.Random(7)))


if __name__ == "__main__":
    main()
