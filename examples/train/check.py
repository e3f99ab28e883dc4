"""Loads every example model from its files and evaluates it; prints the table of `examples/models/README.md`."""

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

import digits
import documents
import gpt
import language
import language_corpus
import numpy as np
import onnxruntime as ort
import onnxruntime_genai as og
import sensors
from digits_tflite import int8_accuracy
from folder import MODELS
from numpy.typing import NDArray
from tokenizers import Tokenizer

QUESTIONS = (
    "What does ls do?",
    "What is the json module for?",
    "What does grep do?",
    "What does os.path.join() do?",
    "How do I change the date and time?",
    "When is KeyError raised?",
)


def size_of(folder: Path) -> str:
    """The size of all files of a folder, in kB."""
    return f"{sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()) / 1000:.0f} kB"


def session(name: str) -> ort.InferenceSession:
    """The folder's ONNX model, opened."""
    return ort.InferenceSession(MODELS / name / "model.onnx", providers=["CPUExecutionProvider"])


def check_digits() -> Iterator[tuple[str, str]]:
    """The three digits folders."""
    _, test, _, labels = digits.load()
    images = digits.views(test)[0]
    for name in ("digits", "digits-small"):
        logits = session(name).run(["logits"], {"pixel_values": images})[0]
        right = float((np.asarray(logits).argmax(1) == labels).mean())
        yield name, f"accuracy {right:.4f} on {len(labels)} images"
    right = int8_accuracy(MODELS / "digits-int8" / "model.tflite", images, labels.astype(np.int64))
    yield "digits-int8", f"accuracy {right:.4f} on {len(labels)} images"


def check_language() -> Iterator[tuple[str, str]]:
    """The language folder."""
    test = language.held_out_sentences(language_corpus.load(language.SEED, most=20_000)[1])
    scores = language.evaluate(MODELS / "language", test)
    everyday = f"{scores['everyday']:.3f} on {len(language.EVERYDAY)} everyday sentences"
    yield "language", f"accuracy {scores['accuracy']:.4f} on {len(test)} sentences of 22 languages; {everyday}"


def check_sensors() -> Iterator[tuple[str, str]]:
    """The two sensor folders."""
    past, truth = sensors.windows(
        sensors.split(sensors.co2_series(), sensors.CONTEXT)[1], sensors.CONTEXT, sensors.HORIZON
    )
    forecast = np.asarray(session("co2-forecast").run(["forecast"], {"past_values": past})[0])
    others = ", ".join(f"{name} {value:.3f}" for name, value in sensors.co2_baselines(past, truth).items())
    yield "co2-forecast", f"mean absolute error {sensors.error(forecast, truth):.3f} ppm ({others})"
    past, truth = sensors.windows(sensors.split(sensors.sea_series(), sensors.LAGS)[1], sensors.LAGS, 1)
    told = np.asarray(session("sea-temperature").run(["prediction"], {"features": past})[0])
    last, year = sensors.error(past[:, -1:], truth), sensors.error(past[:, :1], truth)
    others = f"persistence {last:.3f}, same month last year {year:.3f}"
    yield "sea-temperature", f"mean absolute error {sensors.error(told, truth):.3f} °C ({others})"


def logits_of(model: ort.InferenceSession, heads: int, head_size: int, tokens: list[int]) -> NDArray[np.float32]:
    """The next-token logits [len(tokens), vocabulary] from an empty cache."""
    feed: dict[str, NDArray[np.generic]] = {
        "input_ids": np.array([tokens], dtype=np.int64),
        "attention_mask": np.ones((1, len(tokens)), dtype=np.int64),
    }
    for entry in model.get_inputs():
        if entry.name.startswith("past_key_values"):
            feed[entry.name] = np.zeros((1, heads, 0, head_size), dtype=np.float32)
    return np.asarray(model.run(["logits"], feed)[0])[0]


def held_out_loss(name: str, pages: list[documents.Page]) -> str:
    """Perplexity for a token, and bits for a byte, of the folder's ONNX model on held-out pages."""
    tokenizer, model = Tokenizer.from_file(str(MODELS / name / "tokenizer.json")), session(name)
    decoder = json.loads((MODELS / name / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
    nats = tokens = size = 0.0
    for item in gpt.held_out_items(tokenizer, pages, 256, random.Random(gpt.SEED)):
        logits = logits_of(model, decoder["num_key_value_heads"], decoder["head_size"], item)[:-1].astype(np.float64)
        logits -= logits.max(1, keepdims=True)
        chosen = logits[np.arange(len(item) - 1), item[1:]] - np.log(np.exp(logits).sum(1))
        nats, tokens = nats - chosen.sum(), tokens + len(item) - 1
        size += len(tokenizer.decode(item).encode())
    return f"perplexity {math.exp(nats / tokens):.1f} a token, {nats / math.log(2) / size:.3f} bits a byte"


def answer(model: og.Model, tokenizer: og.Tokenizer, question: str, most: int = 48) -> str:
    """A greedy answer from onnxruntime-genai."""
    ids = tokenizer.encode(f"<|user|>{question}<|end|><|assistant|>")
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + most, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    return str(tokenizer.decode(generator.get_sequence(0)[len(ids) :]))


def check_gpts() -> Iterator[tuple[str, str]]:
    """The two chat models."""
    held = documents.load()[1]
    for name in ("assistant", "librarian"):
        if (MODELS / name / "genai_config.json").exists():
            model = og.Model(str(MODELS / name))
            tokenizer = og.Tokenizer(model)
            for question in QUESTIONS:
                print(f"{name}: {question} {answer(model, tokenizer, question)}")
            yield name, held_out_loss(name, held)


def main() -> None:
    """Print one line of the table for each folder."""
    lines = [
        f"| `{name}` | {size_of(MODELS / name)} | {score} |"
        for part in (check_digits, check_language, check_sensors, check_gpts)
        for name, score in part()
    ]
    print("\n".join(["| model | size | held-out |", "|---|---|---|", *lines]))


if __name__ == "__main__":
    main()
