"""Trains `language`, a small transformer that tells the language of a sentence, with its own tokenizer.

Data: `language_corpus`. The tokenizer is a byte-level BPE, so that no character is unknown; the net pools by the mean
over the mask. The ONNX file is quantised dynamically to int8.
"""

# ruff: noqa: RUF001 - the sentences are in many alphabets

import random
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from folder import MODELS, write_description, write_json
from language_corpus import DENSE, LANGUAGES, Sentence, load
from onnxruntime.quantization import QuantType, quantize_dynamic
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional

SEED, LENGTH, VOCABULARY, WIDTH, HEADS, LAYERS = 7, 128, 4096, 96, 4, 2
STEPS, BATCH = 4000, 128
FOLDER = MODELS / "language"
CODES = sorted(LANGUAGES)
EVERYDAY = [
    ("en", "The weather is nice today"), ("zh", "今天天气很好"), ("de", "Das Wetter ist heute schön"),
    ("fr", "Il fait beau aujourd'hui"), ("es", "Hoy hace buen tiempo"), ("it", "Oggi il tempo è bello"),
    ("pt", "Hoje o tempo está bom"), ("nl", "Het is vandaag mooi weer"), ("sv", "Vädret är fint idag"),
    ("da", "Vejret er dejligt i dag"), ("fi", "Tänään on kaunis ilma"), ("pl", "Dzisiaj jest ładna pogoda"),
    ("cs", "Dnes je hezké počasí"), ("hu", "Ma szép idő van"), ("tr", "Bugün hava çok güzel"),
    ("ru", "Сегодня хорошая погода"), ("uk", "Сьогодні гарна погода"), ("el", "Ο καιρός είναι ωραίος σήμερα"),
    ("ar", "الطقس جميل اليوم"), ("he", "מזג האוויר יפה היום"), ("ja", "今日は天気がいいです"),
    ("ko", "오늘은 날씨가 좋아요"),
    ("en", "Where is the nearest train station?"), ("de", "Wo ist der nächste Bahnhof?"),
    ("fr", "Où est la gare la plus proche ?"), ("es", "¿Dónde está la estación de tren?"),
    ("it", "Dov'è la stazione più vicina?"), ("pt", "Onde fica a estação de trem?"), ("zh", "最近的火车站在哪里？"),
    ("ja", "一番近い駅はどこですか"), ("ru", "Где ближайший вокзал?"), ("nl", "Waar is het dichtstbijzijnde station?"),
    ("pl", "Gdzie jest najbliższy dworzec?"), ("ko", "가장 가까운 역이 어디예요?"),
    ("en", "I would like a cup of coffee, please"), ("de", "Ich hätte gern eine Tasse Kaffee"),
    ("fr", "Je voudrais un café, s'il vous plaît"), ("es", "Quisiera un café, por favor"),
]  # fmt: skip


