"""Every file that an ONNX graph leads to is found before a runtime sees the graph."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.backends.external import external_files
from models.errors import ModelError
from tests.fakes.onnx_graph import added_weights, external_tensor, graph_of, model_of, node, part
from tests.fakes.samples import MODELS


def test_a_graph_that_holds_its_weights_names_no_file() -> None:
    assert external_files((MODELS / "digits" / "model.onnx").read_bytes()) == set()


def test_the_file_of_an_initialiser_is_found() -> None:
    assert external_files(added_weights("weights.bin")) == {"weights.bin"}


def test_e3_files_named_in_inner_graphs_constants_and_functions_are_found() -> None:
    tensor = external_tensor("w", [1], "../../etc/passwd", 4)
    inner = graph_of([], [], [], [tensor])
    branch = node("If", ["c"], ["y"], [part(1, "then_branch") + part(6, inner)])
    constant = node("Constant", [], ["k"], [part(1, "value") + part(5, external_tensor("k", [1], "/dev/zero", 4))])
    function = part(25, part(7, node("Constant", [], ["f"], [part(5, external_tensor("f", [1], "f.bin", 4))])))
    found = external_files(model_of(graph_of([branch, constant], [], [])) + function)
    assert found == {"../../etc/passwd", "/dev/zero", "f.bin"}


def test_e3_an_address_in_memory_is_no_file() -> None:
    with pytest.raises(ModelError, match="memory"):
        external_files(added_weights("*/_ORT_MEM_ADDR_/*"))


def test_e6_a_graph_nested_without_end_is_refused() -> None:
    graph = graph_of([], [], [])
    for _ in range(1000):
        graph = graph_of([node("If", ["c"], ["y"], [part(6, graph)])], [], [])
    with pytest.raises(ModelError, match="nested"):
        external_files(model_of(graph))


@pytest.mark.parametrize(
    "graph", [b"\xff", b"\x3a\xff\xff\xff\xff\x0f", b"\x3a\x05abc", b"\x0b", b"\xff" * 11, b"\x3a\x80"]
)
def test_e7_bytes_that_are_no_graph_are_refused(graph: bytes) -> None:
    with pytest.raises(ModelError):
        external_files(graph)


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(graph: bytes) -> None:
    with contextlib.suppress(ModelError):
        external_files(graph)
