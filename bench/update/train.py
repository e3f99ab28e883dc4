"""Train a small language model and tune it further, so that `bench/update.py` has pairs of versions that are real.

Runs in the environment of the reference tests (`make bench-update`). The text is what every machine has: Python's
standard library to begin with, numpy's sources to tune on. Writes one `NAME.safetensors` of float32 for each version
and the `tokenizer.json` that they share. Seeded; about half an hour on two cores.
"""

from __future__ import annotations

import argparse
import copy
import sysconfig
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

VOCABULARY = 4096
WIDTH = 192
LAYERS = 4
HEADS = 6
CONTEXT = 128
BATCH = 16
FIRST_STEPS = 500
TUNING_STEPS = 600
TUNING_RATES = {"full-1e-4": 1e-4, "full-1e-5": 1e-5}
MAX_TEXT = 6 << 20


class Block(nn.Module):
    """One layer of a transformer that looks back only."""

    def __init__(self) -> None:
        super().__init__()
        self.first_norm, self.second_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention_in, self.attention_out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the hidden states [batch, tokens, WIDTH] after this layer."""
        rows, tokens, _ = hidden.shape
        parts = self.attention_in(self.first_norm(hidden)).view(rows, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        hidden = hidden + self.attention_out(seen.transpose(1, 2).reshape(rows, tokens, WIDTH))
        return hidden + self.down(nn.functional.gelu(self.up(self.second_norm(hidden))))


class Model(nn.Module):
    """A small GPT."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits [batch, tokens, VOCABULARY]."""
        hidden = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


def read_text(folder: Path) -> str:
    """Return the Python sources under a folder, in a fixed order, up to MAX_TEXT characters."""
    text = ""
    for path in sorted(folder.rglob("*.py")):
        if "site-packages" in path.relative_to(folder).parts:
            continue
        text += path.read_text(encoding="utf-8", errors="replace")
        if len(text) > MAX_TEXT:
            break
    return text[:MAX_TEXT]


def train(
    model: Model, ids: Tensor, steps: int, rate: float, *, decay: bool, parts: list[Tensor] | None = None
) -> float:
    """Train in place and return the mean loss of the last steps."""
    optimiser = torch.optim.AdamW(parts or model.parameters(), lr=rate)
    losses = []
    for step in range(steps):
        if decay:
            for group in optimiser.param_groups:
                group["lr"] = rate * min(1, step / 50) * (1 - 0.9 * step / steps)
        at = torch.randint(len(ids) - CONTEXT - 1, (BATCH,))
        rows = torch.stack([ids[start : start + CONTEXT + 1] for start in at.tolist()])
        loss = nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return float(np.mean(losses[-20:]))


def save(model: Model, path: Path) -> None:
    """Write the weights as float32."""
    save_file({name: value.detach().clone() for name, value in model.state_dict().items()}, path)


def main() -> None:
    """Write every version into a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1)
    first_text = read_text(Path(sysconfig.get_path("stdlib")))
    tuning_text = read_text(Path(np.__file__).parent)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([first_text], trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet))
    tokenizer.save(str(out / "tokenizer.json"))
    first_ids, tuning_ids = (torch.tensor(tokenizer.encode(text).ids) for text in (first_text, tuning_text))
    model = Model()
    print("base", train(model, first_ids, FIRST_STEPS, 2e-3, decay=True), flush=True)
    save(model, out / "base.safetensors")
    for name, rate in TUNING_RATES.items():
        tuned = copy.deepcopy(model)
        print(name, train(tuned, tuning_ids, TUNING_STEPS, rate, decay=False), flush=True)
        save(tuned, out / f"{name}.safetensors")
    tuned = copy.deepcopy(model)
    print("head", train(tuned, tuning_ids, TUNING_STEPS, 1e-4, decay=False, parts=[tuned.head.weight]), flush=True)
    save(tuned, out / "head.safetensors")


if __name__ == "__main__":
    main()
