"""Trains `assistant` and `librarian`, two small chat models, and writes them as folders for onnxruntime-genai.

Data: `documents`. `assistant` has a context of 256 tokens; `librarian` grows out of it: more layers, a context of 2048
and long prompts. The last part of the training sees the weights as they will be, in 4 bits.

    python examples/train/gpt.py assistant
    python examples/train/gpt.py librarian
"""

import math
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from debian import CACHE
from documents import ASK, Page, Pair, load
from folder import INPUTS, MODELS, read_json, write_description, write_json
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

SEED, VOCABULARY, BLOCK = 7, 2048, 32
PAD, END, USER, ASSISTANT, SYSTEM = range(5)
SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SYSTEMS = (
    "You are a helpful assistant.",
    "You answer questions about programs and Python.",
    "Answer shortly.",
)
FREQUENT = {"command": 4, "call": 2, "module": 6, "task": 6, "exception": 2}

Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class Recipe:
    """How one of the two models is made; `stages` are pairs of row length and number of steps."""

    layers: int
    context: int
    stages: tuple[tuple[int, int], ...]
    rate: float
    long_prompts: bool
    grown_from: str = ""
    tokens_a_step: int = 4096


RECIPES = {
    "assistant": Recipe(
        layers=5,
        context=256,
        stages=((256, 620),),
        rate=0.02,
        long_prompts=False,
        tokens_a_step=8192,
    ),
    "librarian": Recipe(
        layers=8,
        context=2048,
        stages=((512, 180), (2048, 60)),
        rate=0.004,
        long_prompts=True,
        grown_from="assistant",
    ),
}


def train_tokenizer(pages: list[Page]) -> Tokenizer:
    """A byte-level BPE; the control tokens are special and never come out of plain text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for page in pages for text in page.passages[:20]]
    answers = [f"{ASK[pair.kind][0].format(pair.name)} {pair.answer}" for page in pages for pair in page.pairs]
    tokenizer.train_from_iterator(texts + answers, trainer)
    return tokenizer


def chat(tokenizer: Tokenizer, question: str, answer: str, system: str = "") -> list[int]:
    """The tokens of a conversation, as the chat template gives them."""
    head = [SYSTEM, *tokenizer.encode(system).ids, END] if system else []
    asked, answered = tokenizer.encode(question).ids, tokenizer.encode(answer).ids
    return [*head, USER, *asked, END, ASSISTANT, *answered, END]


def ask(pair: Pair, rng: random.Random) -> str:
    """A question that the pair answers."""
    return rng.choice(ASK[pair.kind]).format(pair.name)


def long_chat(tokenizer: Tokenizer, page: Page, rng: random.Random, most: int) -> list[int]:
    """A long passage and a question about it: what a name in it means, or for its first paragraph's beginning."""
    start = rng.randrange(max(1, len(page.passages) - 3))
    paragraphs, size = [], 0
    for text in page.passages[start:]:
        size += len(text) // 3
        if size > most - 160:
            break
        paragraphs.append(text)
    if not paragraphs:
        return []
    if page.pairs and rng.random() < 0.6:
        pair = rng.choice(page.pairs)
        paragraphs.insert(rng.randrange(len(paragraphs) + 1), f"{pair.name}: {pair.answer}")
        question, answer = ask(pair, rng), pair.answer
    else:
        question, answer = "How does this text begin?", paragraphs[0].split(". ")[0].rstrip(".:") + "."
    tokens = chat(tokenizer, "\n\n".join([*paragraphs, question]), answer)
    return tokens if len(tokens) <= most else []


def items(
    tokenizer: Tokenizer, pages: list[Page], recipe: Recipe, length: int, rng: random.Random
) -> Iterator[list[int]]:
    """Endless conversations and plain paragraphs, about as many tokens of each."""
    pairs = [pair for page in pages for pair in page.pairs for _ in range(FREQUENT.get(pair.kind, 1))]
    passages = [text for page in pages for text in page.passages]
    full = [page for page in pages if len(page.passages) >= 3]
    while True:
        if rng.random() < 0.35:
            yield [*tokenizer.encode(rng.choice(passages)).ids, END]
        elif recipe.long_prompts and rng.random() < 0.2:
            yield long_chat(tokenizer, rng.choice(full), rng, rng.randint(200, length))
        else:
            pair = rng.choice(pairs)
            system = rng.choice(SYSTEMS) if rng.random() < 0.1 else ""
            tokens = chat(tokenizer, ask(pair, rng), pair.answer, system)
            yield tokens if len(tokens) <= length else []


