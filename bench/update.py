"""What an update costs on the wire, against the general tools, on pairs of versions that were really trained.

`make bench-update`: the weights come from `bench/update/train.py`, which takes half an hour once and keeps them in
`.run/`. Each version is an ONNX model with its tokenizer and configuration. Every result is decoded and compared.
Bytes are payload; the signed description of the frames stands apart. Exits 1 if a limit is missed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from cloud_sync.fleet.packing import Packed, earlier_version, pack_files
from cloud_sync.fleet.tensors import find_tensors
from cloud_sync.frames import decode_frame, sha256_of
from cloud_sync.sources import Entry, Sources, sources_bytes
from models.manifest import FileEntry

KINDS = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
CHANGES = ("full-1e-4", "full-1e-5", "head", "configuration", "one-row-more")
NEEDED = ("zstd", "xdelta3", "bsdiff", "bspatch", "casync")
ALLOWANCE_BYTES = 16 << 10
Weights = dict[str, NDArray[np.float32]]


def read_weights(path: Path) -> Weights:
    """Return the float32 tensors of a safetensors file."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    weights = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            values = np.frombuffer(data[8 + size + begin : 8 + size + end], "<f4")
            weights[name] = values.reshape(entry["shape"])
    return weights


def initialisers(name: str, values: NDArray[np.float32], kind: str) -> list[Any]:
    """Return a tensor as ONNX keeps it in this precision; int8 is symmetric, a scale for each row."""
    if kind == "int8" and values.ndim == 2:
        scales = np.maximum(np.abs(values).max(axis=1, keepdims=True), 1e-12) / 127
        whole = np.rint(values / scales).astype(np.int8)
        return [
            raw_tensor(name, TensorProto.INT8, whole),
            raw_tensor(f"{name}.scale", TensorProto.FLOAT, scales.astype("<f4")),
        ]
    if kind == "float16":
        return [raw_tensor(name, TensorProto.FLOAT16, values.astype("<f2"))]
    if kind == "bfloat16":
        bits = values.view("<u4").astype(np.uint64)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
        return [raw_tensor(name, TensorProto.BFLOAT16, rounded)]
    return [raw_tensor(name, TensorProto.FLOAT, values)]


def raw_tensor(name: str, kind: int, values: NDArray[Any]) -> Any:
    """Return an ONNX tensor with its bytes as they are."""
    return helper.make_tensor(name, kind, values.shape, values.tobytes(), raw=True)


def write_version(folder: Path, weights: Weights, kind: str, tokenizer: bytes, config: dict[str, object]) -> None:
    """Write a version's folder."""
    folder.mkdir(parents=True)
    tensors = [tensor for name, values in weights.items() for tensor in initialisers(name, values, kind)]
    onnx.save(helper.make_model(helper.make_graph([], "weights", [], [], initializer=tensors)), folder / "model.onnx")
    (folder / "tokenizer.json").write_bytes(tokenizer)
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def changed(change: str, weights: Path, base: Weights, tokenizer: bytes) -> tuple[Weights, bytes, dict[str, object]]:
    """Return what a version consists of after a change."""
    config: dict[str, object] = {"model_type": "gpt2", "n_layer": 4, "n_embd": 192, "vocab_size": 4096}
    if change == "base":
        return base, tokenizer, config
    if change == "configuration":
        return base, tokenizer, {**config, "temperature": 0.7}
    if change == "one-row-more":
        words = json.loads(tokenizer)
        words["model"]["vocab"]["<|spill|>"] = 4096
        row = np.random.default_rng(0).normal(0, 0.02, (1, 192)).astype("<f4")
        tables = {name: np.concatenate([base[name], row]) for name in ("tokens.weight", "head.weight")}
        return {**base, **tables}, json.dumps(words, ensure_ascii=False).encode(), {**config, "vocab_size": 4097}
    return read_weights(weights / f"{change}.safetensors"), tokenizer, config


def run(*command: str | Path, stdin: bytes | None = None) -> None:
    """Run a tool; raises CalledProcessError."""
    subprocess.run([str(word) for word in command], check=True, capture_output=True, input=stdin)


def zstd(_old: Path, new: Path, out: Path) -> None:
    run("zstd", "-19", "-f", "-q", new, "-o", out)
    run("zstd", "-d", "-f", "-q", out, "-o", out.with_suffix(".back"))


