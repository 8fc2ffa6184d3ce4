"""Thoughts of every known form: found in the template, told from the answer, and allowed before what is forced."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvik.engine.output import TextStream
from kvik.text.answer_events import AnswerEvent, ArgumentsDelta, CallBegin, CallEnd, TextDelta, ThoughtDelta
from kvik.text.answer_parser import AnswerParser
from kvik.text.chat_template import ChatTemplate
from kvik.text.constraint import allows
from kvik.text.grammar import Grammar
from kvik.text.grammar_compiler import GrammarCompiler
from kvik.text.harmony import Harmony
from kvik.text.thoughts import Place, ThoughtFormat, ThoughtTags, answer_after_thought, detect_thoughts
from kvik.text.tokenizer import Tokenizer
from kvik.text.tool_detection import detect_tool_format
from kvik.text.tool_format import Named, ToolFormat, chosen_functions
from thought_templates import HARMONY, NOT_THINKING, THINKING
from tiers import examples
from tool_templates import make

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "", "parameters": {"type": "object"}}}
TOOLS = [WEATHER, CLOCK]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
ARGUMENTS = '{"city": "Oslo"}'
SAID = [CallBegin(0, "call_" + "0" * 24, "weather"), ArgumentsDelta(0, ARGUMENTS), CallEnd(0)]
MIND = 'Hm 🙂 I could write <tool_call> or {"name": or\n\nthink on'

every_form = pytest.mark.parametrize("name", THINKING)


@dataclass(frozen=True)
class Model:
    template: ChatTemplate
    tokenizer: Tokenizer
    thoughts: ThoughtFormat
    tool_format: ToolFormat
    compiler: GrammarCompiler

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special=False)

    def place(self) -> Place:
        prompt = self.template.render([{"role": "user", "content": "Hej"}])
        return self.thoughts.place_after(self.ids(prompt))

    def takes(self, grammar: Grammar, answer: str, *, whole: bool = True) -> bool:
        """Whether each of the answer's tokens may come, and then the end."""
        matcher = self.compiler.compile(grammar).new_matcher()
        for token_id in self.ids(answer):
            if matcher.is_finished or not allows(matcher.masks()[0], token_id):
                return False
            matcher.accept(token_id)
        end = min(self.tokenizer.eos_token_ids)
        return not whole or matcher.is_finished or allows(matcher.masks()[0], end)

    def parse(self, ids: Sequence[int], place: Place, *, tools: bool = True) -> list[AnswerEvent]:
        parser = AnswerParser(
            self.thoughts, self.tool_format if tools else None, TOOLS, lambda length: "0" * length, place=place
        )
        stream = TextStream(self.tokenizer)
        for token_id in ids:
            if token_id in self.tokenizer.eos_token_ids:
                stream.skip()
            else:
                stream.add(token_id)
        stream.finish()
        found: list[AnswerEvent] = []
        for token_id, text in zip(ids, stream.parts, strict=True):
            found += parser.feed(token_id, text)
        return merged([*found, *parser.finish()])


def merged(events: Sequence[AnswerEvent]) -> list[AnswerEvent]:
    whole: list[AnswerEvent] = []
    for event in events:
        last = whole[-1] if whole else None
        if isinstance(event, ThoughtDelta) and isinstance(last, ThoughtDelta):
            whole[-1] = ThoughtDelta(last.text + event.text)
        elif isinstance(event, TextDelta) and isinstance(last, TextDelta):
            whole[-1] = TextDelta(last.text + event.text)
        elif isinstance(event, ArgumentsDelta) and isinstance(last, ArgumentsDelta):
            whole[-1] = ArgumentsDelta(event.index, last.text + event.text)
        else:
            whole.append(event)
    return whole


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    @cache
    def made(name: str) -> Model:
        source = HARMONY if name == "harmony" else THINKING[name].template
        template, tokenizer = make(tmp_path_factory.mktemp("tokenizer"), source)
        thoughts = detect_thoughts(template, tokenizer)
        assert thoughts is not None
        form = detect_tool_format(template, tokenizer, thoughts.marked_ids)
        return Model(template, tokenizer, thoughts, form, GrammarCompiler(tokenizer, tokenizer.vocab_size))

    return made


def named(model: Model, text: str) -> str:
    """Marked text with the names of its control tokens."""
    ids = model.thoughts.marked_ids
    return "".join(model.tokenizer.token_text(ids[ord(x) - 0xD800]) if "\ud800" <= x <= "\udfff" else x for x in text)


