"""Small models with random weights, exported as Optimum and as transformers.js lay a folder out."""

from __future__ import annotations

import contextlib
import io
import logging
import random
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from optimum.exporters.onnx import main_export

from tests.reference.slim import slim

LEFT_OUT = ("vocab.txt", "vocab.json", "merges.txt", "added_tokens.json", "spiece.model", "special_tokens_map.json")
"""What `tokenizer.json` and `tokenizer_config.json` say too."""

transformers.utils.logging.set_verbosity_error()
logging.disable(logging.WARNING)


def small(chance: random.Random, kind: Any, config: Any, spread: float = 0.35) -> Any:
    """Return a model of a class with random weights that are far enough apart for its answers to differ."""
    torch.manual_seed(chance.randrange(1 << 31))
    model = kind(config).eval()
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if not weights.requires_grad:
                continue  # computed, not learned: a saved model has its own again
            if weights.ndim > 1:
                weights.normal_(0, 1 if "embed" in name else spread)
            elif name.endswith("bias"):
                weights.normal_(0, 0.1)
    return model


def export(model: Any, processors: list[Any], folder: Path, task: str, *, js: bool = False, **options: Any) -> None:
    """Export into the folder; `js` puts the graphs into `onnx/`, as transformers.js has them."""
    with tempfile.TemporaryDirectory() as work, _quiet():
        model.save_pretrained(work)
        for processor in processors:
            processor.save_pretrained(work)
        main_export(work, folder, task=task, do_validation=False, **options)
    for name in LEFT_OUT if (folder / "tokenizer.json").exists() else ():
        (folder / name).unlink(missing_ok=True)
    for graph in folder.glob("*.onnx"):
        slim(graph)
    if js:
        (folder / "onnx").mkdir()
        for graph in folder.glob("*.onnx*"):
            shutil.move(graph, folder / "onnx" / graph.name)


@contextlib.contextmanager
def _quiet() -> Any:
    """Swallow what exporters tell people who look on."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield
