"""Answers held to a form, token by token."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import pytest

from models.errors import ModelError, RequestError
from models.generation.guided import Grammars
from models.generation.options import Guide, Sampling
from models.generation.sampling import Sampler
from models.tokens import Tokenizer
from tests.fakes.generation import END, byte_tokenizer

TOKENS = Tokenizer(byte_tokenizer().to_str().encode())
END_TOKEN = TOKENS.encode(END).ids[0]


def schema(**members: Any) -> Guide:
    return Guide(json.dumps(members).encode())


def written(guide: Guide, seed: int, most: int = 400) -> str | None:
    """Draw tokens as they come, held to the form; None where they have no end."""
    matcher = Grammars(TOKENS, frozenset({END_TOKEN})).matcher(guide)
    sampler = Sampler(Sampling(temperature=1.0, seed=seed), [], frozenset({END_TOKEN}))
    chance = np.random.default_rng(seed)
    stream, text = TOKENS.stream(), ""
    for _ in range(most):
        token = sampler.draw(chance.normal(0, 3, END_TOKEN + 1).astype(np.float32), matcher.allowed())
        matcher.accept(token)
        if token == END_TOKEN:
            return text
        text += stream.push(token)
    return None


def test_an_answer_keeps_its_schema_whatever_the_model_prefers() -> None:
    kinds = {"size": {"enum": ["small", "large"]}, "on": {"type": "boolean"}, "name": {"const": "grüß"}}
    guide = schema(type="object", properties=kinds, required=[*kinds], additionalProperties=False)
    for seed in range(5):
        text = written(guide, seed)
        assert text is not None
        answer = json.loads(text)
        assert answer["size"] in {"small", "large"}
        assert isinstance(answer["on"], bool)
        assert answer["name"] == "grüß"


def test_any_object_is_an_object() -> None:
    texts = [text for seed in range(8) if (text := written(Guide(), seed)) is not None]
    assert texts
    assert all(isinstance(json.loads(text), dict) for text in texts)


def test_a_schema_that_holds_itself_is_kept() -> None:
    tree = {"type": "object", "properties": {"next": {"$ref": "#/$defs/tree"}}, "additionalProperties": False}
    guide = Guide(json.dumps({"$ref": "#/$defs/tree", "$defs": {"tree": tree}}).encode())
    texts = [text for seed in range(5) if (text := written(guide, seed)) is not None]
    assert all(set(json.loads(text)) <= {"next"} for text in texts)


@pytest.mark.parametrize(
    "impossible",
    [
        {"type": "integer", "minimum": 5, "maximum": 1},
        {"type": "string", "minLength": 3, "maxLength": 2},
        {"type": "nonsense"},
        {"$ref": "#/$defs/missing"},
        {"not": {}},
    ],
)
def test_a_schema_that_no_answer_keeps_is_refused(impossible: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"response_format\.json_schema\.schema:") as caught:
        Grammars(TOKENS, frozenset({END_TOKEN})).matcher(schema(**impossible))
    assert caught.value.code == "bad_request"


def test_a_token_that_is_not_allowed_is_the_models_fault() -> None:
    matcher = Grammars(TOKENS, frozenset({END_TOKEN})).matcher(schema(type="boolean"))
    with pytest.raises(ModelError, match="cannot be kept"):
        matcher.accept(TOKENS.encode("x").ids[0])


def test_a_model_without_an_end_and_a_box_without_the_library_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="no end token"):
        Grammars(TOKENS, frozenset()).matcher(Guide())
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match="llguidance is missing"):
        Grammars(TOKENS, frozenset({END_TOKEN})).matcher(Guide())