def thought(name: str, text: str = MIND) -> str:
    form = THINKING[name]
    return ("" if form.has_begun else form.begin + "\n") + text + "\n" + form.end


# Tags.


@every_form
def test_tags_are_found(model: Callable[[str], Model], name: str) -> None:
    made, form = model(name), THINKING[name]
    assert isinstance(made.thoughts, ThoughtTags)
    assert (named(made, made.thoughts.begin), named(made, made.thoughts.end)) == (form.begin, form.end)
    assert made.place() == ("thought" if form.has_begun else "header")


@pytest.mark.parametrize("name", NOT_THINKING)
def test_no_tags_are_found_where_there_are_none(tmp_path: Path, name: str) -> None:
    assert detect_thoughts(*make(tmp_path, NOT_THINKING[name])) is None


@every_form
@settings(max_examples=examples(40), deadline=None)
@given(seed=st.integers(0, 2**32), calls=st.booleans())
def test_thoughts_text_and_calls_are_told_apart_however_the_text_is_cut(
    model: Callable[[str], Model], name: str, seed: int, calls: bool
) -> None:
    made = model(name)
    rng = random.Random(seed)
    answer = thought(name) + "\n\n" + (CALL if calls else "Hej 🙂\n")
    names = [made.tokenizer.token_text(i) for i in made.tokenizer.special_token_ids]
    cuts = [
        at
        for at in range(len(answer) + 1)
        if not any(answer.startswith(each, start) for each in names for start in range(max(at - len(each) + 1, 0), at))
    ]
    places = sorted({0, len(answer), *rng.choices(cuts, k=rng.randrange(8))})
    ids = [i for start, stop in itertools.pairwise(places) for i in made.ids(answer[start:stop])]
    expected = [ThoughtDelta(MIND), *(SAID if calls else [TextDelta("Hej 🙂\n")])]
    assert made.parse(ids, made.place()) == expected


@every_form
def test_an_answer_without_a_thought_or_with_a_part_of_one(model: Callable[[str], Model], name: str) -> None:
    made, form = model(name), THINKING[name]
    if not form.has_begun:
        for text in ("Hej", "\nHej <th", f"Hej {form.begin}"):
            shown = made.tokenizer.decode(made.ids(text))
            assert made.parse(made.ids(text), "header", tools=False) == [TextDelta(shown)]
    cut = made.ids(thought(name).removesuffix("\n" + form.end))
    assert made.parse(cut, made.place()) == [ThoughtDelta(MIND)]


@every_form
@pytest.mark.parametrize("choice", ["auto", "required", Named("weather")])
def test_a_thought_may_come_before_a_call_whatever_it_mentions(
    model: Callable[[str], Model], name: str, choice: Any
) -> None:
    made, form = model(name), THINKING[name]
    assert isinstance(made.thoughts, ThoughtTags)
    text = made.tool_format.grammar(TOOLS, choice, thoughts=made.thoughts, place=made.place())
    assert text is not None
    grammar = Grammar.lark(text)
    for between in ("", "\n", "\n\n"):
        assert made.takes(grammar, thought(name) + between + CALL)
    assert made.takes(grammar, CALL) is not form.has_begun
    assert made.takes(grammar, thought(name) + "\n\nHej") is (choice == "auto")
    assert not made.takes(grammar, thought(name)) or choice == "auto"
    wrong = CALL.replace("weather", "wether")
    assert not made.takes(grammar, thought(name) + wrong, whole=False)


@every_form
@pytest.mark.parametrize(
    ("wanted", "right", "wrong"),
    [
        (
            Grammar.json_schema({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}),
            '{"a": 1}',
            '{"a": "b"}',
        ),
        (Grammar.regex("[ab]{3}/"), "aba/", "abc/"),
        (Grammar.choice(["yes", "no"]), "no", "maybe"),
        (Grammar.lark('start: "x" y\ny: /[0-9]/'), "x7", "y7"),
    ],
)
def test_a_thought_may_come_before_structured_output(
    model: Callable[[str], Model], name: str, wanted: Grammar, right: str, wrong: str
) -> None:
    made, form = model(name), THINKING[name]
    before = answer_after_thought(made.thoughts, made.place())
    assert before is not None
    grammar = wanted.after(before)
    assert made.takes(grammar, thought(name) + "\n\n" + right)
    assert made.takes(grammar, right) is not form.has_begun
    assert not made.takes(grammar, thought(name) + wrong)
    assert not made.takes(grammar, thought(name))


