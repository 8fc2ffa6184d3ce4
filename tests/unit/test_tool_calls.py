"""Tool calls of every supported family: found in the template, forced by the grammar, told from the text."""

# ruff: noqa: RUF001 (the bars in the names of DeepSeek's tokens are wide ones)

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer
from llguidance._tokenizer import TokenizerWrapper

from kvik.engine.output import TextStream
from kvik.errors import InvalidInput, ToolsNotSupported
from kvik.text.answer_events import ArgumentsDelta, CallBegin, CallEnd, TextDelta, ToolEvent
from kvik.text.chat_template import ChatTemplate
from kvik.text.grammar import MAX_GRAMMAR_BYTES
from kvik.text.tokenizer import Tokenizer
from kvik.text.tool_calls import ToolCallParser
from kvik.text.tool_detection import detect_tool_format
from kvik.text.tool_format import MAX_SCHEMA_BYTES, MAX_SCHEMA_OBJECTS, MAX_TOOLS, Named, ToolFormat
from tiers import examples
from tool_templates import COUNTED, REFUSED, SUPPORTED, make

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'The weather, "now" or later } // # \n %json',
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
WEATHER_MAP = {"type": "function", "function": {"name": "weather_map", "parameters": None}}
TOOLS = [WEATHER, WEATHER_MAP]

CITY = '{"city": "Å\\"}</tool_call>{", "days": 3}'
EMPTY = "{}"
IDS = ("abcdefgh1", "abcdefgh2")
ASK = {"role": "user", "content": "How is the weather?"}

W, M = ("weather", CITY), ("weather_map", EMPTY)
HERMES = '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>'
V31 = "<｜tool▁call▁begin｜>%s<｜tool▁sep｜>%s<｜tool▁call▁end｜>"
R1 = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>%s\n```json\n%s\n```<｜tool▁call▁end｜>"
LLAMA = '{"name": "%s", "parameters": %s}'
NEMO = '{"name": "%s", "arguments": %s, "id": "%s"}'
SMALL = "[TOOL_CALLS]%s[CALL_ID]%s[ARGS]%s"
HARMONY = " to=functions.%s<|channel|>commentary json<|message|>%s"
ACTION = '{"tool_call_id": "0", "tool_name": "%s", "parameters": %s}'
CODER = "<tool_call>\n<function=%s>\n%s</function>\n</tool_call>"
CODER_CITY = '<parameter=city>\nÅ"}</tool_call>{\n</parameter>\n<parameter=days>\n3\n</parameter>\n'
GLM = "<tool_call>%s\n%s</tool_call>"
GLM_PAIR = "<arg_key>%s</arg_key>\n<arg_value>%s</arg_value>\n"
GLM_CITY = GLM_PAIR % ("city", 'Å"}</tool_call>{') + GLM_PAIR % ("days", 3)
INVOKE = '<invoke name="%s">\n%s</invoke>\n'
INVOKE_CITY = '<parameter name="city">Å"}</tool_call>{</parameter>\n<parameter name="days">3</parameter>\n'
PYTHON_CITY = 'weather(city="Å\\"}</tool_call>{", days=3)'
GEMMA_CITY = '<|tool_call>call:weather{city:<|"|>Å"}</tool_call>{<|"|>,days:3}<tool_call|>'
COMPACT = CITY.replace('", "', '","').replace(": ", ":")

