"""Large weights of an ONNX graph laid out beside it in one file, so that a box maps them in place of copying them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import BinaryIO, Final

import msgspec
import onnx
from onnx import ModelProto, TensorProto

from models.artifact import Artifact
from models.errors import ModelError
from models.optimize.graphs import (
    Place,
    bytes_of,
    check_beside,
    external_tensors,
    initialisers,
    is_external,
    load_graph,
    sha256_of,
)

LARGE_BYTES: Final = 64 << 10
"""A weight from this size on goes out of the graph; smaller ones, shapes among them, the runtime wants to see."""
WORTH_BYTES: Final = 1 << 20
"""A graph whose large weights are less than this together stays one file."""
ALIGNED_BYTES: Final = 4096
"""Where weights begin: at pages, and so at every border that a processor's wide loads ask for."""


class Laid(msgspec.Struct, frozen=True):
    """What became of a graph: its files by path, those that hold its weights no more, and the bytes that were moved."""

    files: list[str]
    left: list[str] = []
    moved_bytes: int = 0


def lay_out(folder: Path, graph: str, target: Path) -> Laid:
    """Write `folder/graph` to `target/graph` with its weights ready to be mapped; raises ModelError.

    A graph without large weights, or whose weights lie so already, is copied byte for byte.
    """
    source = folder / graph
    model = load_graph(source)
    names = sorted({Place(tensor).file for tensor in external_tensors(model.graph)})
    for name in names:
        check_beside(name)
    written = target / graph
    written.parent.mkdir(parents=True, exist_ok=True)
    prefix = graph[: graph.rfind("/") + 1]
    with Artifact(source.parent, [source.name, *names]) as beside:
        if not _is_worth(model):
            return _copy(beside, [source.name, *names], written.parent, prefix)
        moved_bytes = _move(model, beside, written)
    files = [graph, f"{graph}.data"]
    return Laid(files, [prefix + name for name in names if prefix + name not in files], moved_bytes)


def _is_worth(model: ModelProto) -> bool:
    """Whether weights must move: large ones inside the graph, or some outside it that no page begins with."""
    if any(_is_askew(tensor) for tensor in external_tensors(model.graph)):
        return True
    inside = (tensor for tensor in initialisers(model.graph) if not is_external(tensor))
    large_bytes = sum(size for tensor in inside if (size := tensor.ByteSize()) >= LARGE_BYTES)
    return bool(large_bytes >= WORTH_BYTES)


def _is_askew(tensor: TensorProto) -> bool:
    place = Place(tensor)
    large = place.length is None or place.length >= LARGE_BYTES
    return large and place.offset % ALIGNED_BYTES != 0


def _copy(beside: Artifact, names: list[str], target: Path, prefix: str) -> Laid:
    for name in names:
        beside.check(name)
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(beside.folder / name, target / name)
    return Laid([prefix + name for name in names])


def _move(model: ModelProto, beside: Artifact, written: Path) -> int:
    """Write the graph and its `.data`; return the bytes that lie there."""
    data = written.with_name(f"{written.name}.data")
    digests: dict[int, str] = {}
    with data.open("xb") as file:
        for number, tensor in enumerate(initialisers(model.graph)):
            held = bytes_of(tensor, beside)
            if held is None:
                continue
            digests[number] = sha256_of(held)
            _place(tensor, held, file, data.name)
    onnx.save_model(model, written)
    _check(written, digests)
    return data.stat().st_size


def _place(tensor: TensorProto, held: bytes, file: BinaryIO, name: str) -> None:
    """Put a tensor's bytes into the file where they are large, else into the tensor itself."""
    for field in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "external_data"):
        tensor.ClearField(field)
    if len(held) < LARGE_BYTES:
        tensor.ClearField("data_location")
        tensor.raw_data = held
        return
    file.write(bytes(-file.tell() % ALIGNED_BYTES))
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", name), ("offset", file.tell()), ("length", len(held))):
        tensor.external_data.add(key=key, value=str(value))
    file.write(held)


def _check(written: Path, digests: dict[int, str]) -> None:
    """Read back what was written; raises ModelError unless every weight is what it was."""
    model = load_graph(written)
    with Artifact(written.parent, [written.name, f"{written.name}.data"]) as beside:
        found = {
            number: sha256_of(held)
            for number, tensor in enumerate(initialisers(model.graph))
            if (held := bytes_of(tensor, beside)) is not None
        }
    if found != digests:
        raise ModelError(
            f"{written.name}: a weight is not what it was after it was laid out; is the disk full or failing?"
        )