# Harmony.

ANALYSIS = "<|channel|>analysis<|message|>" + MIND + "<|end|><|start|>assistant"
WORDS = "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>Hej 🙂<|return|>"
HEADS = [
    "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>",
    "<|channel|>commentary to=functions.weather<|message|>",
    " to=functions.weather<|channel|>commentary json<|message|>",
    " to=functions.weather<|channel|>commentary <|constrain|>json<|message|>",
]


@pytest.mark.parametrize("head", HEADS)
def test_channels_of_harmony(model: Callable[[str], Model], head: str) -> None:
    made = model("harmony")
    assert isinstance(made.thoughts, Harmony)
    assert made.place() == "header"
    mind, words = ThoughtDelta(MIND), TextDelta("I look.")
    called = head + ARGUMENTS + "<|call|>"
    assert made.parse(made.ids(ANALYSIS + FINAL), "header") == [mind, TextDelta("Hej 🙂")]
    assert made.parse(made.ids(ANALYSIS + FINAL), "header", tools=False) == [mind, TextDelta("Hej 🙂")]
    assert made.parse(made.ids(ANALYSIS + WORDS + called), "header") == [mind, words, *SAID]
    assert made.parse(made.ids(called), "header") == SAID
    assert made.parse(made.ids(called), "header", tools=False) == [TextDelta(ARGUMENTS)]
    assert made.parse(made.ids("Hej"), "header") == [TextDelta("Hej")]
    assert made.parse(made.ids("on" + ANALYSIS.removeprefix("<|channel|>analysis<|message|>") + FINAL), "thought") == [
        ThoughtDelta("on" + MIND),
        TextDelta("Hej 🙂"),
    ]


@pytest.mark.parametrize("num_tokens", range(0, 90, 3))
def test_a_cut_answer_of_harmony_has_no_names_of_channels(model: Callable[[str], Model], num_tokens: int) -> None:
    made = model("harmony")
    events = made.parse(made.ids(ANALYSIS + WORDS + HEADS[0] + ARGUMENTS)[:num_tokens], "header")
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    assert "I look.".startswith(text.rstrip("\ufffd"))
    mind = "".join(event.text for event in events if isinstance(event, ThoughtDelta))
    assert MIND.startswith(mind.rstrip("\ufffd"))


def test_the_place_where_a_prompt_of_harmony_ends(model: Callable[[str], Model]) -> None:
    made = model("harmony")
    user = "<|start|>user<|message|>Hej<|end|>"
    for tail, place in (
        ("<|start|>assistant", "header"),
        ("<|start|>assistant<|channel|>analysis<|message|>Hm", "thought"),
        ("<|start|>assistant<|channel|>final<|message|>He", "text"),
    ):
        assert made.thoughts.place_after(made.ids(user + tail)) == place


@pytest.mark.parametrize("choice", ["auto", "required", Named("weather")])
def test_the_grammar_of_harmony(model: Callable[[str], Model], choice: Any) -> None:
    made = model("harmony")
    assert isinstance(made.thoughts, Harmony)
    schemas = chosen_functions(TOOLS, choice)
    text = made.thoughts.grammar(schemas, is_forced=choice != "auto", place="header")
    assert text is not None
    grammar = Grammar.lark(text)
    for before in ("", ANALYSIS, ANALYSIS + WORDS):
        for head in HEADS:
            assert made.takes(grammar, before + head + ARGUMENTS)
            assert not made.takes(grammar, before + head + '{"city": 1}')
        assert made.takes(grammar, before + FINAL.removesuffix("<|return|>")) is (choice == "auto")
    clock = HEADS[1].replace("weather", "clock") + json.dumps({"a": 1})
    assert made.takes(grammar, clock) is (choice != Named("weather"))
    assert not made.takes(grammar, "Hej", whole=False)


def test_structured_output_is_in_harmonys_final_channel(model: Callable[[str], Model]) -> None:
    made = model("harmony")
    before = answer_after_thought(made.thoughts, "header")
    assert before is not None
    grammar = Grammar.json_schema({"type": "integer"}).after(before)
    assert made.takes(grammar, ANALYSIS + "<|channel|>final<|message|>12")
    assert made.takes(grammar, "<|channel|>final<|message|>12")
    assert not made.takes(grammar, "<|channel|>final<|message|>x", whole=False)
    assert not made.takes(grammar, "12", whole=False)