# What each family writes for one call and for two, and None where it writes no second one.
ANSWERS: dict[str, tuple[str, str | None]] = {
    **dict.fromkeys(("hermes", "qwen2.5", "qwen3", "granite"), (HERMES % W, HERMES % W + "\n" + HERMES % M)),
    **dict.fromkeys(("llama3.1", "llama3.2", "llama3.3"), (LLAMA % W, None)),
    "mistral nemo": (
        f"[TOOL_CALLS][{NEMO % (*W, IDS[0])}]",
        f"[TOOL_CALLS][{NEMO % (*W, IDS[0])}, {NEMO % (*M, IDS[1])}]",
    ),
    "mistral small 3.2": (
        SMALL % ("weather", IDS[0], CITY),
        SMALL % ("weather", IDS[0], CITY) + SMALL % ("weather_map", IDS[1], EMPTY),
    ),
    "deepseek v3.1": (
        f"<｜tool▁calls▁begin｜>{V31 % W}<｜tool▁calls▁end｜>",
        f"<｜tool▁calls▁begin｜>{V31 % W}{V31 % M}<｜tool▁calls▁end｜>",
    ),
    "deepseek r1 distill": (
        f"<｜tool▁calls▁begin｜>{R1 % W}<｜tool▁calls▁end｜>",
        f"<｜tool▁calls▁begin｜>{R1 % W}\n{R1 % M}<｜tool▁calls▁end｜>",
    ),
    "gpt-oss": (HARMONY % W, None),
    "function tags": (
        f"<function=weather>{CITY}</function>",
        f"<function=weather>{CITY}</function><function=weather_map>{EMPTY}</function>",
    ),
    "tags of text": (
        f'<TOOLCALL>[{{"name": "weather", "arguments": {CITY}}}]</TOOLCALL>',
        f'<TOOLCALL>[{{"name": "weather", "arguments": {CITY}}}, {{"name": "weather_map", "arguments": {EMPTY}}}]'
        "</TOOLCALL>",
    ),
    "thought before calls": (
        f"<|START_ACTION|>[\n    {ACTION % W}\n]<|END_ACTION|>",
        f"<|START_ACTION|>[\n    {ACTION % W},\n    {ACTION % M}\n]<|END_ACTION|>",
    ),
    "qwen3-coder": (
        CODER % ("weather", CODER_CITY),
        CODER % ("weather", CODER_CITY) + "\n" + CODER % ("weather_map", ""),
    ),
    "glm-4.5": (
        "\n" + GLM % ("weather", GLM_CITY),
        "\n" + GLM % ("weather", GLM_CITY) + "\n" + GLM % ("weather_map", ""),
    ),
    "minimax": (
        f"<mm:tool_call>\n{INVOKE % ('weather', INVOKE_CITY)}</mm:tool_call>",
        f"<mm:tool_call>\n{INVOKE % ('weather', INVOKE_CITY)}{INVOKE % ('weather_map', '')}</mm:tool_call>",
    ),
    "llama 4, as python": (f"[{PYTHON_CITY}]", f"[{PYTHON_CITY}, weather_map()]"),
    "lfm2": (
        f"<|tool_call_start|>[{PYTHON_CITY}]<|tool_call_end|>",
        f"<|tool_call_start|>[{PYTHON_CITY}, weather_map()]<|tool_call_end|>",
    ),
    "gemma 4": (GEMMA_CITY, GEMMA_CITY + "<|tool_call>call:weather_map{}<tool_call|>"),
    "compact json": (
        f"<tool_call>weather\n{COMPACT}</tool_call>",
        f"<tool_call>weather\n{COMPACT}</tool_call><tool_call>weather_map\n{EMPTY}</tool_call>",
    ),
}
TEXT_ARGUMENTS = ("deepseek v3.1", "deepseek r1 distill")

every_family = pytest.mark.parametrize("name", SUPPORTED)


@dataclass(frozen=True)
class Family:
    template: ChatTemplate
    tokenizer: Tokenizer
    format: ToolFormat
    guide: LLTokenizer

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special=False)

    def accepts(self, grammar: str | None, answer: str | Sequence[int], *, whole: bool = True) -> bool:
        """Whether the grammar takes the answer, and then may end (`whole`)."""
        assert grammar is not None
        matcher = LLMatcher(self.guide, grammar)
        assert not matcher.is_error(), matcher.get_error()
        ids = self.ids(answer) if isinstance(answer, str) else answer
        return matcher.try_consume_tokens(list(ids)) == len(ids) and (matcher.is_accepting() or not whole)


