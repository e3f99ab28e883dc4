"""The same LiteRT graph on both of its runtimes with numpy 1, and on LiteRT with numpy 2: the same answers.

`make test-tflite-runtime` makes an environment of requirements/tflite.txt, which an old box has, and runs this with
the other environment's Python as its argument. Exits 1 where a runtime is missing or an answer differs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

RUNTIMES = ("ai_edge_litert", "tflite_runtime")
STEP = 0.05
"""One step of the answer's scale; kernels may round to either side."""


def answers(runtime: str) -> dict[str, Any]:
    """Return the example's scores for each digit on one runtime, and what was really used."""
    for other in RUNTIMES:
        if other != runtime:
            sys.modules[other] = None  # type: ignore[assignment]
    import numpy as np

    from models.artifact import Artifact
    from models.backends.tflite import open_backend
    from tests.fakes.samples import sample

    folder, manifest = sample("digits-int8")
    with Artifact(folder, manifest.variants[0].files) as artifact:
        backend = open_backend(artifact, threads=1)
    images = np.random.default_rng(7).uniform(0, 1, (20, 1, *[size or 1 for size in backend.inputs[0].shape[1:]]))
    name = backend.inputs[0].name
    scores = [next(iter(backend.run({name: image.astype("f4")}).values())) for image in images]
    used = next(found for found in RUNTIMES if sys.modules.get(f"{found}.interpreter"))
    return {"runtime": used, "numpy": np.__version__, "scores": np.concatenate(scores).tolist()}


def told(python: str, runtime: str) -> dict[str, Any]:
    """Return what `answers` gives in a Python of its own."""
    command = [python, "-m", "tests.system.tflite_runtime", "--answer", runtime]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{runtime} on {python} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def largest_difference(left: list[list[float]], right: list[list[float]]) -> float:
    """Return the largest difference of two lists of rows."""
    rows = zip(left, right, strict=True)
    return max(abs(one - two) for row, other in rows for one, two in zip(row, other, strict=True))


def main(newer: str) -> int:
    """Compare and tell."""
    reference = told(newer, "ai_edge_litert")
    sys.stdout.write("| runtime | numpy | largest difference |\n| --- | --- | --- |\n")
    sys.stdout.write(f"| {reference['runtime']} | {reference['numpy']} | reference |\n")
    wrong = False
    for runtime in RUNTIMES:
        found = told(sys.executable, runtime)
        difference = largest_difference(reference["scores"], found["scores"])
        sys.stdout.write(f"| {found['runtime']} | {found['numpy']} | {difference:.3f} |\n")
        wrong = wrong or found["runtime"] != runtime or difference > STEP or not str(found["numpy"]).startswith("1.")
    return 1 if wrong or str(reference["numpy"]).startswith("1.") else 0


if __name__ == "__main__":
    if sys.argv[1] == "--answer":
        sys.stdout.write(json.dumps(answers(sys.argv[2])) + "\n")
    else:
        sys.exit(main(str(Path(sys.argv[1]))))
