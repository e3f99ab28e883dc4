"""Which of a folder's files make which variant of a model. Pure: no I/O, no clock.

Knows the folders of transformers.js (`onnx/model_quantized.onnx`), Optimum (`model.onnx`, `encoder_model.onnx`),
sentence-transformers (`onnx/`, `1_Pooling/`), onnxruntime-genai (`genai_config.json`) and lone graphs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec

from cloud_sync.fleet.description import BACKENDS, VariantDescription
from cloud_sync.fleet.errors import FleetError
from models.manifest import Requires, is_name

DEFAULT: Final = "default"
MAX_SHARED_BYTES: Final = 64 << 20
"""The largest file that is taken for one of a model's settings; vocabularies are below, weights above."""

_STEM: Final = re.compile(
    r"(?P<role>encoder_model|decoder_model_merged|decoder_with_past_model|decoder_model|model)(?:_(?P<kind>.+))?"
)
_CHOSEN: Final = (DEFAULT, "quantized", "int8", "uint8", "q4")
"""The kinds that are published without being asked for, most exact first."""
_ALIKE: Final = ("quantized", "int8", "uint8")
"""Of these one is enough."""
_ACCELERATED: Final = frozenset({"fp16", "float16", "q4f16", "O4"})
_SECOND_TOKENIZER: Final = re.compile(
    r"vocab\.txt|vocab\.json|merges\.txt|spiece\.model|sentencepiece\.bpe\.model|tokenizer\.model|(?:source|target)\.spm"
)
_SETTINGS: Final = re.compile(r"(?:\d+_[A-Za-z]+/)?[^/]+\.(?:json|jinja|txt|model|spm)|LICEN[CS]E[^/]*|NOTICE[^/]*")
_NOT_READ: Final = re.compile(r"quantize_config\.json|ort_config\.json|requirements\.txt|[^/]*README[^/]*")
_FOREIGN: Final = {
    ".bin": "weights of PyTorch",
    ".h5": "weights of Keras",
    ".msgpack": "weights of Flax",
    ".ot": "weights of Rust",
    ".pt": "weights of PyTorch",
    ".pth": "weights of PyTorch",
    ".safetensors": "weights of PyTorch",
}


class Seen(msgspec.Struct, frozen=True):
    """A folder's files: bytes by path, and for each ONNX graph the files that it keeps weights in, by their path."""

    sizes: Mapping[str, int]
    weights: Mapping[str, Sequence[str]] = {}


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """What is published of a folder: its format, its variants best first, and why other files are left out."""

    format: str
    variants: list[VariantDescription]
    left_out: dict[str, str] = {}


class _Graphs(msgspec.Struct, frozen=True):
    """The graphs of one kind: their paths by role."""

    kind: str
    roles: dict[str, str]


def choose(seen: Seen, task: str, wanted: Sequence[str] = ()) -> Choice:
    """Return what to publish of a folder, `wanted` naming its variants in order; raises FleetError."""
    if "genai_config.json" in seen.sizes:
        return _choose_genai(seen)
    lites = sorted(path for path in seen.sizes if path.endswith(".tflite"))
    graphs = sorted(path for path in seen.sizes if path.endswith(".onnx"))
    if lites and graphs:
        raise FleetError(f"both {graphs[0]} and {lites[0]} are there; publish one of the files, or a folder for each")
    if not lites and not graphs:
        raise FleetError(_no_graph(seen))
    sets = [_Graphs(_kind_of(path), {"model": path}) for path in lites] if lites else _sets(graphs)
    chosen = _chosen(sets, wanted, whole={"encoder_model"} if _is_pair(sets) else {"model"})
    return _choice(seen, task, "tflite" if lites else "onnx", chosen)


def shared_files(seen: Seen, task: str) -> tuple[list[str], dict[str, str]]:
    """Return (the settings that every variant needs, why other files are left out)."""
    shared: list[str] = []
    left_out: dict[str, str] = {}
    has_tokenizer = "tokenizer.json" in seen.sizes
    needs_vocabulary = task == "automatic-speech-recognition"
    for path, size in seen.sizes.items():
        if has_tokenizer and _SECOND_TOKENIZER.fullmatch(path) and not (path == "vocab.json" and needs_vocabulary):
            left_out[path] = "tokenizer.json says the same"
        elif _SETTINGS.fullmatch(path) and not _NOT_READ.fullmatch(path) and size <= MAX_SHARED_BYTES:
            shared.append(path)
        else:
            left_out[path] = _why_not(path)
    return sorted(shared), left_out


def _choice(seen: Seen, task: str, model_format: str, chosen: list[_Graphs]) -> Choice:
    shared, left_out = shared_files(seen, task)
    variants: list[VariantDescription] = []
    for graphs in chosen:
        own = [*graphs.roles.values(), *(name for path in graphs.roles.values() for name in seen.weights.get(path, ()))]
        shared = [path for path in shared if path not in own]
        requires = _requires(graphs.kind, model_format)
        variants.append(VariantDescription(_name_of(graphs.kind), sorted({*own, *shared}), requires))
    taken = {path for variant in variants for path in variant.files}
    return Choice(
        format=model_format,
        variants=variants,
        left_out={path: why for path, why in left_out.items() if path not in taken},
    )


