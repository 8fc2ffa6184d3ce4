"""Chat templates against Jinja2 set up as transformers does, and against templates that mean harm."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from datetime import datetime
from types import MappingProxyType
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvik.errors import InvalidInput, TemplateError
from kvik.text.chat_template import ChatTemplate
from template_families import CONVERSATIONS as FAMILY_CONVERSATIONS
from template_families import FAMILIES
from templates import USER, ask, template
from tiers import examples

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "inst": """{% if messages[0]['role'] == 'system' %}
    {% set loop_messages = messages[1:] %}
    {% set system_message = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
{% else %}
    {% set loop_messages = messages %}
    {% set system_message = '' %}
{% endif %}
{% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% set content = system_message + message['content'] if loop.index0 == 0 else message['content'] %}
    {% if message['role'] == 'user' %}
        {{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}
    {% elif message['role'] == 'assistant' %}
        {{ ' ' + content | trim + ' ' + eos_token }}
    {% endif %}
{% endfor %}""",
    "headers and tools": """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|header|>system<|/header|>\\n\\nToday: " + date_string + "\\n" }}
{%- if tools is not none %}
    {{- "Tools:\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
    {{- tools | tojson }}
{%- endif %}
{{- system_message ~ "<|eot|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|header|>' + message['role'] + '<|/header|>\\n\\n'+ message['content'] | trim + '<|eot|>' }}
    {%- elif message.tool_calls %}
        {%- for call in message.tool_calls %}
            {%- set f = call.function if call.function is defined else call %}
            {{- '{"name": "' + f.name + '", "parameters": ' }}{{ f.arguments | tojson }}{{- "}" }}
            {%- for name, value in f.arguments.items() %}
                {{- " " ~ name ~ "=" ~ value ~ ("" if loop.last else ",") }}
            {%- endfor %}
        {%- endfor %}
    {%- elif message.content is mapping or message.content is iterable %}
        {{- message.content | tojson }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|header|>assistant<|/header|>\\n\\n' }}
{%- endif %}""",
    "thinking": """{%- if tools %}
    {{- '# Tools\\n' }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1, seen=[]) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(
            message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
        {%- set ns.seen = ns.seen + [message.role] %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.get('reasoning') is string %}
            {%- set reasoning = message.reasoning %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning) %}
            {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
    {%- else %}
        {{- message.role.upper() ~ ':' ~ content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{{- ns.seen | join(', ') }}
{%- if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}
    {{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}""",
    "macro": """{%- macro describe(spec, depth=0) -%}
    {%- for key, value in spec | dictsort %}
{{ '  ' * depth }}{{ key }}:
        {%- if value is mapping %}{{ describe(value, depth + 1) }}
        {%- elif value is string %} {{ value | upper | replace('E', '3') }}
        {%- elif value is sequence %} [{{ value | map('string') | list | join('|') }}]
        {%- elif value is boolean %} {{ 'yes' if value else 'no' }}
        {%- elif value is none %} null
        {%- else %} {{ '%05.1f' % value }} {{ value // 2 }} {{ value % 3 }}
        {%- endif %}
    {%- endfor %}
{%- endmacro -%}
{% for tool in tools or [] %}{{ describe(tool) }}{% endfor %}
{% for message in messages if message.role != 'system' %}
{% generation %}{{ message.role | capitalize }}: {{ message['content'] | trim }}{% endgeneration %}

{% else %}
nobody spoke
{% endfor %}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{- messages | map(attribute='role') | join('/') }}
{{ messages | rejectattr('role', 'equalto', 'user') | map(attribute='content') | first | default('none', true) }}""",
    "everything odd": """{# a comment #}
{%- set items = {'a': 1, 'b': none, "c": [True, false, 1.0, -2, 1e30]} -%}
{{ items }} {{ items.b }} {{ items['c'] }} {{ nothing }} {{ nothing is defined }} {{ nothing is undefined }} {{ None }}
{% for key, value in items.items() %}{{ loop.index }}{{ loop.cycle('x', 'y') }}{{ key }}={{ value }};{% endfor %}

{% for number in range(10) %}
    {% if number == 2 %}{% continue %}{% endif %}
    {% if number == 4 %}{% break %}{% endif %}
{{ number }}{{ "," if not loop.last }}
{% endfor %}
{{ '%s is %d' % (messages[-1].content, 3) }} {{ '{} {!r}'.format('a', 'b') }} {{ "<b>&'\\"" }} {{ "x" | e }}
{{ messages[0].content[:3] ~ messages[0].content[::-1] }} {{ messages[0]['content'] | length }} {{ 'a' in 'cat' }}
{{ {'k': messages[0].content, 'n': none, 'é': 'ø<>&\\u2028'} | tojson }} {{ [1, 2] | tojson(indent=2) }}
{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':'), ensure_ascii=true) }} {{ ' a b '.split() }}
{{ 7 / 2 }} {{ 7 // 2 }} {{ 2 ** 10 }} {{ 10 | float }} {{ '3' | int + 1 }} {{ [3, 1] | sort }} {{ [1, 2, 3] | sum }}
{{ messages[0].role.title() }} {{ messages[0].get('missing', 'x') }} {{ messages[0].missing is none }} {{ dict(a=1) }}
{%- set block %} {{ messages | length }} said {% endset %}
{{ block | trim | indent(2) }} {{ (1, 'a') }} {{ 'abc' | list }} {{ "line\\n" | replace("\\n", "|") }}
    {%- if messages[0].content is string and messages is iterable and messages is not mapping %} yes {% endif -%}
    {{ documents }} {{ tools is none }} {{ add_generation_prompt }} {{ true and 'last' or 'not' }} {{ not none }}
   {% filter upper %}filtered {{ bos_token }}{% endfilter %}
{{ "a" if false }}|{{ namespace(x=1).x }}|{{ cycler('o', 'e').next() }}|{{ [] | first is undefined }}
""",
}

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather <b>\"now\"</b> & 'later' på Ærø",
        "parameters": {"type": "object", "properties": {"days": {"type": ["integer", "null"], "default": 3.5}}},
        "strict": True,
        "none": None,
    },
}
SYSTEM = {"role": "system", "content": "  You are <kind> & 'brief'.\n"}
ANSWER = {"role": "assistant", "content": "<think>\nhm\n</think>\n\n 2\r\n\tok"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "weather", "arguments": {"days": 2, "place": "Ærø", "deep": [None, True]}}}],
}
RESULT = {"role": "tool", "content": '{"t": 21.5}', "name": "weather"}
EMPTY = {"role": "user", "content": ""}

CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "one": ([USER], {}),
    "system": ([SYSTEM, USER], {}),
    "turns": ([SYSTEM, USER, ANSWER, USER, ANSWER, EMPTY], {}),
    "closed": ([USER, ANSWER], {"add_generation_prompt": False}),
    "tools": ([SYSTEM, USER], {"tools": [WEATHER, WEATHER]}),
    "calls": ([USER, CALL, RESULT, ANSWER], {"tools": [WEATHER]}),
    "wrong order": ([ANSWER, USER, USER], {}),
    "empty": ([EMPTY], {"enable_thinking": False, "date_string": "1 Jan 2026"}),
    "unknown role": ([{"role": "critic", "content": "\\n{% raw %}"}], {"tools": []}),
}


def oracle(source: str) -> jinja2.Template:
    """Jinja2 with what transformers adds to it."""

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return CallBlock(self.call_method("_caller"), [], [], body).set_lineno(line)

        def _caller(self, caller: Any) -> Any:
            return caller()

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False} | options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


@pytest.fixture(scope="module")
def templates() -> dict[str, ChatTemplate]:
    return {name: template(source) for name, source in TEMPLATES.items()}


# the same bytes as transformers


def assert_same(
    rendered: ChatTemplate, reference: jinja2.Template, messages: list[dict[str, Any]], options: dict[str, Any]
) -> bool:
    """Whether there was a text to be the same: a refusal must be the same, too."""
    messages_there = [{key: value for key, value in message.items() if value is not None} for message in messages]
    context = {"add_generation_prompt": True, "tools": None, "documents": None} | options
    expected = reason = None
    try:
        expected = reference.render(messages=messages_there, bos_token="<s>", eos_token="</s>", **context)
    except (jinja2.TemplateError, TypeError) as error:
        reason = str(error)
    if reason is None:
        assert rendered.render(messages, **options) == expected
    else:
        with pytest.raises(TemplateError, match=re.escape(reason)):
            rendered.render(messages, **options)
    return reason is None


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_rendering_equals_transformers(templates: dict[str, ChatTemplate], name: str, conversation: str) -> None:
    messages, options = CONVERSATIONS[conversation]
    assert_same(templates[name], oracle(TEMPLATES[name]), messages, options)


@pytest.mark.parametrize("name", FAMILIES)
def test_rendering_in_the_manner_of_a_family_equals_transformers(name: str) -> None:
    rendered, reference = template(FAMILIES[name]), oracle(FAMILIES[name])
    num_texts = 0
    for messages, options in FAMILY_CONVERSATIONS.values():
        num_texts += assert_same(rendered, reference, messages, options)
    assert num_texts >= len(FAMILY_CONVERSATIONS) // 2


@pytest.mark.parametrize("name", TEMPLATES)
@given(contents=st.lists(st.text(max_size=30), min_size=1, max_size=4))
@settings(max_examples=examples(40))
def test_rendering_any_text_equals_transformers(
    templates: dict[str, ChatTemplate], name: str, contents: list[str]
) -> None:
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    assert_same(templates[name], oracle(TEMPLATES[name]), messages, {})


def test_nothing_is_escaped_and_half_surrogates_pass(templates: dict[str, ChatTemplate]) -> None:
    content = '<a href="x">&amp;\'\ud83d'
    assert content in templates["chatml"].render([{"role": "user", "content": content}])


def test_variables_reach_the_template() -> None:
    assert ask("{{ enable_thinking }}{{ bos_token }}{{ extra.a[0] }}", enable_thinking=False, extra={"a": (1,)}) == (
        "False<s>1"
    )


def test_any_mapping_and_sequence_will_do() -> None:
    messages = (MappingProxyType({"role": "user", "content": "a"}), OrderedDict(role="user", content="b"))
    assert ask("{% for m in messages %}{{ m.content }}{% endfor %}", messages) == "ab"


# what the caller sends


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one"),
        ("hello", "must be a list"),
        ({"role": "user", "content": "a"}, "must be a list"),
        ([USER, "hello"], r"messages\[1\] is str"),
        ([USER, {"content": "a"}], r"messages\[1\] has no 'role'"),
        ([{"role": "user"}], r"messages\[0\] has no 'content'"),
        ([{"role": "user", "content": None}], r"messages\[0\] has no 'content'"),
        ([{"role": 1, "content": "a"}], "'role' of text"),
        ([USER | {"extra": object()}], "a object"),
        ([USER | {"extra": b"bytes"}], "a bytes"),
    ],
)
def test_messages_that_are_none_are_refused_by_their_index(messages: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        ask("x", messages)


def test_a_message_with_calls_needs_no_content_and_keys_of_none_are_left_out() -> None:
    calls = {"role": "assistant", "content": None, "tool_calls": [CALL["tool_calls"][0]], "name": None}
    assert ask("{{ messages[0] }}", [calls]) == str({"role": "assistant", "tool_calls": CALL["tool_calls"]})
    with pytest.raises(InvalidInput, match="no 'content'"):
        ask("x", [calls | {"tool_calls": []}])


def test_variables_that_contain_themselves_are_refused() -> None:
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(InvalidInput, match="JSON"):
        ask("x", extra=circle)


# templates that fail


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles: ' ~ messages[0].role) }}", "refuses the messages: roles: user"),
        ("a\n{% if %}", "not valid Jinja: line 2: "),
        ("{% for %}{{", "not valid Jinja"),
        ("{{ messages[7].role.x }}", "failed: UndefinedError"),
        ("{{ missing.x }}", "'missing' is undefined"),
        ("{{ none | length }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% include 'other' %}", "failed"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "RecursionError"),
        ("{{ " + "(" * 3000 + ")" * 3000 + " }}", "failed"),
        ("{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "SyntaxError"),
    ],
)
def test_a_template_that_fails_is_a_template_error_with_its_reason(source: str, message: str) -> None:
    with pytest.raises(TemplateError) as caught:
        ask(source)
    assert caught.value.message.startswith("model.gguf: the chat template ")
    assert message in caught.value.message
    assert caught.value.hint


def test_an_error_does_not_spoil_the_next_rendering() -> None:
    picky = template("{{ raise_exception('no') if messages | length > 1 else messages[0].content }}")
    for _ in range(2):
        with pytest.raises(TemplateError, match="no"):
            picky.render([USER, USER])
        assert picky.render([USER]) == USER["content"]
