from __future__ import annotations

import msgspec
import pytest

from agent.client import Answer


def answer(value: object, **facts: str) -> Answer:
    return Answer(body=msgspec.json.encode(value), facts=facts)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"choices": [{"delta": {"content": "Hel"}}]}, "Hel"),
        ({"choices": [{"delta": {"role": "assistant"}}]}, ""),
        ({"choices": [{"message": {"role": "assistant", "content": "Hello"}}]}, "Hello"),
        ({"outputs": {"generated_text": "Hello"}, "spillway": {}}, "Hello"),
        ({"outputs": [{"label": "de", "score": 0.9}]}, '[{"label":"de","score":0.9}]'),
        ({"outputs": 21.5}, "21.5"),
        (
            {"error": {"code": "too_large", "message": "over the limit", "retryable": False}},
            "too_large: over the limit",
        ),
        ({"error": "model_not_found: no such model"}, "model_not_found: no such model"),
        ({"choices": []}, '{"choices":[]}'),
        ([1, 2], "[1,2]"),
    ],
)
def test_an_answer_s_text_is_found_in_every_dialect(value: object, text: str) -> None:
    assert answer(value).text == text


def test_an_answer_without_facts_is_final_and_no_error() -> None:
    assert answer({}).final
    assert not answer({}).failed


def test_the_facts_say_whether_more_follows_and_whether_it_failed() -> None:
    assert not answer({}, final="false", status="partial").final
    assert answer({}, final="true", status="error").failed
