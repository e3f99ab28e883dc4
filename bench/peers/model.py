"""The encoder as every peer serves it: tokenizer, ONNX Runtime, two scores; in a peer's own environment."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

BATCH = 16
BATCH_WAIT_S = 0.002


class Model:
    """Answers batches of texts; BENCH_MODEL names the folder, BENCH_THREADS the runtime's threads."""

    def __init__(self) -> None:
        folder = Path(os.environ["BENCH_MODEL"])
        options = ort.SessionOptions()
        options.intra_op_num_threads = int(os.environ["BENCH_THREADS"])
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_padding()

    def answer(self, texts: list[str]) -> list[list[float]]:
        """Return each text's scores."""
        encoded = self._tokenizer.encode_batch(texts)
        ids = np.array([one.ids for one in encoded])
        mask = np.array([one.attention_mask for one in encoded])
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        logits = self._session.run(["logits"], feeds)[0]
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores: list[list[float]] = (powers / powers.sum(axis=1, keepdims=True)).tolist()
        return scores
