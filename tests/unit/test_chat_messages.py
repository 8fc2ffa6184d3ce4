"""What a caller sends to a chat template: messages of text and parts, tools, variables, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from kvik.errors import InvalidInput
from kvik.text.chat_messages import check_messages, check_template_vars, check_tools
from kvik.text.chat_template import ChatTemplate
from template_families import CALLS, FAMILIES, RESULTS, TOOLS, USER
from templates import template

PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]

BOTH = """\
{% for message in messages %}<{{ message.role }}>{% if message.content is string %}{{ message.content }}{% else %}
{% for part in message.content %}{% if part.type == 'text' %}{{ '[' + part.text + ']' }}{% endif %}{% endfor %}
{% endif %}{% endfor %}"""
PARTS_ALONE = """\
{% for message in messages %}<{{ message.role }}>{#- #}
{%- for part in message.content %}{% if part.type == 'text' %}{{ '[' + part.text + ']' }}{% endif %}{% endfor %}
{% endfor %}"""
BY_ROLE = """\
{% for message in messages %}<{{ message.role }}>{% if message.role == 'user' %}
{% for part in message.content %}{{ '[' + part['text'] + ']' }}{% endfor %}
{% else %}{{ message.content | trim }}{% endif %}{% endfor %}"""
TEXT_KEY_ALONE = "{% for message in messages %}{{ message.content | trim }}{{ message.text }}{% endfor %}"


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"gemma"}))
def test_parts_are_joined_for_a_template_that_takes_text(name: str) -> None:
    chat = template(FAMILIES[name])
    assert chat.render(user(PARTS)) == chat.render(user("one\ntwo"))
    assert chat.render(user(PARTS[:1])) == chat.render(user("one"))


def test_parts_reach_a_template_that_goes_through_them_where_it_does() -> None:
    chat = template(FAMILIES["gemma"])
    assert chat.render(user(PARTS)) == "<s><turn>user\nonetwo</turn>\n<turn>model\n"
    with_system = [{"role": "system", "content": PARTS}, *user(PARTS)]
    assert chat.render(with_system) == "<s><turn>user\none\ntwo\n\nonetwo</turn>\n<turn>model\n"


@pytest.mark.parametrize(
    ("source", "content", "text"),
    [
        (BOTH, PARTS, "<user>[one][two]"),
        (BOTH, "one", "<user>one"),
        (PARTS_ALONE, PARTS, "<user>[one][two]"),
        (PARTS_ALONE, "one", "<user>[one]"),
        (TEXT_KEY_ALONE, PARTS, "one\ntwo"),
        (TEXT_KEY_ALONE, "one", "one"),
        ("{{ messages[0].content }}", PARTS, "one\ntwo"),
        ("{{ messages[0].content | tojson }}", PARTS, '"one\\ntwo"'),
        ("{{ messages[0]['content'] + '!' }}", PARTS, "one\ntwo!"),
    ],
)
def test_a_template_gets_the_form_of_content_that_it_takes(source: str, content: Any, text: str) -> None:
    assert template(source).render(user(content)) == text


def test_each_role_has_a_form_of_its_own() -> None:
    messages = [*user(PARTS), {"role": "assistant", "content": PARTS}, *user("three")]
    assert template(BY_ROLE).render(messages) == "<user>[one][two]<assistant>one\ntwo<user>[three]"


def test_the_form_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = template(BOTH)
    first = chat.render(user(PARTS))
    monkeypatch.setattr(ChatTemplate, "_writes", None)
    assert chat.render(user(PARTS)) == first


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "user", "content": 5}, r"messages\[1\] has no 'content' of text or parts"),
        ({"role": "user", "content": b"a"}, r"messages\[1\] has no 'content'"),
        ({"role": "user", "content": []}, r"messages\[1\]\.content has no parts"),
        ({"role": "user", "content": ["a"]}, r"messages\[1\]\.content\[0\] is not a part with a 'type'"),
        ({"role": "user", "content": [{"text": "a"}]}, r"messages\[1\]\.content\[0\] is not a part"),
        ({"role": "user", "content": [PARTS[0], {"type": "text"}]}, r"messages\[1\]\.content\[1\] has no 'text'"),
        (
            {"role": "user", "content": [PARTS[0], {"type": "image_url", "image_url": {"url": "x"}}]},
            r"messages\[1\]\.content\[1\] has unsupported content, 'image_url'",
        ),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "unsupported content, 'input_audio'"),
        ({"role": "tool", "content": "a", "tool_call_id": 7}, r"messages\[1\] has no 'tool_call_id' of text"),
        ({"role": "user", "content": "a", "name": ["b"]}, r"messages\[1\] has no 'name' of text"),
        ({"role": "assistant", "tool_calls": "x"}, r"messages\[1\]\.tool_calls is str, not a list"),
        ({"role": "assistant", "tool_calls": [3]}, r"messages\[1\]\.tool_calls\[0\] has no 'function' object"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, r"tool_calls\[0\]\.function\.name is None"),
        (
            {"role": "assistant", "tool_calls": [{"type": "x", "function": {"name": "f"}}]},
            r"tool_calls\[0\] has a 'type'",
        ),
        ({"role": "assistant", "tool_calls": [{"id": 1, "function": {"name": "f"}}]}, r"tool_calls\[0\] has a 'type'"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            r"tool_calls\[0\]\.function\.arguments is not JSON: '\{'",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
            r"tool_calls\[0\]\.function\.arguments is list, not an object",
        ),
    ],
)
def test_a_message_that_is_none_is_refused_by_its_place(message: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInput, match=said) as caught:
        check_messages([USER, message])
    assert caught.value.hint


def test_arguments_of_a_call_come_as_json_or_as_an_object() -> None:
    as_text: list[dict[str, Any]] = [
        CALLS[0] | {"function": {"name": "weather", "arguments": '{"city": "京都", "days": 2}'}}
    ]
    as_text += [CALLS[1] | {"function": {"name": "clock", "arguments": ""}}]
    chats: list[list[dict[str, Any]]] = [
        [USER, {"role": "assistant", "content": None, "tool_calls": calls}, *RESULTS] for calls in (as_text, CALLS)
    ]
    chat = template(FAMILIES["qwen2.5"])
    assert chat.render(chats[0], tools=TOOLS) == chat.render(chats[1], tools=TOOLS)
    assert as_text[0]["function"]["arguments"].startswith("{"), "what the caller gave is not changed"


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        ("weather", "tools is 'weather'"),
        ({"type": "function"}, r"tools is \{'type'"),
        (["weather"], r"tools\[0\] is str, not an object"),
        ([TOOLS[0], {"function": {"name": "f"}}], r"tools\[1\]\.type is None, not 'function'"),
        ([{"type": "retrieval"}], r"tools\[0\]\.type is 'retrieval'"),
        ([{"type": "function", "name": "f"}], r"tools\[0\]\.function is NoneType, not an object"),
        ([{"type": "function", "function": {"description": "x"}}], r"tools\[0\]\.function\.name is None"),
        ([{"type": "function", "function": {"name": ""}}], r"tools\[0\]\.function\.name is ''"),
        (
            [{"type": "function", "function": {"name": "f", "parameters": []}}],
            r"tools\[0\]\.function\.parameters is no",
        ),
    ],
)
def test_a_tool_that_is_none_is_refused_by_its_place(tools: Any, said: str) -> None:
    with pytest.raises(InvalidInput, match=said) as caught:
        check_tools(tools)
    assert caught.value.hint


def test_a_function_needs_no_parameters() -> None:
    for function in ({"name": "f"}, {"name": "f", "parameters": None}):
        tools = [{"type": "function", "function": function}]
        assert check_tools(tools) == tools


@pytest.mark.parametrize(
    ("template_vars", "said"),
    [
        ([("a", 1)], "template_vars is "),
        ({1: 2}, "template_vars has 1, which is not a variable"),
        ({"a b": 2}, "template_vars has 'a b', which is not a variable"),
        *(({name: 1}, f"template_vars has '{name}', which is not the caller's") for name in
          ("messages", "tools", "add_generation_prompt", "chat_template", "bos_token", "eos_token", "raise_exception")),
    ],
)  # fmt: skip
def test_a_variable_that_is_not_the_callers_is_refused_by_name(template_vars: Any, said: str) -> None:
    with pytest.raises(InvalidInput, match=said) as caught:
        check_template_vars(template_vars)
    assert caught.value.hint


def test_a_request_ignores_nothing() -> None:
    with pytest.raises(InvalidInput, match=r"model\.gguf: the chat template takes no tools"):
        template(FAMILIES["phi3"]).render_request([USER], tools=TOOLS)
    with pytest.raises(InvalidInput, match="has no variable 'enable_thinkin'"):
        template(FAMILIES["smollm3"]).render_request([USER], template_vars={"enable_thinkin": False})
    with pytest.raises(InvalidInput, match="hold what JSON cannot"):
        template(FAMILIES["smollm3"]).render_request([USER], template_vars={"enable_thinking": float("nan")})
    special = ChatTemplate(
        "{{ image_token }}", bos_token="", eos_token="", name="m", more_tokens={"image_token": "<i>"}
    )
    with pytest.raises(InvalidInput, match="has 'image_token', which is the model's own"):
        special.render_request([USER], template_vars={"image_token": "x"})


@pytest.mark.parametrize("name", ["llama3", "qwen2.5", "qwen3", "smollm3"])
def test_a_request_with_tools_and_variables_reaches_the_template(name: str) -> None:
    chat = template(FAMILIES[name])
    assert chat.render_request([USER], tools=TOOLS) == chat.render([USER], tools=TOOLS) != chat.render([USER])


def test_a_template_for_tools_is_known_to_take_them() -> None:
    for_tools = template("{{ tools | length }}{{ mode }}")
    chat = ChatTemplate("x", bos_token="", eos_token="", name="m", for_tools=for_tools)
    assert chat.render_request([USER], tools=TOOLS, template_vars={"mode": "a"}) == "2a"
