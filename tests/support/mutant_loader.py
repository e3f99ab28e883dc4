"""Opens mutants of an example one by one, each in a confined child, and tells how they ended.

`python -m tests.support.mutant_loader EXAMPLE SEED FIRST COUNT [KEEP]` prints a JSON object of counts. The mutants that
ended their child by a signal are kept in the folder KEEP.
"""

from __future__ import annotations

import collections
import sys
import tempfile
from pathlib import Path

import msgspec

from models.manifest import Budget
from tests.fakes.samples import sample
from tests.support.confined import in_child, warm_up
from tests.support.mutants import mutant

SEED_STEP = 1_000_003
"""Between the mutants of one seed and the next."""
GRAPHS = {"onnx": "model.onnx", "tflite": "model.tflite"}


def load(name: str, seed: int, first: int, count: int, keep: Path | None) -> dict[str, int]:
    """Open so many mutants of an example; returns how many ended how."""
    folder, manifest = sample(name)
    manifest = msgspec.structs.replace(manifest, budget=Budget(memory_mb=100))
    warm_up(name)
    ends: collections.Counter[str] = collections.Counter()
    original = (folder / GRAPHS[manifest.format]).read_bytes()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as made:
        for entry in manifest.files:
            (Path(made) / entry.path).write_bytes((folder / entry.path).read_bytes())
        graph = Path(made) / GRAPHS[manifest.format]
        for number in range(first, first + count):
            data = mutant(original, manifest.format, seed * SEED_STEP + number)
            graph.write_bytes(data)
            end = in_child(Path(made), manifest, manifest.golden[0].body).end
            ends[end] += 1
            if end.startswith("SIG") and keep is not None:
                (keep / f"{name}-{seed}-{number}-{end}").write_bytes(data)
    return dict(ends)


def main(name: str, seed: str, first: str, count: str, keep: str = "") -> None:
    """Run and tell."""
    ends = load(name, int(seed), int(first), int(count), Path(keep) if keep else None)
    sys.stdout.write(msgspec.json.encode(ends).decode() + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
