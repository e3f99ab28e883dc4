"""What a decoder's folder says of it, and how much memory its cache may take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from models.artifact import Artifact
from models.errors import ModelError
from models.generation.budget import BOX_SHARE, LEAST_BYTES, MOST_BYTES, RUNTIME_BYTES, cache_bytes
from models.generation.layout import Layout, read_layout
from models.generation.options import Sampling
from models.manifest import Budget, FileEntry, Manifest, Variant

GENAI: dict[str, Any] = {
    "model": {
        "context_length": 64,
        "vocab_size": 99,
        "eos_token_id": [5, 6],
        "decoder": {"filename": "model.onnx", "head_size": 8, "num_key_value_heads": 2},
    },
    "search": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "num_beams": 1},
}
LLAMA = {
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "vocab_size": 99,
    "eos_token_id": 5,
}


def layout_of(folder: Path, **files: Any) -> Layout:
    (folder / "model.onnx").write_bytes(b"")
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    with Artifact(folder, [path.name for path in folder.iterdir()]) as artifact:
        return read_layout(artifact)


def test_a_folder_of_onnxruntime_genai_says_all_in_one_file(tmp_path: Path) -> None:
    assert layout_of(tmp_path, genai_config=GENAI, generation_config={"eos_token_id": 7}) == Layout(
        graph="model.onnx",
        context_tokens=64,
        end_tokens=frozenset({5, 6, 7}),
        heads=2,
        head_size=8,
        vocabulary=99,
        sampling=Sampling(temperature=0.7, top_k=20, top_p=0.9),
    )


def test_a_folder_of_optimum_says_it_in_the_models_configuration(tmp_path: Path) -> None:
    settings = {"do_sample": False, "temperature": 0.7, "top_k": 50, "repetition_penalty": 1.1, "max_new_tokens": 9}
    assert layout_of(tmp_path, config=LLAMA, generation_config=settings) == Layout(
        graph="model.onnx",
        context_tokens=64,
        end_tokens=frozenset({5}),
        heads=2,
        head_size=8,
        vocabulary=99,
        sampling=Sampling(temperature=0.0, top_k=50, repetition_penalty=1.1),
        max_new_tokens=9,
    )


def test_older_names_and_models_within_models_are_known(tmp_path: Path) -> None:
    layout = layout_of(tmp_path, config={"n_positions": 32, "n_head": 4, "n_embd": 32, "eos_token_id": None})
    assert (layout.context_tokens, layout.heads, layout.head_size, layout.end_tokens) == (32, 4, 8, frozenset())
    layout = layout_of(tmp_path, config={"eos_token_id": [1], "text_config": LLAMA | {"head_dim": 16}})
    assert (layout.context_tokens, layout.head_size, layout.end_tokens) == (64, 16, frozenset({1}))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config": {}}, "max_position_embeddings"),
        ({"config": LLAMA | {"max_position_embeddings": -1}}, "max_position_embeddings"),
        ({"genai_config": {}}, "genai_config.json"),
        ({"genai_config": GENAI | {"model": {**GENAI["model"], "context_length": 0}}}, "context_length"),
        ({"genai_config": GENAI | {"more": {"adapter_filename": "/etc/passwd"}}}, "not among the artifact's files"),
        ({"genai_config": GENAI | {"more": [{"custom_ops_library": "evil.so"}]}}, "not among the artifact's files"),
    ],
)
def test_a_folder_that_says_too_little_or_leads_out_is_refused(
    tmp_path: Path, files: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        layout_of(tmp_path, **files)


def manifest_of(memory_mb: int) -> Manifest:
    return Manifest(
        schema=1,
        name="m",
        version="1",
        task="text-generation",
        format="genai",
        variants=[Variant("v", ["a"])],
        files=[FileEntry("a", 100 << 20, "", []), FileEntry("other", 900 << 20, "", [])],
        budget=Budget(memory_mb=memory_mb),
    )


def test_the_cache_has_what_weights_and_runtime_leave_of_the_budget() -> None:
    assert cache_bytes(manifest_of(400), ["a"]) == (400 << 20) - (100 << 20) - RUNTIME_BYTES
    assert cache_bytes(manifest_of(150), ["a"]) == LEAST_BYTES


def test_without_a_budget_the_cache_has_a_share_of_the_box(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {"SC_PHYS_PAGES": 2 << 18, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr("os.sysconf", pages.__getitem__)
    assert cache_bytes(manifest_of(0), ["a"]) == (2 << 30) // BOX_SHARE
    pages["SC_PHYS_PAGES"] = 64 << 18
    assert cache_bytes(manifest_of(0), ["a"]) == MOST_BYTES
