"""A model's files as they were exported, read into what is to be published."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from cloud_sync.fleet.description import (
    FILE,
    Description,
    VariantDescription,
    check_plain,
    list_files,
    load_description,
)
from cloud_sync.fleet.errors import FleetError
from cloud_sync.fleet.kinds import Clues, find_limits, find_task, parse_card
from cloud_sync.fleet.plan import Choice, Seen, choose
from models.backends.external import external_files
from models.errors import ModelError

_GRAPHS = (".onnx", ".tflite")


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be published of `folder`: `description` is whole, every variant with its files.

    `why` is what says so of the task; `left_out` tells why a file stays behind; `described` is whether the folder has
    a `spillway.toml`.
    """

    folder: Path
    description: Description
    why: str
    left_out: dict[str, str]
    described: bool
    clues: Clues = Clues()

    @property
    def paths(self) -> list[str]:
        """The files of all variants, sorted."""
        return sorted({path for variant in self.description.variants for path in variant.files})


def read_source(path: Path, *, task: str = "", variants: Sequence[str] = ()) -> Source:
    """Read a model's folder, or its one file; raises FleetError that says what to type."""
    if path.is_file():
        return _read_file(path, task)
    if not path.is_dir():
        raise FleetError(f"{path} is neither a folder nor a .onnx or .tflite file")
    sizes = list_files(path)
    description = load_description(path) or Description()
    clues = _clues(path, sizes)
    found, why = find_task(clues, task) if task else find_task(clues, description.task, FILE)
    choice = _choice(path, sizes, description, found, variants)
    return _source(path, description, choice, found, why, clues)


def _read_file(path: Path, task: str) -> Source:
    """Read a lone graph, with the weights that it keeps beside it."""
    if path.suffix not in _GRAPHS:
        raise FleetError(f"{path} is neither a .onnx nor a .tflite file")
    clues = Clues(is_bare=True)
    found, why = find_task(clues, task)
    sizes = {path.name: path.stat().st_size}
    choice = choose(Seen(sizes, weights_of(path.parent, sizes)), found)
    return _source(path.parent, Description(), choice, found, why, clues)


def _source(folder: Path, given: Description, choice: Choice, task: str, why: str, clues: Clues) -> Source:
    description = msgspec.structs.replace(
        given,
        task=task,
        format=choice.format,
        limits=given.limits or find_limits(task, clues),
        variants=choice.variants,
    )
    source = Source(
        folder=folder,
        description=description,
        why=why,
        left_out=choice.left_out,
        described=given != Description(),
        clues=clues,
    )
    check_plain(folder, source.paths)
    return source


def _choice(folder: Path, sizes: dict[str, int], description: Description, task: str, wanted: Sequence[str]) -> Choice:
    """Return what the admin described, else what the files are."""
    if description.variants:
        return Choice(format=_format(description, sizes), variants=_described(description.variants, sizes, wanted))
    graphs = [path for path in sizes if path.endswith(_GRAPHS)]
    if description.task and len(graphs) <= 1 and not wanted:
        # Who describes a folder means all that lies in it.
        return Choice(format=_format(description, sizes), variants=[VariantDescription("default", list(sizes))])
    return choose(Seen(sizes, weights_of(folder, sizes)), task, wanted)


def _described(
    variants: list[VariantDescription], sizes: dict[str, int], wanted: Sequence[str]
) -> list[VariantDescription]:
    named = {variant.name: variant for variant in variants}
    for name in wanted:
        if name not in named:
            raise FleetError(f"--variants {name}: {FILE} has {', '.join(named)}")
    chosen = [named[name] for name in wanted] or variants
    return [variant if variant.files else msgspec.structs.replace(variant, files=sorted(sizes)) for variant in chosen]


def _format(description: Description, sizes: dict[str, int]) -> str:
    """Return the format that the description names, else the one that the files are of."""
    if description.format:
        return description.format
    if "genai_config.json" in sizes:
        return "genai"
    kinds = {path[path.rfind(".") + 1 :] for path in sizes if path.endswith(_GRAPHS)}
    if len(kinds) != 1:
        raise FleetError(f"{FILE}: format is missing, and the files do not tell it: onnx, tflite or genai")
    return kinds.pop()


def weights_of(folder: Path, paths: Iterable[str]) -> dict[str, list[str]]:
    """Return the files that each graph keeps weights in, by their path in the folder; raises FleetError."""
    found: dict[str, list[str]] = {}
    for path in (path for path in paths if path.endswith(".onnx")):
        prefix = path[: path.rfind("/") + 1]
        found[path] = [prefix + name for name in _beside(folder, path)]
        check_plain(folder, found[path])
    return found


def _beside(folder: Path, graph: str) -> list[str]:
    """Return the files beside a graph that it names; raises FleetError for one that leads elsewhere."""
    check_plain(folder, [graph])
    if not (folder / graph).stat().st_size:
        raise FleetError(f"{graph} is empty")
    with (folder / graph).open("rb") as file:
        # Not closed by hand: an error keeps views of it alive.
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        names = sorted(external_files(data))
    except ModelError as error:
        raise FleetError(f"{graph}: {error}") from error
    for name in names:
        if name.startswith("/") or "\\" in name or {"", ".", ".."} & set(name.split("/")):
            raise FleetError(f"{graph} keeps weights in {name!r}, which leads out of its folder")
    return names


def _clues(folder: Path, sizes: dict[str, int]) -> Clues:
    return Clues(
        config=_json(folder / "config.json"),
        tokenizer=_json(folder / "tokenizer_config.json"),
        sentence=_json(folder / "sentence_bert_config.json"),
        card=_card(folder / "README.md"),
        is_sentence_model="modules.json" in sizes or "1_Pooling/config.json" in sizes,
        is_generator="genai_config.json" in sizes,
        is_bare="config.json" not in sizes,
    )


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise FleetError(f"{path} is not a JSON object: {error}") from error


def _card(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return parse_card(path.read_text(encoding="utf-8", errors="replace"))
