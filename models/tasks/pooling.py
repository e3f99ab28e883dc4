"""A text's vector from those of its tokens, as the folders of sentence-transformers describe it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.artifact import Artifact
from models.errors import ModelError, RequestError

Matrix = NDArray[np.float32]

_MODES: Final[Mapping[str, Callable[[Matrix, int], Matrix]]] = {
    "cls": lambda matrix, _: matrix[0],
    "max": lambda matrix, first: matrix[first:].max(axis=0),
    "mean": lambda matrix, first: matrix[first:].mean(axis=0),
    "mean_sqrt_len": lambda matrix, first: matrix[first:].sum(axis=0) / np.sqrt(np.float32(len(matrix) - first)),
    "weightedmean": lambda matrix, first: np.average(matrix[first:], axis=0, weights=range(first + 1, len(matrix) + 1)),
    "lasttoken": lambda matrix, _: matrix[-1],
}
"""A text's vector from the matrix of its tokens (tokens, size) and the first of them that counts."""
MODES: Final = tuple(_MODES)
_KEYS: Final = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""In the order in which the vectors of several modes stand beside each other."""


class Pooling(msgspec.Struct, frozen=True):
    """How a text's vector is made: one vector for each mode, side by side; `normalize` gives it length 1."""

    modes: tuple[str, ...] = ("mean",)
    normalize: bool = False
    include_prompt: bool = True


class Usual(msgspec.Struct, frozen=True):
    """What a folder says of its vectors; `unknown` names a step that only the graph itself can do.

    `max_tokens` 0 leaves the length to the tokenizer. `trims` and `lowers` are what sentence-transformers does to a
    text before any tokenizer sees it.
    """

    pooling: Pooling = Pooling()
    unknown: str = ""
    max_tokens: int = 0
    prompts: dict[str, str] = {}
    default_prompt: str | None = None
    trims: bool = False
    lowers: bool = False

    def text(self, prompt: str, text: str) -> str:
        """Return what the tokenizer is given."""
        text = (prompt + text).strip() if self.trims else prompt + text
        return text.lower() if self.lowers else text

    def prompt(self, name: object) -> str:
        """Return what is put before a text; raises RequestError for a name that the folder has not."""
        if name is None:
            name = self.default_prompt
        if name is None:
            return ""
        if not isinstance(name, str) or name not in self.prompts:
            known = ", ".join(sorted(self.prompts)) or "none"
            raise RequestError("bad_request", f"parameters.prompt_name: the model has {known}, got {name!r:.40}")
        return self.prompts[name]


class _Module(msgspec.Struct):
    type: str
    path: str = ""


def load_pooling(artifact: Artifact) -> Usual:
    """Read the folder's description; one without any means the mean of the tokens, as sentence-transformers has it."""
    modules = _modules(artifact)
    kinds = [module.type.rsplit(".", 1)[-1] for module in modules]
    path = next((module.path for module, kind in zip(modules, kinds, strict=True) if kind == "Pooling"), "1_Pooling")
    unknown = next((kind for kind in kinds if kind not in {"Transformer", "Pooling", "Normalize"}), "")
    prompts = artifact.read_json("config_sentence_transformers.json")
    named = prompts.get("prompts")
    texts = {str(name): text for name, text in named.items()} if isinstance(named, dict) else {}
    default = prompts.get("default_prompt_name")
    reader = artifact.read_json("sentence_bert_config.json")
    length = reader.get("max_seq_length")
    return Usual(
        pooling=_pooling(artifact.read_json(f"{path}/config.json"), normalize="Normalize" in kinds),
        unknown=unknown,
        max_tokens=length if isinstance(length, int) else 0,
        prompts={name: text for name, text in texts.items() if isinstance(text, str)},
        default_prompt=default if isinstance(default, str) else None,
        trims=bool(modules),
        lowers=reader.get("do_lower_case") is True,
    )


def _modules(artifact: Artifact) -> list[_Module]:
    if "modules.json" not in artifact.files:
        return []
    try:
        return msgspec.json.decode(artifact.read("modules.json", 1 << 20), type=list[_Module])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"modules.json: {error}") from error


def _pooling(config: Mapping[str, Any], *, normalize: bool) -> Pooling:
    modes = tuple(mode for key, mode in _KEYS.items() if config.get(key) is True)
    return Pooling(modes or ("mean",), normalize=normalize, include_prompt=config.get("include_prompt") is not False)


def pool(matrix: Matrix, pooling: Pooling, left_out: int = 0) -> Matrix:
    """Return the vector of a text's tokens (tokens, size), the first `left_out` of them not counted."""
    first = left_out if left_out < len(matrix) else 0
    vectors = [_MODES[mode](matrix, first) for mode in pooling.modes]
    vector = vectors[0] if len(vectors) == 1 else np.concatenate(vectors)
    return unit_length(vector) if pooling.normalize else vector


def unit_length(vector: Matrix) -> Matrix:
    """Return a vector of length 1 in its direction; one without direction stays."""
    return vector / max(float(np.linalg.norm(vector)), 1e-12)
