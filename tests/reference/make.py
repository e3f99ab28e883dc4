"""Makes small models and asks the reference: `python -m tests.reference.make FOLDER` in the reference's environment."""

from __future__ import annotations

import argparse
import importlib
import random
import shutil
import sys
import tempfile
from pathlib import Path

from tests.reference.case import Subject, write_cases

MODULES = (
    "vector_subjects",
    "decoder_subjects",
    "text_subjects",
    "seq2seq_subjects",
    "image_subjects",
    "detection_subjects",
    "segmentation_subjects",
    "sound_subjects",
)
"""Each has `subjects()`, a list of `Subject`."""


def main() -> None:
    """Make every subject, or those whose names hold a word of --only."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a folder inside it for each subject; those made before are replaced")
    parser.add_argument("--seed", type=int, default=None, help="the same seed makes the same models and questions")
    parser.add_argument("--inputs", type=int, default=20, help="how many generated inputs a subject is asked (20)")
    parser.add_argument("--only", nargs="*", default=[], help="subjects whose names hold one of these words")
    parser.add_argument("--recorded", action="store_true", help="only the subjects that are kept with their answers")
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 32) if arguments.seed is None else arguments.seed
    print(f"seed {seed}")
    for subject in load_subjects():
        named = not arguments.only or any(word in subject.name for word in arguments.only)
        if named and not (arguments.recorded and subject.live):
            count = make_subject(subject, arguments.folder, seed, arguments.inputs)
            print(f"{subject.name}: {count} cases")
            sys.stdout.flush()


def load_subjects() -> list[Subject]:
    """Return every subject of every module."""
    return [
        subject for module in MODULES for subject in importlib.import_module(f"tests.reference.{module}").subjects()
    ]


def make_subject(subject: Subject, folder: Path, seed: int, inputs: int) -> int:
    """Make one subject whole and put it in place; return the number of its cases."""
    with tempfile.TemporaryDirectory() as work:
        made = Path(work) / subject.name
        made.mkdir()
        cases = subject.make(made, random.Random(f"{seed} {subject.name}"), inputs)
        write_cases(made, subject, cases)
        shutil.rmtree(folder / subject.name, ignore_errors=True)
        shutil.copytree(made, folder / subject.name)
    return len(cases)


if __name__ == "__main__":
    main()
