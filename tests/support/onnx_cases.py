"""The cases of the ONNX project's own backend suite, run on plain ONNX Runtime and on our backend side by side.

`python -m tests.support.onnx_cases [WORD]` runs them all (or those whose name holds WORD), prints how many each
passes and which ours loses, and exits 1 if it loses any.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import onnx
import onnxruntime as ort
from onnx import numpy_helper
from onnx.backend.test.loader import load_model_tests
from onnx.backend.test.runner import Runner

from models.backends.face import CARRIED
from models.backends.onnx import OnnxBackend
from models.errors import ModelError

KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator")
"""Those whose graphs come with the package; `real` has to be downloaded."""

Values = Sequence[Any]
Run = Callable[[Values], Values]
Opened = Callable[["Case"], contextlib.AbstractContextManager[Run]]


class Case(msgspec.Struct):
    """A graph, and what it answers to what."""

    name: str
    graph: bytes
    data: Sequence[tuple[Values, Values]]
    rtol: float
    atol: float


class Counts(msgspec.Struct):
    """How a run went: names of the cases that plain ONNX Runtime passes, and of those what ours does not."""

    cases: int
    plain: list[str]
    lost: list[str]
    uncarried: list[str]
    """Passed by both, and refused by a session because no request can carry their types."""


def cases(word: str = "", kinds: Sequence[str] = KINDS) -> Iterator[Case]:
    """Give every case of some kinds whose name holds a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # infinity and not-a-number are some cases' point
        for kind in kinds:
            for found in load_model_tests(kind=kind):
                if word in found.name:
                    yield _on_disk(found) if found.model is None else _in_memory(found)


def compare(chosen: Iterator[Case]) -> Counts:
    """Run cases on both; a case is passed when every answer is as near as the suite asks."""
    ort.set_default_logger_severity(4)
    counts = Counts(0, [], [], [])
    for case in chosen:
        counts.cases += 1
        if not _passes(case, _plain):
            continue
        counts.plain.append(case.name)
        if not _passes(case, _ours):
            counts.lost.append(case.name)
        elif not _carried(case):
            counts.uncarried.append(case.name)
    return counts


def _in_memory(found: Any) -> Case:
    return Case(found.name, found.model.SerializeToString(), found.data_sets, found.rtol, found.atol)


def _on_disk(found: Any) -> Case:
    folder = Path(found.model_dir)
    graph = (folder / "model.onnx").read_bytes()
    model = onnx.load_model_from_string(graph)
    data = [
        (_values(one, "input", model.graph.input), _values(one, "output", model.graph.output))
        for one in sorted(folder.glob("test_data_set_*"))
    ]
    return Case(found.name, graph, data, found.rtol, found.atol)


def _values(folder: Path, which: str, nodes: Sequence[onnx.ValueInfoProto]) -> list[Any]:
    values: list[Any] = []
    for at in range(len(list(folder.glob(f"{which}_*.pb")))):
        raw = (folder / f"{which}_{at}.pb").read_bytes()
        kind = nodes[at].type
        if kind.HasField("sequence_type"):
            values.append(numpy_helper.to_list(onnx.SequenceProto.FromString(raw)))
        elif kind.HasField("optional_type"):
            values.append(numpy_helper.to_optional(onnx.OptionalProto.FromString(raw)))
        else:
            values.append(numpy_helper.to_array(onnx.TensorProto.FromString(raw)))
    return values


@contextlib.contextmanager
def _plain(case: Case) -> Iterator[Run]:
    session = ort.InferenceSession(case.graph, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    yield lambda values: session.run(None, dict(zip(names, values, strict=False)))


@contextlib.contextmanager
def _ours(case: Case) -> Iterator[Run]:
    backend = OnnxBackend(case.graph, threads=1)
    names = [spec.name for spec in backend.inputs]
    yield lambda values: list(backend.run(dict(zip(names, values, strict=False))).values())
    backend.close()


def _passes(case: Case, opened: Opened) -> bool:
    try:
        with opened(case) as run:
            for given, expected in case.data:
                Runner.assert_similar_outputs(list(expected), list(run(given)), rtol=case.rtol, atol=case.atol)
    except (Exception, SystemExit):  # noqa: BLE001 - whatever a case trips over, it has not passed
        return False
    return True


def _carried(case: Case) -> bool:
    try:
        backend = OnnxBackend(case.graph, threads=1)
    except ModelError:
        return False
    return all(spec.dtype in CARRIED for spec in [*backend.inputs, *backend.outputs])


def main(word: str = "") -> int:
    """Run and tell."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts = compare(cases(word))
    words = [f"cases {counts.cases}, plain ONNX Runtime {ort.__version__} passes {len(counts.plain)}, "]
    words += [f"ours loses {len(counts.lost)}; no request can carry the types of {len(counts.uncarried)} of them\n"]
    sys.stdout.write("".join([*words, *(f"lost: {name}\n" for name in counts.lost)]))
    return 1 if counts.lost or not counts.plain else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
