"""Messages into a prompt by a template in a sandbox."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from models.artifact import Artifact
from models.errors import ModelError, RequestError
from models.generation import chat
from models.generation.chat import ChatTemplate, Message, load_template, parse_messages
from tests.fakes.generation import TEMPLATE

HELLO = [Message("system", "be brief"), Message("user", "hello")]


def test_a_template_writes_turns_and_asks_for_the_next() -> None:
    prompt = ChatTemplate(TEMPLATE, {"eos_token": "</s>"}).render(HELLO)
    assert prompt == "<|system|>be brief</s><|user|>hello</s><|assistant|>"


def test_what_templates_of_the_hub_use_is_there() -> None:
    source = """
    {%- for message in messages %}
        {%- if message['role'] == 'system' %}{% continue %}{% endif %}
        {{- message | tojson }}{{ message['content'] | trim }}
    {%- endfor %}{{ strftime_now('%Y')[:2] }}"""
    assert ChatTemplate(source, {}).render(HELLO) == '{"role":"user","content":"hello"}hello20'


def test_a_template_may_refuse_messages_in_its_own_words() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(RequestError, match="messages: roles must alternate") as caught:
        template.render(HELLO)
    assert caught.value.code == "bad_request"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{ messages[99].content.x }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source: str) -> None:
    with pytest.raises(RequestError):
        ChatTemplate(source, {}).render(HELLO)


def test_a_template_that_is_none_is_the_models_fault() -> None:
    with pytest.raises(ModelError, match="Jinja"):
        ChatTemplate("{% for %}", {})


@pytest.mark.parametrize(
    "template",
    ["{{ eos_token }}", [{"name": "tools", "template": "x"}, {"name": "default", "template": "{{ eos_token }}"}]],
)
def test_a_template_is_found_in_the_tokenizers_configuration(tmp_path: Path, template: object) -> None:
    config = {"chat_template": template, "eos_token": {"content": "</s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with Artifact(tmp_path, ["tokenizer_config.json"]) as artifact:
        found = load_template(artifact)
    assert found is not None
    assert found.render(HELLO) == "</s>"


def test_a_template_in_its_own_file_goes_first_and_none_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("own")
    with Artifact(tmp_path, ["chat_template.jinja"]) as artifact:
        found = load_template(artifact)
        assert found is not None
        assert found.render(HELLO) == "own"
    with Artifact(tmp_path, []) as artifact:
        assert load_template(artifact) is None


def test_texts_in_parts_and_developers_are_read() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    read = parse_messages([{"role": "developer", "content": "x"}, {"role": "user", "content": parts}])
    assert read == [Message("system", "x"), Message("user", "ab")]


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages:"),
        ("hello", "messages:"),
        ([1], "messages[0]:"),
        ([{"role": "robot", "content": "x"}], "messages[0].role:"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role:"),
        ([{"role": "user"}], "messages[0].content:"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]:"),
        ([{"role": "assistant", "content": "", "tool_calls": [1]}], "messages[0].tool_calls[0].function:"),
    ],
)
def test_wrong_messages_are_refused_by_their_field(messages: object, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_messages(messages)
    assert caught.value.message.startswith(field)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro twice(n) %}{{ twice(n + 1) if n < 40 }}{{ twice(n + 1) if n < 40 }}{% endmacro %}{{ twice(0) }}",
    ],
)
def test_a_template_without_an_end_is_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_RENDER_S", 0.1)
    with pytest.raises(RequestError, match="takes too long"):
        ChatTemplate(source, {}).render([Message("user", "x")])


@pytest.mark.parametrize(
    "source",
    ["{{ 9 ** 9 ** 9 }}", "{{ 'x' * 99999999 }}", "{{ [0] * 99999999 }}", "{{ ''.__class__.__mro__ }}",
     "{{ messages.append(1) }}", "{{ messages[0].__init__.__globals__ }}",
     "{% for n in range(9999999) %}{% endfor %}",
     "{% for a in range(99) recursive %}{{ loop(range(99)) }}{% endfor %}"],
)  # fmt: skip
def test_a_template_that_reaches_out_is_refused(source: str) -> None:
    with pytest.raises(RequestError, match="the model's template refuses them"):
        ChatTemplate(source, {}).render([Message("user", "x")])


def test_a_loop_still_sees_its_own_variables() -> None:
    source = "{% for m in messages if m.role != 'system' %}{{ loop.index }}{{ m.content }}{% else %}none{% endfor %}"
    assert ChatTemplate(source, {}).render([Message("system", "s"), Message("user", "x")]) == "1x"
    assert ChatTemplate(source, {}).render([Message("system", "s")]) == "none"


def test_tools_calls_and_answers_reach_the_template() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": "ls"}'}}
    messages = parse_messages([
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "name": "look", "content": "found"},
    ])  # fmt: skip
    source = (
        "{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls[0].function.arguments.at }}"
        "{% elif m.tool_call_id %}{{ m.name }}{{ m.content }}{% endif %}{% endfor %}"
    )
    assert ChatTemplate(source, {}).render(messages) == "lslookfound"


def test_every_text_of_a_message_can_be_changed() -> None:
    call = {"function": {"name": "a", "arguments": {"a": ["a", 1, None]}}}
    message = Message("user", "a", name="a", tool_calls=[call]).mapped(lambda text: text.replace("a", "b"))
    assert (message.role, message.content, message.name) == ("user", "b", "b")
    assert message.tool_calls == [{"function": {"nbme": "b", "brguments": {"b": ["b", 1, None]}}}]
