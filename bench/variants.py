"""Size, latency and memory of well-known shapes in full precision, 8 and 4 bits, one thread: a Markdown table.

    python bench/variants.py FOLDER [--threads N]

FOLDER is what `bench/variants/make.py` wrote. Each variant runs in a process of its own, as a worker does; texts have
128 tokens, pictures 224 x 224 pixels, sounds 5 seconds. Milliseconds are of the processor, so that
other programs matter little; memory is the process's (PSS).
"""

from __future__ import annotations

import argparse
import io
import math
import struct
import sys
import tempfile
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from cloud_sync.fleet.errors import FleetError
from cloud_sync.fleet.optimize import optimize
from cloud_sync.fleet.prepare import build_manifest, stage
from cloud_sync.fleet.progress import Progress
from cloud_sync.fleet.samples import picture
from cloud_sync.fleet.source import Source, read_source
from models.manifest import Golden, manifest_bytes
from models.measure import Measured, measure

RECIPES: Final = {"image-classification": ("int8-static",)}
"""What is made of a task's models; of all others 8 bits by each request, and 4."""
TOKENS: Final = 128
RATE: Final = 16_000
SOUND_S: Final = 5
_MEBIBYTE: Final = 1 << 20


def question(task: str) -> Golden:
    """Return one request of the usual size for a task."""
    kind, body = {
        "image-classification": ("image/png", picture()),
        "audio-classification": ("audio/wav", sound()),
    }.get(task, ("text/plain", " ".join(f"w{number}" for number in range(TOKENS - 2)).encode()))
    return Golden(kind, body, msgspec.Raw(b"null"), 0.0)


def sound() -> bytes:
    """Return five seconds of a tone, a WAV of 16 bits."""
    held = io.BytesIO()
    with wave.open(held, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        values = [round(8000 * math.sin(at * 440 * 2 * math.pi / RATE)) for at in range(SOUND_S * RATE)]
        file.writeframes(struct.pack(f"<{len(values)}h", *values))
    return held.getvalue()


def variants(folder: Path, work: Path) -> Iterator[tuple[str, Source]]:
    """Give the model as it was exported, and every smaller form that ONNX Runtime's tools make of it."""
    source = read_source(folder)
    yield "float32", source
    asked = question(source.description.task)
    calibration = work / "calibration.jsonl"
    suffix = {"image/png": "png", "audio/wav": "wav"}.get(asked.content_type, "txt")
    (work / f"sample.{suffix}").write_bytes(asked.body)
    calibration.write_bytes(msgspec.json.encode({"file": f"sample.{suffix}"}))
    for recipe in RECIPES.get(source.description.task, ("int8-dynamic", "int4")):
        try:
            optimize(folder, work / recipe, [recipe], calibration=calibration, task="", progress=Progress(quiet=True))
        except FleetError as error:
            print(f"{folder.name}: {error}", file=sys.stderr)
            continue
        yield recipe, read_source(work / recipe, variants=[recipe])


def run(source: Source, threads: int) -> tuple[Measured, int]:
    """Return what a variant cost, and the bytes that a box fetches."""
    with tempfile.TemporaryDirectory() as work:
        staged = stage(source, Path(work))
        manifest = build_manifest(source, staged, "model", "1")
        asked = [question(manifest.task)]
        measured = measure(staged.folder, manifest_bytes(manifest), manifest.variants[0], asked, threads=threads)
        if measured.failures:
            raise SystemExit(f"{source.folder.name}: {measured.failures[0]}")
        return measured, sum((staged.folder / path).stat().st_size for path in staged.paths)


def main() -> None:
    """Measure every model of the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    print("| shape | task | precision | MiB to fetch | ms | start ms | MiB of memory |\n|---|---|---|---|---|---|---|")
    for folder in sorted(path for path in options.folder.iterdir() if path.is_dir()):
        with tempfile.TemporaryDirectory() as work:
            for name, source in variants(folder, Path(work)):
                measured, size = run(source, options.threads)
                cells = (
                    folder.name,
                    source.description.task,
                    name,
                    f"{size / _MEBIBYTE:.0f}",
                    f"{measured.cpu_ms:.1f}",
                )
                print(
                    "|", " | ".join((*cells, f"{measured.open_ms:.0f}", f"{measured.memory_mb:.0f}")), "|", flush=True
                )


if __name__ == "__main__":
    main()