class _Guided:
    """A tokenizer as llguidance wants one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id = min(tokenizer.eos_token_ids)
        self.bos_token_id = None
        self.tokens = [tokenizer.token_bytes(i, skip_special=False) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_token_ids)

    def __call__(self, text: bytes) -> list[int]:
        return []


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    @cache
    def made(name: str) -> Family:
        template, tokenizer = make(tmp_path_factory.mktemp("tokenizer"), SUPPORTED[name])
        ends = sorted(tokenizer.eos_token_ids)
        guide = LLTokenizer(TokenizerWrapper(_Guided(tokenizer)), eos_token=ends, slices=[])
        return Family(template, tokenizer, detect_tool_format(template, tokenizer), guide)

    return made


def calls(*made: tuple[str, str]) -> list[dict[str, Any]]:
    return [
        {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        for call_id, (name, arguments) in zip(IDS, made, strict=False)
    ]


def rendered(family: Family, *made: tuple[str, str], content: str | None = None) -> str:
    messages: list[dict[str, Any]] = [ASK, {"role": "assistant", "content": content, "tool_calls": calls(*made)}]
    return family.template.render(messages, add_generation_prompt=False, tools=TOOLS)


# Detection.


@every_family
def test_the_answers_are_what_the_templates_write(family: Callable[[str], Family], name: str) -> None:
    one, two = ANSWERS[name]
    made = family(name)
    # R1's own template leaves one call without an end.
    assert (one.removesuffix("<｜tool▁calls▁end｜>") if "r1" in name else one) in rendered(made, W)
    if two is not None:
        assert two in rendered(made, W, M)


def test_a_format_has_what_stands_around_names_and_arguments(family: Callable[[str], Family]) -> None:
    qwen = family("qwen3").format
    assert (qwen.begin, qwen.between) == ('<tool_call>\n{"name": "', '", "arguments": ')
    assert (qwen.after, qwen.separator, qwen.end) == ("}\n</tool_call>", '\n<tool_call>\n{"name": "', "")
    assert (qwen.lead, qwen.trigger, qwen.is_bare, qwen.has_ids) == ("\n", "<tool_call>", False, False)
    llama = family("llama3.1").format
    assert (llama.trigger, llama.separator, llama.is_bare) == ('{"name": "', None, True)
    assert family("mistral nemo").format.has_ids
    assert family("mistral small 3.2").format.has_ids


def test_what_follows_calls_and_depends_on_their_number_allows_one_alone(tmp_path: Path) -> None:
    form = detect_tool_format(*make(tmp_path, COUNTED))
    assert (form.separator, form.after) == (None, "}\n</tool_call>(1)")


@pytest.mark.parametrize("name", REFUSED)
def test_other_templates_are_refused_by_what_they_do(tmp_path: Path, name: str) -> None:
    made, reason = REFUSED[name]
    with pytest.raises(ToolsNotSupported, match=reason):
        detect_tool_format(*make(tmp_path, made))


def test_a_template_that_fails_with_tools_at_all_says_so(tmp_path: Path) -> None:
    _, tokenizer = make(tmp_path, SUPPORTED["hermes"])
    broken = ChatTemplate("{{ raise_exception('no') if tools }}", bos_token="", eos_token="", name="model")
    with pytest.raises(ToolsNotSupported, match=r"fails with tools: .*refuses the messages: no"):
        detect_tool_format(broken, tokenizer)


def test_deep_json_in_a_template_is_no_crash(tmp_path: Path) -> None:
    _, tokenizer = make(tmp_path, SUPPORTED["hermes"])
    source = """{{ tools[0].function.name if messages | length == 1 else messages[0].content + '<call>' }}
{%- if messages[-1].tool_calls %}kvik_first{"kvik_key":{{ '[' * 3000 }}{% endif %}"""
    with pytest.raises(ToolsNotSupported, match="not with JSON arguments"):
        detect_tool_format(ChatTemplate(source, bos_token="", eos_token="", name="model"), tokenizer)


# What chat templates make of calls in the history.


@pytest.mark.parametrize("name", TEXT_ARGUMENTS)
def test_arguments_stay_as_they_were_written_where_templates_take_text(
    family: Callable[[str], Family], name: str
) -> None:
    text = '{ "city":"Oslo" }'
    assert text in rendered(family(name), ("weather", text))
    as_object = {"name": "weather", "arguments": {"city": "Å"}}
    messages: list[dict[str, Any]] = [
        ASK,
        {"role": "assistant", "tool_calls": [{"type": "function", "function": as_object}]},
    ]
    assert '{"city": "Å"}' in family(name).template.render(messages, tools=TOOLS)


@pytest.mark.parametrize("content", [None, ""])
def test_a_call_without_content_takes_the_form_of_the_template(
    family: Callable[[str], Family], content: str | None
) -> None:
    for name in SUPPORTED:
        assert "Oslo" in rendered(family(name), ("weather", '{"city": "Oslo"}'), content=content), name


# Grammars.


def spelt(family: Family, answer: str) -> list[int]:
    """The same answer in tokens of single bytes, but for control tokens."""
    single = {family.tokenizer.token_bytes(i): i for i in range(256 + len(family.tokenizer.special_token_ids))}
    ids = []
    for token_id in family.ids(answer):
        data = family.tokenizer.token_bytes(token_id)
        ids += [single[data[at : at + 1]] for at in range(len(data))] or [token_id]
    return ids


@every_family
@pytest.mark.parametrize("choice", ["auto", "required", Named("weather")])
def test_a_grammar_takes_what_the_template_writes(family: Callable[[str], Family], name: str, choice: Any) -> None:
    made = family(name)
    one, two = ANSWERS[name]
    grammar = made.format.grammar(TOOLS, choice)
    assert made.accepts(grammar, one)
    assert made.accepts(grammar, spelt(made, one))
    assert not made.accepts(grammar, one[: one.rindex("}")])
    assert not made.accepts(grammar, one + "more")
    other = one.replace(",", ", ") if name == "compact json" else one.replace('", ', '",')
    assert other == one or made.accepts(grammar, other) is (name in TEXT_ARGUMENTS)
    for wrong in (one.replace("weather", "wether"), one.replace("3", '"3"'), one.replace("city", "town")):
        assert wrong != one
        if made.format.is_bare and made.format.pairs and choice == "auto" and "wether" in wrong:
            continue  # a bracket and another word are text
        assert not made.accepts(grammar, wrong, whole=False)
    if two is not None:
        assert made.accepts(grammar, two) is not isinstance(choice, Named)
        assert made.accepts(grammar, spelt(made, two)) is not isinstance(choice, Named)
        assert not made.accepts(made.format.grammar(TOOLS, choice, parallel=False), two)
    assert made.accepts(made.format.grammar(TOOLS, choice, parallel=False), one)


@every_family
def test_only_auto_takes_text(family: Callable[[str], Family], name: str) -> None:
    made = family(name)
    one, _ = ANSWERS[name]
    control = made.tokenizer.token_text(min(made.tokenizer.special_token_ids - made.tokenizer.eos_token_ids))
    auto, required = made.format.grammar(TOOLS), made.format.grammar(TOOLS, "required")
    for text in ("", "Hej 🙂 <tool_ {", f"{control}Hej{control}", one[:3] if made.format.is_bare else "to="):
        assert made.accepts(auto, text)
        assert not made.accepts(required, text)
    end = made.tokenizer.token_text(min(made.tokenizer.eos_token_ids))
    assert not made.accepts(auto, f"Hej{end}Hej", whole=False)
    assert made.accepts(auto, "Hej\n" + one)
    assert not made.accepts(required, "Hej\n" + one)
    assert not made.accepts(made.format.grammar(TOOLS, Named("weather_map")), one)


@every_family
def test_in_auto_the_trigger_forces_a_call(family: Callable[[str], Family], name: str) -> None:
    made = family(name)
    one, _ = ANSWERS[name]
    before = "" if made.format.is_bare else "Hej "
    end_of_name = "weather(" if made.format.is_bare and made.format.pairs else "weather"
    head = one[: one.index("weather")] + (end_of_name if end_of_name != "weather" else "")
    assert made.accepts(made.format.grammar(TOOLS), before + head, whole=False)
    for more in ("", "Hej", "wether"):
        assert not made.accepts(made.format.grammar(TOOLS), before + head + more)


def test_bare_calls_begin_only_where_text_begins(family: Callable[[str], Family]) -> None:
    llama = family("llama3.2")
    grammar = llama.format.grammar(TOOLS)
    wrong = LLAMA % ("nothing", EMPTY)
    assert not llama.accepts(grammar, wrong, whole=False)
    assert not llama.accepts(grammar, "<|python_tag|>" + wrong, whole=False)
    assert llama.accepts(grammar, "<|python_tag|>" + ANSWERS["llama3.2"][0])
    assert llama.accepts(grammar, "Write " + wrong)
    assert llama.accepts(grammar, '{"name":"me"}')


PAIRS = ["qwen3-coder", "glm-4.5", "minimax", "llama 4, as python", "lfm2", "gemma 4"]
PLACE: dict[str, Any] = {
    "properties": {
        "street": {"type": "string"},
        "number": {"type": ["integer", "null"]},
        "inner": {"anyOf": [{"$ref": "#/$defs/place"}, {"type": "null"}]},
    },
    "required": ["street"],
    "additionalProperties": False,
}
EVERYTHING: dict[str, Any] = {
    "properties": {
        "text": {"type": "string"},
        "short": {"type": "string", "minLength": 2, "maxLength": 4},
        "code": {"type": "string", "pattern": "^[a-z]{2}-[0-9]+$"},
        "day": {"type": "string", "format": "date"},
        "mode": {"enum": ["fast", "slow"]},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "count": {"type": "integer", "minimum": 1, "maximum": 20},
        "share": {"type": "number"},
        "flag": {"type": "boolean"},
        "names": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 3},
        "place": {"$ref": "#/$defs/place"},
        "free": {"type": "object", "additionalProperties": {"type": "integer"}},
        "any": {},
    },
    "required": ["text"],
    "additionalProperties": False,
    "$defs": {"place": PLACE},
}
SOME_TEXT = st.text("ab <>/\n\\\"'{}[](),=:ü🙂", max_size=12)
STREET = st.sampled_from(["Kongens gate", 'a "b"', ""])
ARGUMENTS = st.fixed_dictionaries(
    {"text": SOME_TEXT},
    optional={
        "short": st.sampled_from(["ab", "üü 3"]),
        "code": st.sampled_from(["ab-1", "xy-902"]),
        "day": st.just("2026-11-30"),
        "mode": st.sampled_from(["fast", "slow"]),
        "maybe": st.sampled_from([None, "x y"]),
        "count": st.integers(1, 20),
        "share": st.sampled_from([0.5, -2, 1e30]),
        "flag": st.booleans(),
        "names": st.lists(STREET, min_size=1, max_size=3),
        "place": st.fixed_dictionaries(
            {"street": STREET},
            optional={
                "number": st.sampled_from([None, 7]),
                "inner": st.sampled_from([None, {"street": "x", "number": 1}]),
            },
        ),
        "free": st.dictionaries(st.sampled_from(["a", "b_c"]), st.integers(0, 9), max_size=2),
        "any": st.sampled_from([[1, {"a": None}], {"b": True}, "text", 4]),
    },
)


@pytest.mark.parametrize("name", PAIRS)
@settings(max_examples=examples(60), deadline=None)
@given(drawn=ARGUMENTS, auto=st.booleans())
def test_pairs_of_every_type_are_taken_as_the_template_writes_them_and_become_json(
    family: Callable[[str], Family], name: str, drawn: dict[str, Any], auto: bool
) -> None:
    made = family(name)
    arguments = {key: drawn[key] for key in EVERYTHING["properties"] if key in drawn}
    if "place" in arguments:
        arguments["place"] = {key: drawn["place"][key] for key in PLACE["properties"] if key in drawn["place"]}
    if made.format.pairs is not None and made.format.pairs.kind == "raw":
        # In tags the template of one family writes these as Python does, and a model is held to JSON.
        arguments = {key: value for key, value in arguments.items() if value is not None and key != "flag"}
    tools = [function("f", EVERYTHING)]
    calls_of = [{"id": IDS[0], "type": "function", "function": {"name": "f", "arguments": arguments}}]
    messages: list[dict[str, Any]] = [ASK, {"role": "assistant", "content": None, "tool_calls": calls_of}]
    answer = made.template.render(messages, add_generation_prompt=False, tools=tools).rpartition("assistant\n")[2]
    answer = answer.removesuffix("<|im_end|>\n")
    assert made.accepts(made.format.grammar(tools, "auto" if auto else "required"), answer)
    events = parse(made, streamed(made, made.ids(answer)), tools)
    assert [type(event) for event in events] == [CallBegin, ArgumentsDelta, CallEnd]
    assert isinstance(events[1], ArgumentsDelta)
    assert json.loads(events[1].text) == arguments
    one_by_one = parse(made, streamed(made, spelt(made, answer)), tools)
    assert one_by_one == events


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("text", None),
        ("short", "a"),
        ("short", "abcde"),
        ("code", "ab-"),
        ("day", "2026-13-01"),
        ("mode", "medium"),
        ("count", 21),
        ("count", "3x"),
        ("flag", "yes"),
        ("names", []),
        ("names", ["a", "b", "c", "d"]),
        ("place", {"number": 3}),
        ("place", {"street": "x", "town": "y"}),
        ("free", {"a": "text"}),
        ("town", "Oslo"),
    ],
)
def test_pairs_that_do_not_match_the_schema_are_not_taken(
    family: Callable[[str], Family], name: str, key: str, value: Any
) -> None:
    made = family(name)
    assert made.format.pairs is not None
    tools = [function("f", EVERYTHING)]
    given = {"text": "Hej", key: value}
    wrong = {key: each for key, each in given.items() if each is not None}
    form, pairs = made.format, made.format.pairs
    for arguments, is_right in ((wrong, False), ({"text": "Hej"}, True)):
        answer = form.begin + "f" + form.between + pairs.write(arguments) + form.after + form.end
        text = "".join(
            made.tokenizer.token_text(form.marked_ids[ord(each) - 0xD800]) if "\ud800" <= each < "\udffe" else each
            for each in answer
        )
        assert made.accepts(form.grammar(tools, "required"), text) is is_right


@pytest.mark.parametrize(
    ("name", "schema", "keyword"),
    [
        ("qwen3-coder", {"properties": {"a": {"type": "string", "format": "duration"}}}, "the format 'duration'"),
        ("qwen3-coder", {"properties": {"a": {"type": "string", "pattern": "^a|b$"}}}, "several alternatives"),
        ("qwen3-coder", {"properties": {}, "minProperties": 1}, "minProperties"),
        ("lfm2", {"properties": {"a": {"type": "array", "prefixItems": [{}]}}}, "prefixItems"),
        ("gemma 4", {"properties": {"a": {"properties": {"b c": {}}}}}, "'b c', which needs quotes"),
        ("gemma 4", {"properties": {"a": {"type": "string", "pattern": "a", "minLength": 3}}}, "together"),
    ],
)
def test_what_pairs_cannot_be_held_to_is_refused_by_its_name(
    family: Callable[[str], Family], name: str, schema: dict[str, Any], keyword: str
) -> None:
    with pytest.raises(InvalidInput, match=f"'f' cannot be kept to: .*{re.escape(keyword)}"):
        family(name).format.grammar([function("f", schema)])


def test_arguments_without_a_schema_are_any_object(family: Callable[[str], Family]) -> None:
    made = family("hermes")
    grammar = made.format.grammar(TOOLS, "required")
    for arguments in ("{}", '{"a": [1, null, {"b": "c"}]}'):
        assert made.accepts(grammar, HERMES % ("weather_map", arguments))
    for arguments in ("[]", "null", '"{}"'):
        assert not made.accepts(grammar, HERMES % ("weather_map", arguments))


def test_schemas_with_references_keep_to_an_object(family: Callable[[str], Family]) -> None:
    made = family("hermes")
    point = {"properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}
    schema = {"$ref": "#/$defs/Point", "$defs": {"Point": point}}
    grammar = made.format.grammar([function("point", schema)], "required")
    assert made.accepts(grammar, HERMES % ("point", '{"x": 1}'))
    assert not made.accepts(grammar, HERMES % ("point", '{"x": "1"}'))
    assert not made.accepts(grammar, HERMES % ("point", "[1]"))


def test_what_only_describes_a_schema_is_no_part_of_its_grammar(family: Callable[[str], Family]) -> None:
    """And a property may have the name of such a word, or a constant hold it."""
    said = {"description": "d" * 600, "title": "t", "examples": ["e" * 100], "default": "f" * 100}
    properties = {
        "description": {"type": "string", **said},
        "list": {"type": "array", "items": {"anyOf": [{"const": {"title": 1}, **said}, {"$ref": "#/$defs/title"}]}},
    }
    schema = {
        "properties": properties,
        "required": [*properties],
        "additionalProperties": False,
        "$defs": {"title": {"enum": [{"default": 2}], **said}},
        **said,
    }
    made = family("hermes")
    grammar = made.format.grammar([function(f"f{at}", schema) for at in range(60)], "required")
    assert grammar is not None
    assert len(grammar) < MAX_GRAMMAR_BYTES < len(json.dumps(schema)) * 60
    assert "ddd" not in grammar
    assert made.accepts(grammar, HERMES % ("f7", '{"description": "x", "list": [{"title": 1}, {"default": 2}]}'))
    assert not made.accepts(grammar, HERMES % ("f7", '{"list": []}'))
    assert not made.accepts(grammar, HERMES % ("f7", '{"description": "x", "list": [{"title": 2}]}'))


def test_tools_too_many_for_a_grammar_are_named(family: Callable[[str], Family]) -> None:
    tools = [function(f"f{at}", {"properties": {"a": {"enum": ["x" * 1000]}}}) for at in range(80)]
    with pytest.raises(InvalidInput, match=r"^tools make a grammar of 9\d,\d{3} bytes, more than 65,536"):
        family("hermes").format.grammar(tools)


@pytest.mark.parametrize("depth", [200, 400, 700, 5000])
def test_a_schema_that_is_nested_too_deeply_is_refused(family: Callable[[str], Family], depth: int) -> None:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    with pytest.raises(InvalidInput, match="'f' "):
        family("hermes").format.grammar([function("f", schema)])


def function(name: str, parameters: Any = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def test_no_tools_and_no_choice_have_no_grammar(family: Callable[[str], Family]) -> None:
    form = family("hermes").format
    assert form.grammar(TOOLS, "none") is None
    assert form.grammar([]) is None
    assert form.grammar(None) is None


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        ([], "required", "there are no tools"),
        (None, Named("weather"), "'weather', which is none of the tools"),
        (TOOLS, Named("wether"), "'wether', which is none of the tools"),
        (TOOLS, "weather", "tool_choice is 'weather'"),
        ([function("a b")], "auto", "'a b' has a name that no model can write"),
        ([function('"')], "none", "has a name that no model can write"),
        ([function("x" * 65)], "auto", "has a name that no model can write"),
        ([WEATHER, WEATHER], "auto", "two tools have the name 'weather'"),
        ([function(f"f{i}") for i in range(MAX_TOOLS + 1)], "auto", "129 tools, more than 128"),
        ([function("f", {"type": "string"})], "auto", "'f' are of type 'string', not an object"),
        ([WEATHER, function("f", {"not": {}})], "auto", "'f' cannot be kept to: .*not"),
        ([function("f", {"properties": {"a": {"uniqueItems": True, "type": "array"}}})], "auto", "'f' .*uniqueItems"),
        ([function("f", {"properties": {"a": {"type": "strong"}}})], "auto", "'f' cannot be kept to"),
        (
            [function("f", {"x-guidance": {"lenient": True}, "not": {}})],
            "auto",
            "'f' cannot be kept to: .*not",
        ),
        ([function("f", {"description": "x" * MAX_SCHEMA_BYTES})], "auto", "'f' have .* bytes, more than 65,536"),
        ([function("f", {"anyOf": [{}] * MAX_SCHEMA_OBJECTS})], "auto", "more than 2,000 objects"),
        ([function("f", {"default": float("nan")})], "auto", "'f' are not JSON"),
    ],
)
def test_wrong_tools_and_choices_are_refused_by_name(
    family: Callable[[str], Family], tools: Any, choice: Any, message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        family("hermes").format.grammar(tools, choice)


# The parser.


def new_ids() -> Callable[[int], str]:
    numbers = itertools.count()
    return lambda length: f"{next(numbers):0{length}d}"


def parse(family: Family, pieces: Sequence[tuple[int, str]], tools: Any = TOOLS) -> list[ToolEvent]:
    parser = ToolCallParser(family.format, tools, new_ids())
    return merged(
        itertools.chain.from_iterable([*(parser.feed(token_id, text) for token_id, text in pieces), parser.finish()])
    )


def merged(events: Iterator[ToolEvent]) -> list[ToolEvent]:
    """The events with what follows each other as one."""
    whole: list[ToolEvent] = []
    for event in events:
        last = whole[-1] if whole else None
        if isinstance(event, TextDelta) and isinstance(last, TextDelta):
            whole[-1] = TextDelta(last.text + event.text)
        elif isinstance(event, ArgumentsDelta) and isinstance(last, ArgumentsDelta):
            whole[-1] = ArgumentsDelta(event.index, last.text + event.text)
        else:
            whole.append(event)
    return whole


def streamed(family: Family, ids: Sequence[int], stop: Sequence[str] = ()) -> list[tuple[int, str]]:
    """The tokens with the text that the engine's stream has for each."""
    stream = TextStream(family.tokenizer, stop)
    taken = []
    for token_id in ids:
        if token_id in family.tokenizer.eos_token_ids:
            stream.skip()
        else:
            stream.add(token_id)
        taken.append(token_id)
        if stream.stopped:
            break
    stream.finish()
    return list(zip(taken, stream.parts, strict=True))


def events_of(family: Family, *made: tuple[str, str], text: str = "") -> list[ToolEvent]:
    events: list[ToolEvent] = [TextDelta(text)] if text else []
    for index, (name, arguments) in enumerate(made):
        call_id = f"{index:09d}" if family.format.has_ids else f"call_{index:024d}"
        events += [CallBegin(index, call_id, name), ArgumentsDelta(index, arguments), CallEnd(index)]
    return events


def written(name: str) -> tuple[tuple[str, str], tuple[str, str]]:
    return ("weather", COMPACT if name == "compact json" else CITY), M


@every_family
def test_calls_are_told_from_the_answer(family: Callable[[str], Family], name: str) -> None:
    made = family(name)
    first, second = written(name)
    one, two = ANSWERS[name]
    end = made.tokenizer.token_text(min(made.tokenizer.eos_token_ids))
    assert parse(made, streamed(made, made.ids(one))) == events_of(made, first)
    assert parse(made, streamed(made, made.ids(one + end))) == events_of(made, first)
    if two is not None:
        assert parse(made, streamed(made, made.ids(two + end))) == events_of(made, first, second)
    if not made.format.is_bare:
        preamble = "Hej 🙂"
        expected = events_of(made, first, text=preamble)
        assert parse(made, streamed(made, made.ids(preamble + made.format.lead + one.lstrip()))) == expected
    assert all(isinstance(event, TextDelta) for event in parse(made, streamed(made, made.ids(one)), [WEATHER_MAP]))


@pytest.mark.parametrize("name", ["hermes", "qwen2.5", "qwen3", "granite", "function tags", "compact json"])
def test_content_and_calls_come_back_as_they_were(family: Callable[[str], Family], name: str) -> None:
    """So that the conversation's next prompt is the same tokens."""
    made = family(name)
    answer = "Hej" + rendered(made, W, content="Hej").rpartition("Hej")[2]
    assert parse(made, streamed(made, made.ids(answer)))[:4] == events_of(made, written(name)[0], text="Hej")


@every_family
@settings(max_examples=examples(60), deadline=None)
@given(seed=st.integers(0, 2**32))
def test_events_do_not_depend_on_how_the_text_is_cut(family: Callable[[str], Family], name: str, seed: int) -> None:
    made = family(name)
    rng = random.Random(seed)
    one, two = ANSWERS[name]
    answer = (rng.choice(["", "Hej 🙂 <tool_", "\n\n", '[{"na']) if not made.format.is_bare else "") + (two or one)
    whole = parse(made, streamed(made, made.ids(answer)))
    # Other tokens of the same text, and text that comes later than its tokens.
    names = [made.tokenizer.token_text(i) for i in made.tokenizer.special_token_ids]
    cuts = [at for at in range(len(answer) + 1) if not any(inside(answer, at, each) for each in names)]
    places = sorted({0, len(answer), *rng.choices(cuts, k=rng.randrange(8))})
    ids = [i for start, stop in itertools.pairwise(places) for i in made.ids(answer[start:stop])]
    assert parse(made, streamed(made, ids)) == whole
    texts = [text for _, text in streamed(made, ids)]
    late = []
    held = ""
    for token_id, text in zip(ids, texts, strict=True):
        held += text
        released = rng.randrange(len(held) + 1)
        late.append((token_id, held[:released]))
        held = held[released:]
    late[-1] = (late[-1][0], late[-1][1] + held)
    assert parse(made, late) == whole


def answer_text(family: Family, answer: str) -> str:
    """The answer without its control tokens."""
    return family.tokenizer.decode(family.ids(answer))


def inside(text: str, at: int, name: str) -> bool:
    """Whether the place is inside a name in the text."""
    return any(text.startswith(name, start) for start in range(max(at - len(name) + 1, 0), at))


@every_family
@settings(max_examples=examples(60), deadline=None)
@given(parts=st.lists(st.sampled_from(range(40)), max_size=12))
def test_text_that_is_no_call_comes_out_as_it_is(family: Callable[[str], Family], name: str, parts: list[int]) -> None:
    made = family(name)
    one = answer_text(made, ANSWERS[name][0].replace("weather", "wether"))
    # Pieces of a call of no tool, in any order.
    text = "".join(one[at : at + 1 + at % 7] if at < len(one) else "🙂" for at in parts) + one[: sum(parts)]
    assert parse(made, streamed(made, made.ids(text))) == ([TextDelta(text)] if text else [])


@every_family
def test_control_tokens_of_calls_without_a_call_leave_the_text_whole(
    family: Callable[[str], Family], name: str
) -> None:
    made = family(name)
    answer = ANSWERS[name][0].replace("weather", "wether")
    assert parse(made, streamed(made, made.ids(f"A{answer}B"))) == [TextDelta(f"A{answer_text(made, answer)}B")]


@every_family
def test_an_answer_may_be_cut_anywhere(family: Callable[[str], Family], name: str) -> None:
    made = family(name)
    answer = ANSWERS[name][1] or ANSWERS[name][0]
    ids = made.ids(answer)
    whole = parse(made, streamed(made, ids))
    num_calls = 0
    for cut in range(len(ids) + 1):
        events = parse(made, streamed(made, ids[:cut]))
        begun = [event for event in events if isinstance(event, CallBegin)]
        assert begun == [event for event in whole if isinstance(event, CallBegin)][: len(begun)]
        assert len(begun) >= num_calls
        num_calls = len(begun)
        for index in range(len(begun)):
            arguments = "".join(e.text for e in events if isinstance(e, ArgumentsDelta) and e.index == index)
            want = "".join(e.text for e in whole if isinstance(e, ArgumentsDelta) and e.index == index)
            if CallEnd(index) in events:
                assert arguments == want
            else:
                assert want.startswith(arguments.rstrip("\ufffd"))
                assert events[-1] == ArgumentsDelta(index, arguments)
        # Of a call that is cut off before its arguments, the text is left.
        text = "".join(e.text for e in events if isinstance(e, TextDelta))
        assert text.rstrip("\ufffd") in answer_text(made, answer)
        assert not (text and isinstance(events[-1], ArgumentsDelta))


def test_text_after_calls_and_calls_after_it_are_told_apart(family: Callable[[str], Family]) -> None:
    made = family("hermes")
    answer = f"{HERMES % M}\n\nand{HERMES % M} done"
    assert parse(made, streamed(made, made.ids(answer))) == [
        *events_of(made, M),
        TextDelta("\n\nand"),
        CallBegin(1, f"call_{1:024d}", "weather_map"),
        ArgumentsDelta(1, EMPTY),
        CallEnd(1),
        TextDelta(" done"),
    ]


def test_text_is_told_as_soon_as_it_cannot_be_a_call(family: Callable[[str], Family]) -> None:
    made = family("hermes")
    parser = ToolCallParser(made.format, TOOLS, new_ids())
    told = [parser.feed(*piece) for piece in streamed(made, spelt(made, "ab\n<to b<tool_call>x"))]
    texts = ["".join(event.text for event in events if isinstance(event, TextDelta)) for events in told]
    assert texts == ["a", "b", *[""] * 4, "\n<to ", "b", *[""] * 11, "<tool_call>x"]


def test_arguments_are_told_token_by_token(family: Callable[[str], Family]) -> None:
    made = family("hermes")
    parser = ToolCallParser(made.format, TOOLS, new_ids())
    told = [parser.feed(*piece) for piece in streamed(made, spelt(made, HERMES % ("weather", '{"city": "Oslo"}')))]
    deltas = [event.text for events in told for event in events if isinstance(event, ArgumentsDelta)]
    assert deltas == list('{"city": "Oslo"}')


def test_a_stop_string_may_cut_a_call_and_hold_text_over_control_tokens(family: Callable[[str], Family]) -> None:
    made = family("mistral small 3.2")
    ids = made.ids("Hej " + ANSWERS["mistral small 3.2"][0])
    # The stop begins as the text before the control token ends, and as the name does.
    held = parse(made, streamed(made, ids, stop=[" weathercock", "Hej weather!"]))
    assert held == parse(made, streamed(made, ids))
    cut = parse(made, streamed(made, ids, stop=['"Å']))
    assert cut == [TextDelta("Hej "), CallBegin(0, "0" * 9, "weather"), ArgumentsDelta(0, '{"city": ')]