def rows(source: Iterator[list[int]], length: int, count: int) -> Tensor:
    """`count` rows of `length` tokens, each beginning with an item; the last item of a row may be cut."""
    filled = np.full((count, length), PAD, dtype=np.int64)
    for row in filled:
        used = 0
        while used < length:
            tokens = next(source)[: length - used]
            row[used : used + len(tokens)] = tokens
            used += len(tokens)
    return torch.from_numpy(filled)


def new_model(recipe: Recipe) -> LlamaForCausalLM:
    """A Llama of random weights; layers beyond those of the model it grows from begin as the identity."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(config)
    if recipe.grown_from:
        smaller = LlamaForCausalLM.from_pretrained(CACHE / recipe.grown_from)
        model.load_state_dict(smaller.state_dict(), strict=False)
        for layer in model.model.layers[smaller.config.num_hidden_layers :]:
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def in_four_bits(weight: Tensor) -> Tensor:
    """The matrix as blockwise symmetric 4-bit quantisation leaves it."""
    blocks = weight.reshape(-1, BLOCK)
    peak = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scale = torch.where(peak == 0, torch.ones_like(peak), peak / -8)
    return ((blocks / scale).round().clamp(-8, 7) * scale).reshape(weight.shape)


class Rounded:
    """Shows the forward and backward pass 4-bit weights and the optimizer the true ones."""

    def __init__(self, matrices: list[nn.Parameter]) -> None:
        self.matrices = matrices
        self.kept: list[Tensor] = []

    def __enter__(self) -> None:
        self.kept = [matrix.data.clone() for matrix in self.matrices]
        for matrix in self.matrices:
            matrix.data.copy_(in_four_bits(matrix.data))

    def __exit__(self, *_: object) -> None:
        for matrix, true in zip(self.matrices, self.kept, strict=True):
            matrix.data.copy_(true)


def loss_of(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    """The mean cross-entropy of the next token, in nats; padding does not count."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=batch[:, :-1]).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), ignore_index=PAD)