def zstd_patch(old: Path, new: Path, out: Path) -> None:
    run("zstd", "-19", "--long=27", f"--patch-from={old}", "-f", "-q", new, "-o", out)
    run("zstd", "-d", "--long=27", f"--patch-from={old}", "-f", "-q", out, "-o", out.with_suffix(".back"))


def xdelta(old: Path, new: Path, out: Path) -> None:
    run("xdelta3", "-9", "-S", "djw", "-B", "67108864", "-f", "-e", "-s", old, new, out)
    run("xdelta3", "-d", "-f", "-B", "67108864", "-s", old, out, out.with_suffix(".back"))


def bsdiff(old: Path, new: Path, out: Path) -> None:
    run("bsdiff", old, new, out)
    run("bspatch", old, out.with_suffix(".back"), out)


def casync(old: Path, new: Path, out: Path) -> None:
    """Leave the chunks of the new file that the old one has not, and the index, as one file."""
    store = out.with_suffix(".store")
    run("casync", "make", f"--store={store}", out.with_suffix(".old.caibx"), old)
    before = set(store.rglob("*.cacnk"))
    index = out.with_suffix(".new.caibx")
    run("casync", "make", f"--store={store}", index, new)
    out.write_bytes(
        index.read_bytes() + b"".join(path.read_bytes() for path in store.rglob("*.cacnk") if path not in before)
    )
    run("casync", "extract", f"--store={store}", index, out.with_suffix(".back"))


TOOLS: dict[str, Callable[[Path, Path, Path], None]] = {
    "zstd -19": zstd,
    "--patch-from": zstd_patch,
    "xdelta3": xdelta,
    "bsdiff": bsdiff,
    "casync": casync,
}


def tool_bytes(tool: Callable[[Path, Path, Path], None], old: Path, new: Path, work: Path) -> int:
    """Return what a tool sends for the files that changed, each of them decoded and compared."""
    total = 0
    for path in sorted(new.iterdir()):
        if path.read_bytes() == (old / path.name).read_bytes():
            continue
        folder = Path(tempfile.mkdtemp(dir=work))
        out = folder / "patch"
        tool(old / path.name, path, out)
        if out.with_suffix(".back").read_bytes() != path.read_bytes():
            raise SystemExit(f"{tool.__name__} did not give {path.name} back")
        total += out.stat().st_size
        shutil.rmtree(folder)
    return total


def spillway_bytes(old: Path, new: Path, work: Path) -> tuple[int, int]:
    """Return our payload and the bytes of the signed description, the version decoded and compared."""
    paths = sorted(path.name for path in old.iterdir())
    first = pack_files(old, paths, Path(tempfile.mkdtemp(dir=work)), {}, _quiet)
    earlier = earlier_version(old, first.files)
    packed = pack_files(new, paths, Path(tempfile.mkdtemp(dir=work)), {"1": earlier}, _quiet)
    check(packed, old, new, first.files)
    description = len(sources_bytes(Sources(1, "0" * 64, packed.frames)))
    return packed.bytes_from["1"], description


def _quiet(_count: int) -> None:
    pass


def check(packed: Packed, old: Path, new: Path, old_files: list[FileEntry]) -> None:
    """Decode every frame that the earlier version has not, and compare the whole."""
    by_hash = {entry.sha256: entry.path for entry in old_files}
    held = {}
    for entry in old_files:
        data, at = (old / entry.path).read_bytes(), 0
        for length, sha256 in entry.frames:
            held[sha256] = data[at : at + length]
            at += length
    for entry in packed.files:
        frames = [
            held[sha256] if sha256 in held else decoded(packed, sha256, length, old, by_hash)
            for length, sha256 in entry.frames
        ]
        if b"".join(frames) != (new / entry.path).read_bytes():
            raise SystemExit(f"{entry.path} did not come back")


def decoded(packed: Packed, sha256: str, length: int, old: Path, by_hash: dict[str, str]) -> bytes:
    """Return one frame from its smallest entry."""
    entry: Entry = min(packed.frames[sha256], key=lambda entry: entry.stored)
    with packed.packs[entry.pack].open("rb") as file:
        file.seek(entry.offset)
        stored = file.read(entry.stored)
    base = b""
    if entry.base is not None:
        data = (old / by_hash[entry.base.sha256]).read_bytes()
        base = data[entry.base.offset : entry.base.offset + entry.base.length]
    frame = decode_frame(entry.codec, stored, length, base, entry.exponent_bits)
    if sha256_of(frame) != sha256:
        raise SystemExit(f"frame {sha256} did not come back")
    return frame


