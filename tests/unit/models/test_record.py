"""Golden samples are recorded from answers, and an error is no answer."""

from __future__ import annotations

import msgspec
import pytest

from models.errors import ModelError
from models.manifest import Golden, Manifest
from models.record import answer_golden, warm
from models.request import Dialect
from models.session import BatchSession
from models.tasks.tabular import Tabular
from tests.fakes.backend import summing


def session() -> BatchSession:
    backend = summing()
    return BatchSession({Dialect.HUGGINGFACE: Tabular({}, backend, classify=False)}, backend, batch=4)


def manifest(*bodies: bytes) -> Manifest:
    golden = [Golden("application/json", body, msgspec.Raw(b"null"), 0.1) for body in bodies]
    return Manifest(
        schema=1, name="m", version="1", task="tabular-regression", format="onnx", variants=[], files=[], golden=golden
    )


def test_a_golden_answer_is_the_body_that_an_asker_gets() -> None:
    described = manifest(b'{"inputs": [1, 2]}')
    assert answer_golden(session(), described, described.golden[0]) == b'{"outputs":3.0}'


@pytest.mark.parametrize("body", [b'{"inputs": [1]}', b'{"inputs": [666, 1]}', b"{}", b""])
def test_a_golden_sample_that_ends_in_an_error_is_the_models_fault(body: bytes) -> None:
    described = manifest(body)
    with pytest.raises(ModelError, match="golden"):
        answer_golden(session(), described, described.golden[0])


def test_warming_takes_one_sample_and_none_is_no_fault() -> None:
    warm(session(), manifest())
    warm(session(), manifest(b'{"inputs": [1, 2]}', b"{}"))
    with pytest.raises(ModelError):
        warm(session(), manifest(b"{}"))