def _choose_genai(seen: Seen) -> Choice:
    """Return all but foreign weights: a folder of onnxruntime-genai names its own files."""
    foreign = {path: _why_not(path) for path in seen.sizes if _suffix(path) in _FOREIGN or _NOT_READ.fullmatch(path)}
    files = sorted(path for path in seen.sizes if path not in foreign)
    variant = VariantDescription(DEFAULT, files, Requires(backend=BACKENDS["genai"]))
    return Choice(format="genai", variants=[variant], left_out=foreign)


def _sets(graphs: Sequence[str]) -> list[_Graphs]:
    """Return the graphs by kind; those under `onnx/` come before the same beside `config.json`."""
    known: dict[str, dict[str, str]] = {}
    for path in sorted(graphs, key=lambda path: not path.startswith("onnx/")):
        stem = path.rpartition("/")[2].removesuffix(".onnx")
        match = _STEM.fullmatch(stem)
        if match and path in {f"{stem}.onnx", f"onnx/{stem}.onnx"}:
            known.setdefault(match["kind"] or "", {}).setdefault(match["role"], path)
    if known:
        return [_Graphs(kind, roles) for kind, roles in known.items()]
    if len(graphs) > 1:
        raise FleetError(
            f"which of the graphs is the model cannot be told: {', '.join(graphs)}; publish one file alone"
        )
    return [_Graphs("", {"model": graphs[0]})]


def _is_pair(sets: Iterable[_Graphs]) -> bool:
    return any("encoder_model" in graphs.roles for graphs in sets)


def _chosen(sets: Sequence[_Graphs], wanted: Sequence[str], whole: set[str]) -> list[_Graphs]:
    complete = {_name_of(graphs.kind): _complete(graphs) for graphs in sets if whole <= graphs.roles.keys()}
    complete = {name: graphs for name, graphs in complete.items() if graphs.roles}
    if not complete:
        raise FleetError("the folder has a decoder without its encoder_model.onnx, or an encoder without a decoder")
    for name in wanted:
        if name not in complete:
            raise FleetError(f"--variants {name}: the folder has {', '.join(sorted(complete))}")
    if wanted:
        return [complete[name] for name in wanted]
    names = [name for name in _CHOSEN if name in complete]
    alike = [name for name in names if name in _ALIKE]
    return [complete[name] for name in names if name not in alike[1:]] or [complete[min(complete)]]


def _complete(graphs: _Graphs) -> _Graphs:
    """Return the graphs that a model needs: a merged decoder makes the two others needless; none where one lacks."""
    roles = graphs.roles
    if "encoder_model" not in roles:
        return _Graphs(graphs.kind, {"model": roles["model"]})
    decoders = [("decoder_model_merged",), ("decoder_model", "decoder_with_past_model"), ("decoder_model",)]
    for needed in decoders:
        if all(role in roles for role in needed):
            return _Graphs(graphs.kind, {role: roles[role] for role in ("encoder_model", *needed)})
    return _Graphs(graphs.kind, {})


def _requires(kind: str, model_format: str) -> Requires:
    """Return what a kind asks of a box; memory is filled in where it is known."""
    return Requires(
        architectures=_architectures(kind),
        backend=BACKENDS[model_format],
        accelerator="cuda" if kind in _ACCELERATED else "",
    )


def _architectures(kind: str) -> list[str]:
    if kind.endswith("arm64"):
        return ["aarch64"]
    return ["x86_64"] if "avx" in kind else []


def _kind_of(path: str) -> str:
    stem = path.rpartition("/")[2].rpartition(".")[0]
    match = _STEM.fullmatch(stem)
    return (match["kind"] or "") if match else ""


def _name_of(kind: str) -> str:
    name = re.sub(r"[^a-z0-9._-]", "-", kind.lower()) or DEFAULT
    return name if is_name(name) else DEFAULT


def _suffix(path: str) -> str:
    return path[path.rfind(".") :] if "." in path else ""


def _why_not(path: str) -> str:
    suffix = _suffix(path)
    if suffix in {".onnx", ".tflite"} or ".onnx" in path:
        return "a graph that no variant takes; --variants can name it"
    return _FOREIGN.get(suffix, "nothing on a box reads it")


def _no_graph(seen: Seen) -> str:
    if foreign := sorted({_FOREIGN[_suffix(path)] for path in seen.sizes if _suffix(path) in _FOREIGN}):
        export = "optimum-cli export onnx --model FOLDER EXPORTED"
        return f"there is no .onnx or .tflite file, only {foreign[0]}; export it first: {export}"
    return "there is no .onnx, .tflite or genai_config.json"