def entropy_bytes(old: Path, new: Path) -> float:
    """Return the bound of PLATFORM for the tensors: the differences' exponents given the base's, signs, mantissas."""
    before = {tensor.name: tensor for tensor in find_tensors(old, ["model.onnx"])}
    old_data, new_data = (old / "model.onnx").read_bytes(), (new / "model.onnx").read_bytes()
    bits = 0.0
    for tensor in find_tensors(new, ["model.onnx"]):
        base = before[tensor.name]
        kind = f"<u{tensor.numbers.width}"
        a = np.frombuffer(old_data, kind, tensor.length // tensor.numbers.width, base.offset)
        b = np.frombuffer(new_data, kind, tensor.length // tensor.numbers.width, tensor.offset)
        bits += difference_bits(a, b, tensor.numbers.exponent_bits)
    return bits / 8


def difference_bits(old: NDArray[Any], new: NDArray[Any], exponent_bits: int) -> float:
    """Return the bits of one tensor's differences."""
    width = old.dtype.itemsize * 8
    signed = old.astype(np.int64), new.astype(np.int64)
    if exponent_bits:
        top = 1 << (width - 1)
        ordered = [np.where(values & top, ~values & (2 * top - 1), values | top) for values in signed]
        steps = ordered[1] - ordered[0]
        groups = (signed[0] >> (width - 1 - exponent_bits)) & ((1 << exponent_bits) - 1)
    else:
        steps = (signed[1] - signed[0] + (1 << (width - 1))) % (1 << width) - (1 << (width - 1))
        groups = np.zeros_like(steps)
    sizes = np.where(steps == 0, 0, np.floor(np.log2(np.maximum(np.abs(steps), 1))) + 1).astype(np.int64)
    plain = float(np.where(sizes > 0, sizes, 0).sum())  # a sign and the bits below the leading one
    joint = np.unique(groups * 128 + sizes, return_counts=True)
    alone = dict(zip(*(part.tolist() for part in np.unique(groups, return_counts=True)), strict=True))
    counts = joint[1].astype(float)
    given = np.array([alone[int(key) // 128] for key in joint[0]], dtype=float)
    return plain + float((counts * np.log2(given / counts)).sum())


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", type=Path, help="what bench/update/train.py wrote")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--changes", nargs="*", default=list(CHANGES))
    options = parser.parse_args()
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        raise SystemExit(f"apt-get install {' '.join(missing)}")
    base, tokenizer = (
        read_weights(options.weights / "base.safetensors"),
        (options.weights / "tokenizer.json").read_bytes(),
    )
    print(f"| pair | raw | {' | '.join(TOOLS)} | Spillway | of the smallest | entropy | signed description |")
    print(f"|---|---|{'---|' * (len(TOOLS) + 4)}")
    missed = False
    with tempfile.TemporaryDirectory() as work:
        for kind in options.kinds:
            old = Path(work) / kind / "base"
            first = changed("base", options.weights, base, tokenizer)
            write_version(old, first[0], kind, *first[1:])
            for change in options.changes:
                new = old.with_name(change)
                parts = changed(change, options.weights, base, tokenizer)
                write_version(new, parts[0], kind, *parts[1:])
                missed |= print_row(f"{kind}, {change}", old, new, Path(work))
    return int(missed)


def print_row(name: str, old: Path, new: Path, work: Path) -> bool:
    """Measure one pair; return whether a limit is missed."""
    raw = sum(path.stat().st_size for path in new.iterdir())
    tools = [tool_bytes(tool, old, new, work) for tool in TOOLS.values()]
    ours, description = spillway_bytes(old, new, work)
    bound = entropy_bytes(old, new) if "full" in name else 0
    over = f"{ours / bound:.3f} of {bound:.0f}" if bound else ""
    columns = [raw, *tools, ours, f"{ours / min(tools):.2f}", over, description]
    print(f"| {name} | {' | '.join(str(column) for column in columns)} |", flush=True)
    return ours > 1.02 * min(tools) + ALLOWANCE_BYTES


if __name__ == "__main__":
    sys.exit(main())
