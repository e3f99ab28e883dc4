"""The work itself, without anything around it: the tokenizer and `session.run`, called directly."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from tokenizers import Tokenizer


class Bare:
    """A model in this process; `spinning` is ONNX Runtime's own default for idle threads."""

    def __init__(self, folder: Path, *, threads: int, spinning: bool = True) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        self._session = ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        tokenizer = folder / "tokenizer.json"
        self._tokenizer = Tokenizer.from_file(str(tokenizer)) if tokenizer.exists() else None
        if self._tokenizer is not None:
            self._tokenizer.enable_padding()

    def texts(self, texts: Sequence[str]) -> None:
        """Tokenise, pad and run one batch of texts."""
        assert self._tokenizer is not None
        encoded = self._tokenizer.encode_batch(list(texts))
        ids = np.array([one.ids for one in encoded])
        mask = np.array([one.attention_mask for one in encoded])
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        self._session.run(None, feeds)

    def rows(self, rows: NDArray[Any]) -> None:
        """Run one batch of rows of numbers."""
        self._session.run(None, {"x": rows})


def timed(what: Any, number: int) -> list[float]:
    """Return the seconds of each of `number` calls."""
    took = []
    for _ in range(number):
        started = time.perf_counter()
        what()
        took.append(time.perf_counter() - started)
    return took


def own_cpu_s() -> float:
    """Return the processor seconds of this process, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