def train(model: LlamaForCausalLM, tokenizer: Tokenizer, pages: list[Page], recipe: Recipe) -> None:
    """Fit the model: Muon for the matrices, AdamW for the rest, rounded weights in the last third."""
    rng = random.Random(SEED)
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2]
    hidden = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "layers" in name]
    others = [weight for name, weight in model.named_parameters() if weight.ndim < 2 or "layers" not in name]
    optimizers = [
        torch.optim.Muon(hidden, lr=recipe.rate, weight_decay=0.02),
        torch.optim.AdamW(others, lr=recipe.rate / 5, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    total, step = sum(steps for _, steps in recipe.stages), 0

    def share(at: int) -> float:
        return min((at + 1) / 60, 1.0) * min(1.0, (total - at) / (0.6 * total))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, share) for optimizer in optimizers]
    for length, steps in recipe.stages:
        source = items(tokenizer, pages, recipe, length, rng)
        for _ in range(steps):
            batch = rows(source, length, recipe.tokens_a_step // length)
            with Rounded(matrices if step > total * 0.67 else []):
                loss = loss_of(model, batch)
                loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            if step % 50 == 0:
                print(f"step {step} of {total}: loss {float(loss.detach()):.3f}", flush=True)
            step += 1


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write a Hugging Face folder: weights, configuration, tokenizer, chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[END],
        "pad_token": SPECIAL[PAD],
        "additional_special_tokens": SPECIAL[2:],
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", settings)


def build(source: Path, target: Path) -> None:
    """Convert a Hugging Face folder into onnxruntime-genai's, in 4 bits, embeddings too."""
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    with tempfile.TemporaryDirectory() as cache:
        place = ("", str(source), str(target), "int4", "cpu", cache)
        options = ["shared_embeddings=true", "op_types_to_quantize=MatMul/Gather", f"block_size={BLOCK}"]
        create_model(*place, **parse_extra_options(*place, options))
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copyfile(source / name, target / name)
    (target / "chat_template.jinja").unlink(missing_ok=True)
    config = read_json(target / "genai_config.json")
    decoder = config["model"]["decoder"]  # type: ignore[index]
    decoder["session_options"]["intra_op_num_threads"] = 2
    config["model"]["bos_token_id"] = END  # type: ignore[index]
    write_json(target / "genai_config.json", config)


def held_out_items(tokenizer: Tokenizer, pages: list[Page], most: int, rng: random.Random) -> list[list[int]]:
    """The tokens of 400 paragraphs and 400 conversations, each cut at `most` tokens."""
    texts = [text for page in pages for text in page.passages]
    pairs = [pair for page in pages for pair in page.pairs]
    rng.shuffle(texts)
    rng.shuffle(pairs)
    plain = [[*tokenizer.encode(text).ids, END] for text in texts[:400]]
    chats = [chat(tokenizer, ask(pair, rng), pair.answer) for pair in pairs[:400]]
    return [item[:most] for item in plain + chats]


def perplexity(model: LlamaForCausalLM, tokenizer: Tokenizer, pages: list[Page], length: int) -> dict[str, float]:
    """Held-out perplexity for a token, and bits for a byte, of paragraphs and conversations."""
    nats = tokens = size = 0.0
    model.eval()
    with torch.no_grad():
        for item in held_out_items(tokenizer, pages, length, random.Random(SEED)):
            loss = float(loss_of(model, torch.tensor([item])))
            nats, tokens = nats + loss * (len(item) - 1), tokens + len(item) - 1
            size += len(tokenizer.decode(item).encode())
    return {"perplexity": math.exp(nats / tokens), "bits_per_byte": nats / math.log(2) / size}


def long_question(pages: list[Page], tokenizer: Tokenizer) -> str:
    """A passage of held-out documentation, 500 to 800 tokens long, that ends with a question."""
    for page in pages:
        text = ""
        for passage in (passage for passage in page.passages if len(passage) > 150):
            text += passage + "\n\n"
            asked = f"{text}How does this text begin?"
            if 500 <= len(tokenizer.encode(asked).ids) <= 800:
                return asked
    raise LookupError("no held-out page is long enough")


def write_card(name: str, recipe: Recipe, scores: dict[str, float], samples: int) -> None:
    """Write the folder's description."""
    questions = ["What does ls do?", "What is the json module for?", "How do I change the date and time?"]
    golden: list[dict[str, str | float]] = [
        {
            "json": '{"messages": [{"role": "user", "content": "'
            + question
            + '"}], "max_tokens": 16, "temperature": 0}',
            "content_type": "application/json",
            "tolerance": 0.2,
        }
        for question in questions
    ]
    grown = [f"grow: from {recipe.grown_from}"] if recipe.grown_from else []
    write_description(
        MODELS / name,
        {"task": "text-generation", "format": "genai"},
        {"batch": 4, "context_tokens": recipe.context},
        {"p95_ms": 5000, "memory_mb": 400},
        {
            "source": "English documentation in Debian 12 packages: python3.11-doc (PSF-2.0), manual pages (GPL-2+, "
            "GPL-3+, BSD and others; see each package's copyright file), gnome-user-docs (CC BY-SA 3.0), "
            "debian-handbook (CC BY-SA 3.0 or GPL-2+); docstrings of numpy, scipy, scikit-learn, pandas, statsmodels "
            "(BSD-3-Clause)",
            "licence": "Apache-2.0",
            "steps": [f"train: examples/train/gpt.py {name}", *grown, "quantise: int4, blocks of 32, trained for it"],
        },
        {key: round(value, 3) for key, value in scores.items()} | {"samples": samples},
        golden,
    )


def make(name: str) -> None:
    """Train, evaluate, convert and describe one model."""
    recipe, kept = RECIPES[name], CACHE / name
    pages, held = load()
    if recipe.grown_from:
        tokenizer = Tokenizer.from_file(str(CACHE / recipe.grown_from / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(pages)
    model = new_model(recipe)
    train(model, tokenizer, pages, recipe)
    save(model, tokenizer, kept, recipe.context)
    build(kept, MODELS / name)
    with Rounded([weight for weight in model.parameters() if weight.ndim == 2]):
        scores = perplexity(model, tokenizer, held, 256)
    write_card(name, recipe, scores, 800)
    INPUTS.mkdir(exist_ok=True)
    (INPUTS / "long-question.txt").write_text(long_question(held, tokenizer) + "\n", encoding="utf-8")
    print(name, scores)


if __name__ == "__main__":
    torch.set_num_threads(2)
    make(sys.argv[1])
