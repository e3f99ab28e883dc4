"""Several askers at one generating model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from models.body import parse_body
from models.channel import Piece
from models.errors import RequestError
from models.generation.chat import ChatTemplate
from models.generation.session import GenerationSession
from models.request import Request
from models.tokens import Tokenizer
from tests.fakes.generation import END, TEMPLATE, ScriptedRuntime, byte_tokenizer

TOKENS = Tokenizer(byte_tokenizer().to_str().encode())
END_TOKEN = TOKENS.encode(END).ids[0]


def request_of(body: object) -> Request:
    parsed = parse_body("application/json", json.dumps(body).encode())
    stream = bool(parsed.stream)
    return Request(model="m", content_type=parsed.content_type, body=parsed.body, dialect=parsed.dialect, stream=stream)


def chatting(answer: str = "", *, chat: bool = True, slots: int = 4) -> tuple[GenerationSession, ScriptedRuntime]:
    """Return a session that answers `answer`, or repeats its prompt."""

    def script(prompt: Sequence[int]) -> Sequence[int]:
        return [*(TOKENS.encode(answer).ids if answer else prompt), END_TOKEN]

    runtime = ScriptedRuntime(script, context_tokens=128, end=END_TOKEN)
    template = ChatTemplate(TEMPLATE, {"eos_token": END}) if chat else None
    return GenerationSession(runtime, TOKENS, template, model="m", slots=slots), runtime


def run(session: GenerationSession, ticket: int = 1) -> list[Piece]:
    pieces: list[Piece] = []
    for _ in range(1000):
        pieces += [piece for piece in session.step() if piece.ticket == ticket]
        if pieces and pieces[-1].final:
            return pieces
    raise AssertionError("the answer has no end")


def ask(session: GenerationSession, body: object) -> list[Piece]:
    session.submit(1, request_of(body))
    return run(session)


def chat(**options: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": "hi"}], **options}


def test_a_chat_is_answered_in_openais_form_with_its_usage() -> None:
    session, runtime = chatting("grüß dich")
    (piece,) = ask(session, chat(max_tokens=20))
    answer = json.loads(piece.body)
    assert answer["choices"][0]["message"]["content"] == "grüß dich"
    assert answer["choices"][0]["finish_reason"] == "stop"
    prompt = TOKENS.encode(f"<|user|>hi{END}<|assistant|>").ids
    assert answer["usage"] == {"prompt_tokens": len(prompt), "completion_tokens": 12, "total_tokens": len(prompt) + 12}
    assert (runtime.started[0].prompt, runtime.started[0].max_tokens) == (prompt, 20)
    assert (piece.tokens_in, piece.tokens_out) == (len(prompt), 12)


def test_an_answer_that_reaches_its_length_says_so() -> None:
    session, _ = chatting("a long answer")
    (piece,) = ask(session, chat(max_tokens=6))
    choice = json.loads(piece.body)["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("a long", "length")


def test_an_answer_cut_inside_a_letter_leaves_that_letter_out() -> None:
    session, _ = chatting("grüß")
    (piece,) = ask(session, chat(max_tokens=3))
    assert json.loads(piece.body)["choices"][0]["message"]["content"] == "gr"


def test_a_plain_text_is_templated_for_a_model_that_chats() -> None:
    session, runtime = chatting("hello")
    (piece,) = ask(session, {"inputs": "hi", "parameters": {"max_new_tokens": 9}})
    assert json.loads(piece.body) == {"outputs": {"generated_text": "hello"}}
    assert runtime.started[0].prompt == TOKENS.encode(f"<|user|>hi{END}<|assistant|>").ids


def test_a_plain_text_is_continued_by_a_model_that_does_not_chat() -> None:
    session, runtime = chatting(" dich", chat=False)
    parameters = {"max_new_tokens": 9, "return_full_text": True}
    (piece,) = ask(session, {"inputs": "grüß", "parameters": parameters})
    assert json.loads(piece.body) == {"outputs": {"generated_text": "grüß dich"}}
    assert runtime.started[0].prompt == TOKENS.encode("grüß").ids


def test_a_model_that_does_not_chat_refuses_messages() -> None:
    session, _ = chatting(chat=False)
    with pytest.raises(RequestError, match="does not chat"):
        session.submit(1, request_of(chat()))


def test_a_list_of_texts_gives_a_list() -> None:
    session, _ = chatting(chat=False)
    (piece,) = ask(session, {"inputs": ["one", "two"], "parameters": {"max_new_tokens": 9}})
    assert json.loads(piece.body) == {"outputs": [{"generated_text": "one"}, {"generated_text": "two"}]}
    assert (piece.tokens_in, piece.tokens_out) == (6, 8)


def test_a_streamed_chat_comes_in_chunks_that_end_with_reason_and_usage() -> None:
    session, _ = chatting("grüß")
    pieces = ask(session, chat(max_tokens=20, stream=True, stream_options={"include_usage": True}))
    chunks: list[dict[str, Any]] = [json.loads(piece.body) for piece in pieces]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "g"}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1]) == "grüß"
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert (chunks[-1]["choices"], chunks[-1]["usage"]["completion_tokens"]) == ([], 7)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert [piece.final for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_a_streamed_text_adds_up_to_the_whole() -> None:
    session, _ = chatting("a → b")
    pieces = ask(session, {"inputs": "x", "parameters": {"max_new_tokens": 20}, "stream": True})
    texts = [json.loads(piece.body)["outputs"]["generated_text"] for piece in pieces]
    assert texts == ["a", " ", "→", " ", "b", ""]


def test_a_stop_string_ends_the_answer_before_it() -> None:
    session, runtime = chatting("one. two. three.")
    pieces = ask(session, chat(max_tokens=40, stop=[". t", "zzz"], stream=True))
    text = "".join(json.loads(piece.body)["choices"][0]["delta"].get("content", "") for piece in pieces)
    assert text == "one"
    assert json.loads(pieces[-1].body)["choices"][0]["finish_reason"] == "stop"
    assert pieces[-1].tokens_out == len("one. t")
    assert len(runtime.started) == 1


def test_askers_who_come_later_do_not_wait_for_those_before() -> None:
    session, _ = chatting("x" * 40)
    session.submit(1, request_of(chat(max_tokens=40, stream=True)))
    for _ in range(5):
        session.step()
    session.submit(2, request_of(chat(max_tokens=3, stream=True)))
    tickets = [[piece.ticket for piece in session.step()] for _ in range(4)]
    assert tickets == [[1, 2], [1, 2], [1, 2], [1]]


def test_in_each_step_one_newcomer_computes_his_prompt() -> None:
    session, runtime = chatting("x" * 40)
    for ticket in range(3):
        session.submit(ticket, request_of(chat(max_tokens=40)))
    begun = []
    for _ in range(3):
        session.step()
        begun.append(len(runtime.running))
    assert begun == [1, 2, 3]


def test_a_long_prompt_is_computed_in_parts_while_others_go_on() -> None:
    session, runtime = chatting("x" * 40)
    session.submit(1, request_of(chat(max_tokens=40, stream=True)))
    session.step()
    runtime.parts = 3
    session.submit(2, request_of(chat(max_tokens=1, stream=True)))
    session.submit(3, request_of(chat(max_tokens=1, stream=True)))
    tickets = [[piece.ticket for piece in session.step()] for _ in range(6)]
    assert tickets == [[1], [1], [1, 2], [1], [1], [1, 3]]


def test_a_cancelled_answer_frees_its_slot_at_once() -> None:
    session, _ = chatting("x" * 40, slots=1)
    session.submit(1, request_of(chat(max_tokens=40)))
    session.step()
    assert session.room == 0
    assert session.cancel(1)
    assert (session.room, session.busy, session.step()) == (1, False, [])


def test_a_model_that_fails_on_one_answer_goes_on_with_the_others() -> None:
    session, runtime = chatting("abc")
    runtime.end_tokens = frozenset()
    session.submit(1, request_of(chat(max_tokens=20)))
    session.submit(2, request_of(chat(max_tokens=4)))
    failed = run(session, 1)[-1]
    assert failed.code == "model_failed"
    session.submit(3, request_of(chat(max_tokens=2)))
    assert run(session, 3)[-1].code == ""


def test_the_cost_is_known_before_anything_runs() -> None:
    session, runtime = chatting()
    prompt = len(TOKENS.encode(f"<|user|>hi{END}<|assistant|>").ids)
    assert session.count(request_of(chat(max_tokens=7))) == (prompt, 7)
    assert session.count(request_of({"inputs": ["hi", "hi there"]})) == (prompt + 6, session.default_max_tokens)
    assert session.default_max_tokens == 32
    assert session.extra_tokens == prompt - 2
    assert runtime.started == []


def test_what_does_not_fit_the_context_is_refused_whole() -> None:
    session, runtime = chatting(chat=False)
    with pytest.raises(RequestError) as caught:
        session.submit(1, request_of({"inputs": "x" * 120, "parameters": {"max_new_tokens": 9}}))
    assert caught.value.code == "too_large"
    assert caught.value.message == "120 tokens or more and 9 to generate are over the model's 128"
    assert runtime.started == []
    session.submit(1, request_of({"inputs": "x" * 120, "parameters": {"max_new_tokens": 8}}))
    assert len(runtime.started) == 1


def test_an_empty_text_is_refused_where_nothing_is_put_around_it() -> None:
    session, _ = chatting(chat=False)
    with pytest.raises(RequestError, match="no tokens"):
        session.submit(1, request_of({"inputs": ""}))