def train_tokenizer(sentences: list[Sentence]) -> Tokenizer:
    """A byte-level BPE over lower-cased text, with the same share of every language."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["[PAD]", "[CLS]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_shares(sentences), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 1)])
    return tokenizer


def _shares(sentences: list[Sentence], most: int = 250_000) -> list[str]:
    """Text of every language, `most` characters each (half of it for languages that need no spaces)."""
    texts = []
    for code in CODES:
        rows = [sentence.text for sentence in sentences if sentence.language == code]
        budget, number = most // 2 if code in DENSE else most, 0
        while budget > 0 and number < 4 * len(rows):
            texts.append(rows[number % len(rows)])
            budget -= len(texts[-1])
            number += 1
    return texts


class Block(nn.Module):
    """A transformer layer that normalises first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query_key_value, self.mix = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.feed = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """[batch, seq, width] to the same; `bias` [batch, 1, 1, seq] is very negative where there is padding."""
        heads = [x.shape[0], x.shape[1], HEADS, WIDTH // HEADS]
        query, key, value = (
            part.reshape(heads).transpose(1, 2) for part in self.query_key_value(self.first(x)).chunk(3, -1)
        )
        scores = query @ key.transpose(2, 3) / (WIDTH // HEADS) ** 0.5 + bias
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(x.shape)
        x = x + self.dropout(self.mix(mixed))
        return x + self.dropout(self.feed(self.second(x)))


class Classifier(nn.Module):
    """Token ids and their mask to a logit for each language."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        nn.init.normal_(self.tokens.weight, std=0.05)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.blocks = nn.ModuleList([Block() for _ in range(LAYERS)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(CODES))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[batch, seq] and its mask, both int64, to logits [batch, languages]."""
        mask = attention_mask.to(torch.float32)
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.tokens(input_ids) + self.positions(places)[None]
        bias = ((mask - 1) * 1e4)[:, None, None, :]
        for block in self.blocks:
            x = block(x, bias)
        pooled = (self.norm(x) * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        logits: Tensor = self.head(pooled)
        return logits


def pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids padded to the longest row, and their mask."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


def shorten(text: str, language: str, rng: random.Random) -> str:
    """Half of the time a run of words (or characters) of the text, so that short texts are learned too."""
    if rng.random() < 0.5:
        return text
    if language in DENSE:
        length = rng.randint(4, 30)
        start = rng.randint(0, max(0, len(text) - length))
        return text[start : start + length]
    words, length = text.split(" "), rng.randint(3, 10)
    start = rng.randint(0, max(0, len(words) - length))
    return " ".join(words[start : start + length]).strip(" .,;:!?") or text


def train(model: Classifier, tokenizer: Tokenizer, sentences: list[Sentence]) -> None:
    """Fit the model, drawing every language as often; texts of like length share a batch."""
    rng = random.Random(SEED)
    rows = {code: [sentence.text for sentence in sentences if sentence.language == code] for code in CODES}
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS, pct_start=0.1)
    model.train()
    for start in range(0, STEPS, 8):
        codes = rng.choices(CODES, k=BATCH * 8)
        texts = [shorten(rng.choice(rows[code]), code, rng) for code in codes]
        ids = [encoding.ids[:LENGTH] for encoding in tokenizer.encode_batch(texts)]
        order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
        batches = [order[first : first + BATCH] for first in range(0, len(order), BATCH)]
        rng.shuffle(batches)
        for batch in batches:
            target = torch.tensor([CODES.index(codes[number]) for number in batch])
            logits = model(*pad([ids[number] for number in batch]))
            loss = functional.cross_entropy(logits, target, label_smoothing=0.02)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if start % 400 == 0 and batch is batches[0]:
                print(f"step {start}: loss {float(loss.detach()):.3f}", flush=True)
    model.eval()


def export(model: Classifier, path: Path) -> None:
    """Write the model as ONNX with int8 weights and embeddings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    axes = {0: "batch", 1: "seq"}
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "model.onnx"
        torch.onnx.export(
            model,
            (torch.ones(2, 9, dtype=torch.int64), torch.ones(2, 9, dtype=torch.int64)),
            str(whole),
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_axes={"input_ids": axes, "attention_mask": axes, "logits": {0: "batch"}},
            opset_version=17,
            dynamo=False,
        )
        operators = ["MatMul", "Gemm", "Gather"]
        quantize_dynamic(whole, path, weight_type=QuantType.QInt8, op_types_to_quantize=operators, per_channel=True)


def answers(session: ort.InferenceSession, tokenizer: Tokenizer, texts: list[str]) -> list[str]:
    """The language code that the model gives each text; texts of like length share a batch."""
    ids = [encoding.ids[:LENGTH] for encoding in tokenizer.encode_batch(texts)]
    order = sorted(range(len(ids)), key=lambda number: len(ids[number]))
    found = [""] * len(texts)
    for first in range(0, len(order), 32):
        part = order[first : first + 32]
        tokens, mask = pad([ids[number] for number in part])
        logits = session.run(["logits"], {"input_ids": tokens.numpy(), "attention_mask": mask.numpy()})[0]
        for number, row in zip(part, np.asarray(logits), strict=True):
            found[number] = CODES[int(row.argmax())]
    return found


def held_out_sentences(sentences: list[Sentence], each: int = 300) -> list[Sentence]:
    """The first `each` held-out sentences of every language."""
    return [s for code in CODES for s in [s for s in sentences if s.language == code][:each]]


def evaluate(folder: Path, sentences: list[Sentence]) -> dict[str, float]:
    """Accuracy of the folder's files on the sentences: overall, by language, and on everyday sentences."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    session = ort.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    found = answers(session, tokenizer, [sentence.text for sentence in sentences])
    right = [(s.language, s.language == code) for s, code in zip(sentences, found, strict=True)]
    scores = {"accuracy": float(np.mean([ok for _, ok in right]))}
    for code in CODES:
        scores[code] = float(np.mean([ok for language, ok in right if language == code]))
    told = answers(session, tokenizer, [text for _, text in EVERYDAY])
    scores["everyday"] = float(np.mean([code == wanted for code, (wanted, _) in zip(told, EVERYDAY, strict=True)]))
    for code, (wanted, text) in zip(told, EVERYDAY, strict=True):
        if code != wanted:
            print(f"taken for {code}: {wanted} {text}")
    return scores


def write_folder(tokenizer: Tokenizer) -> None:
    """Write the folder's tokenizer and configuration."""
    tokenizer.save(str(FOLDER / "tokenizer.json"), pretty=False)
    words = {"pad_token": "[PAD]", "cls_token": "[CLS]"}
    write_json(
        FOLDER / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": LENGTH, **words},
    )
    write_json(FOLDER / "special_tokens_map.json", words)
    config = {
        "architectures": ["LanguageClassifier"],
        "hidden_size": WIDTH,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": LENGTH,
        "pad_token_id": 0,
        "id2label": {str(number): code for number, code in enumerate(CODES)},
        "label2id": {code: number for number, code in enumerate(CODES)},
    }
    write_json(FOLDER / "config.json", config)


def write_card(scores: dict[str, float], samples: int) -> None:
    """Write the folder's description."""
    write_description(
        FOLDER,
        {"task": "text-classification", "format": "onnx"},
        {"batch": 32, "context_tokens": LENGTH},
        {"p95_ms": 200, "memory_mb": 300},
        {
            "source": "translations in Debian 12 packages: wesnoth-1.16-data and vlc-l10n (GPL-2+), gnome-user-docs "
            "(CC BY-SA 3.0), debian-handbook (CC BY-SA 3.0 or GPL-2+), installation-guide-amd64 (GPL-2+), fortunes-*",
            "licence": "Apache-2.0",
            "steps": ["train: examples/train/language.py", "quantise: dynamic int8, weights and embeddings"],
        },
        {
            "accuracy": round(scores["accuracy"], 4),
            "everyday_accuracy": round(scores["everyday"], 4),
            "samples": samples,
        },
        [
            {"text": text, "content_type": "text/plain", "tolerance": 0.05}
            for text in ("The weather is nice today", "今天天气很好", "Das Wetter ist heute schön")
        ],
    )


def main() -> None:
    """Collect, train, export, evaluate and describe."""
    torch.manual_seed(SEED)
    torch.set_num_threads(2)
    training, held = load(SEED, most=20_000)
    tokenizer = train_tokenizer(training)
    model = Classifier()
    train(model, tokenizer, training)
    export(model, FOLDER / "model.onnx")
    write_folder(tokenizer)
    test = held_out_sentences(held)
    scores = evaluate(FOLDER, test)
    write_card(scores, len(test))
    print({name: round(score, 3) for name, score in scores.items()})


if __name__ == "__main__":
    main()
