"""Grammars and their compilation: what is refused, and with which code; what a matcher allows."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gguf_files import tiny_llama
from kvik.errors import GrammarFailed, InvalidGrammar, InvalidInput
from kvik.files.gguf import read_gguf
from kvik.text import grammar_compiler
from kvik.text.constraint import Matcher, allows
from kvik.text.grammar import MAX_GRAMMAR_BYTES, Grammar
from kvik.text.grammar_compiler import GrammarCompiler
from kvik.text.tokenizer import Tokenizer
from kvik.text.tokenizer_gguf import GGUFTokenizer
from subprocesses import python


@pytest.fixture(scope="module")
def tokenizer(default_model_path: Path) -> Tokenizer:
    return GGUFTokenizer(read_gguf(default_model_path).metadata, "smollm2")


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.vocab_size)


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def endless() -> list[Any]:
    cycle: list[Any] = []
    cycle.append(cycle)
    return cycle


MANY_RULES = "start: " + " | ".join(f"a{i}" for i in range(2000))
MANY_RULES += "".join(f'\na{i}: "x" a{(i * 7 + 1) % 2000} | "y"' for i in range(2000))

REFUSED: dict[str, tuple[str, Callable[[], Grammar]]] = {
    "recursive without an end": ("invalid_json_schema", lambda: Grammar.json_schema({"$ref": "#"})),
    "false": ("invalid_json_schema", lambda: Grammar.json_schema(False)),
    "unknown type": ("invalid_json_schema", lambda: Grammar.json_schema({"type": "text"})),
    "not": ("invalid_json_schema", lambda: Grammar.json_schema({"not": {}})),
    "uniqueItems": ("invalid_json_schema", lambda: Grammar.json_schema({"type": "array", "uniqueItems": True})),
    "if": ("invalid_json_schema", lambda: Grammar.json_schema({"if": {"type": "string"}, "then": {"minLength": 1}})),
    "unknown format": ("invalid_json_schema", lambda: Grammar.json_schema({"type": "string", "format": "idn-email"})),
    "remote": ("invalid_json_schema", lambda: Grammar.json_schema({"$ref": "http://localhost/schema"})),
    "minimum above maximum": (
        "invalid_json_schema",
        lambda: Grammar.json_schema({"type": "integer", "minimum": 3, "maximum": 2}),
    ),
    "look-around in a pattern": (
        "invalid_json_schema",
        lambda: Grammar.json_schema({"type": "string", "pattern": "(?=a)b"}),
    ),
    "options that weaken": (
        "invalid_json_schema",
        lambda: Grammar.json_schema({"x-guidance": {"lenient": True}, "not": {}}),
    ),
    "100,000 nodes": ("invalid_json_schema", lambda: Grammar.json_schema({"enum": [0] * 100_000})),
    "endless": ("invalid_json_schema", lambda: Grammar.json_schema({"enum": endless()})),
    "NaN": ("invalid_json_schema", lambda: Grammar.json_schema({"minimum": float("nan")})),
    "a set": ("invalid_json_schema", lambda: Grammar.json_schema({"enum": {1, 2}})),
    "a number as a key": ("invalid_json_schema", lambda: Grammar.json_schema({1: {}})),  # type: ignore[dict-item]
    "a long number": ("invalid_json_schema", lambda: Grammar.json_schema({"minimum": 10**5000})),
    "half a surrogate pair": ("invalid_json_schema", lambda: Grammar.json_schema({"const": "\ud800"})),
    "a schema as text": ("invalid_json_schema", lambda: Grammar.json_schema("{}")),  # type: ignore[arg-type]
    "10,000 properties": (
        "grammar_too_complex",
        lambda: Grammar.json_schema({"properties": {f"p{index}": {"type": "string"} for index in range(10_000)}}),
    ),
    "a long enum": ("grammar_too_complex", lambda: Grammar.json_schema({"enum": list(range(5000))})),
    "deep": ("grammar_too_complex", lambda: Grammar.json_schema(nested(100))),
    "a long schema": ("grammar_too_complex", lambda: Grammar.json_schema({"const": "a" * MAX_GRAMMAR_BYTES})),
    "open bracket": ("invalid_grammar", lambda: Grammar.regex("(")),
    "look-around": ("invalid_grammar", lambda: Grammar.regex("(?=a)b")),
    "back reference": ("invalid_grammar", lambda: Grammar.regex(r"(a)\1")),
    "a long pattern": ("grammar_too_complex", lambda: Grammar.regex("ä" * (MAX_GRAMMAR_BYTES // 2 + 1))),
    "no pattern": ("invalid_grammar", lambda: Grammar.regex(None)),  # type: ignore[arg-type]
    "pattern with half a surrogate pair": ("invalid_grammar", lambda: Grammar.regex("\udc00")),
    "unknown rule": ("invalid_grammar", lambda: Grammar.lark("start: x")),
    "no text": ("invalid_grammar", lambda: Grammar.lark("start: start")),
    "empty": ("invalid_grammar", lambda: Grammar.lark("")),
    "unknown special token": ("invalid_grammar", lambda: Grammar.lark("start: <|nothing|>")),
    "weakened within": (
        "invalid_grammar",
        lambda: Grammar.lark('start: %json {"x-guidance": {"lenient": true}, "not": {}}'),
    ),
    "ambiguous without a bound": ("grammar_too_complex", lambda: Grammar.lark(MANY_RULES)),
    "no choice": ("invalid_grammar", lambda: Grammar.choice([])),
    "an empty choice": ("invalid_grammar", lambda: Grammar.choice(["a", ""])),
    "a choice of one text": ("invalid_grammar", lambda: Grammar.choice("yes")),
    "a choice of numbers": ("invalid_grammar", lambda: Grammar.choice([1, 2])),  # type: ignore[list-item]
    "many choices": ("grammar_too_complex", lambda: Grammar.choice([str(index) for index in range(3000)])),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_has_a_code_and_one_line(compiler: GrammarCompiler, name: str) -> None:
    code, make = REFUSED[name]
    with pytest.raises(InvalidGrammar) as caught:
        compiler.compile(make())
    error = caught.value
    assert error.code == code, error
    assert "\n" not in error.message
    assert len(error.message) < 500
    assert error.hint
    assert compiler.compile(Grammar.choice(["yes", "no"])).new_matcher().masks(), "it compiles no more"


def test_grammars_are_equal_by_their_text() -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    assert Grammar.json_schema(schema) == Grammar.json_schema(json.loads(json.dumps(schema)))
    assert hash(Grammar.json_schema(schema)) == hash(Grammar.json_schema(dict(schema)))
    reordered = {"type": "object", "properties": {"a": {}, "b": {}}}
    assert Grammar.json_schema(schema) != Grammar.json_schema(reordered)  # the order is that of the output
    assert Grammar.regex("a") != Grammar.lark("a")


def take(matcher: Matcher, tokenizer: Tokenizer, text: str) -> None:
    for token_id in tokenizer.encode(text, add_special=False):
        assert allows(matcher.masks()[0], token_id), text
        matcher.accept(token_id)


@pytest.mark.parametrize("text", ["yes", 'say "no"', "two\nlines\t\\", "ja\x01", "naïve 🎉", "yesterday"])
def test_each_choice_can_be_written(compiler: GrammarCompiler, tokenizer: Tokenizer, text: str) -> None:
    choices = ["yes", 'say "no"', "two\nlines\t\\", "ja\x01", "naïve 🎉", "yesterday"]
    matcher = compiler.compile(Grammar.choice(choices)).new_matcher()
    take(matcher, tokenizer, text)
    assert matcher.is_finished == (text != "yes")  # which may yet become yesterday
    (mask,) = matcher.masks()
    assert {token_id for token_id in tokenizer.special_token_ids if allows(mask, token_id)} == tokenizer.eos_token_ids


def test_every_end_is_allowed_where_the_grammar_accepts(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    assert len(tokenizer.eos_token_ids) > 1
    matcher = compiler.compile(Grammar.regex("a+")).new_matcher()
    assert not any(allows(matcher.masks()[0], token_id) for token_id in tokenizer.eos_token_ids)
    take(matcher, tokenizer, "a")
    assert all(allows(matcher.masks()[0], token_id) for token_id in tokenizer.eos_token_ids)
    assert not matcher.is_finished


def test_a_special_token_is_named_in_a_grammar(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    (start,) = tokenizer.encode("<|im_start|>", add_special=False)
    matcher = compiler.compile(Grammar.lark('start: "a" <|im_start|> "b"')).new_matcher()
    take(matcher, tokenizer, "a")
    mask = matcher.masks()[0]
    assert [token_id for token_id in range(tokenizer.vocab_size) if allows(mask, token_id)] == [start]
    matcher.accept(start)
    take(matcher, tokenizer, "b")
    assert matcher.is_finished


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "mail": {"type": "string", "format": "email"}, "n": {"type": "integer"}},
    "required": ["name", "mail", "n"],
    "additionalProperties": False,
}
TEXT = '{"name": "Ada Lovelace", "mail": "ada@example.com", "n": 36}'


def test_masks_behind_drafts_are_those_after_them(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode(TEXT, add_special=False)
    constraint = compiler.compile(Grammar.json_schema(SCHEMA))
    plain, drafted, rng = constraint.new_matcher(), constraint.new_matcher(), random.Random(4)
    wanted = [plain.masks()[0]]
    for token_id in token_ids[:-1]:
        plain.accept(token_id)
        wanted += plain.masks()
    for at, token_id in enumerate(token_ids):
        right = token_ids[at : at + rng.randrange(6)]
        assert drafted.count_valid(right) == len(right)
        end = rng.choice(sorted(tokenizer.eos_token_ids))
        assert drafted.count_valid([*right, end, end]) == len(right)
        wrong = rng.randrange(tokenizer.vocab_size)
        found = drafted.masks([*right, wrong, wrong])
        assert found[: len(right) + 1] == wanted[at : at + len(right) + 1]
        assert drafted.masks() == [wanted[at]]
        drafted.accept(token_id)
    assert drafted.is_finished


# An automaton of many states, but only for texts that begin with Y.
EXPLOSIVE = Grammar.regex("x+|Y(.*[ab].{12}[cd].*)")


def follow(matcher: Matcher, token_ids: SequenceOf[int], draft_ids: SequenceOf[int] = ()) -> list[bytes]:
    """The masks on the way, until it fails."""
    found = list[bytes]()

    def go_on() -> None:
        for token_id in token_ids:
            matcher.count_valid(draft_ids)
            found.append(matcher.masks(draft_ids)[0])
            matcher.accept(token_id)

    with pytest.raises(GrammarFailed, match="too many states") as caught:
        go_on()
    assert "\n" not in caught.value.message
    return found


def test_one_text_does_not_show_in_another(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pattern whose automaton explodes in some texts: those fail alone, each at its own place."""
    monkeypatch.setattr(grammar_compiler, "MAX_LEXER_STATES", 2000)
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    constraint = compiler.compile(EXPLOSIVE)
    hostile, other = constraint.new_matcher(), constraint.new_matcher()
    assert follow(hostile, tokenizer.encode("Y banana cab dab crab " * 5, add_special=False))
    for matcher in (other, constraint.new_matcher()):
        take(matcher, tokenizer, "xxxx")


def test_drafts_do_not_show_in_where_a_grammar_fails(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_compiler, "MAX_LEXER_STATES", 2000)
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    constraint = compiler.compile(EXPLOSIVE)
    text = tokenizer.encode("Y banana cab dab crab " * 5, add_special=False)
    wanted = follow(constraint.new_matcher(), text)
    assert len(wanted) > 2
    assert follow(constraint.new_matcher(), text, tokenizer.encode("ab cabbage banana", add_special=False)) == wanted


def test_the_cache_is_bounded(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_compiler, "MAX_CACHED_GRAMMARS", 4)
    kept = compiler.compile(Grammar.regex("kept"))
    for index in range(20):
        compiler.compile(Grammar.regex(f"{index}"))
        assert compiler.compile(Grammar.regex("kept")) is kept
    assert compiler.num_cached == 4


def test_the_texts_that_the_cache_keeps_are_bounded(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that was used longest ago goes, and comes back when it is asked for; one that is too long is not kept."""
    monkeypatch.setattr(grammar_compiler, "MAX_CACHED_BYTES", 1000)
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    grammars = [Grammar.choice([letter * 70, "ø" * 35]).after("start: @answer") for letter in "abcdefghij"]
    size = grammars[0].num_bytes
    assert {each.num_bytes for each in grammars} == {size}
    assert size > 140  # bytes, not characters, and those of what comes before it too
    fit = 1000 // size
    assert 3 < fit < len(grammars)
    first, *_ = made = [compiler.compile(each) for each in grammars[:fit]]
    assert (compiler.num_cached, compiler.num_cached_bytes) == (fit, fit * size)
    assert compiler.compile(grammars[0]) is first  # which is used last now
    compiler.compile(grammars[fit])
    assert (compiler.num_cached, compiler.num_cached_bytes) == (fit, fit * size)
    assert compiler.compile(grammars[0]) is first
    assert compiler.compile(grammars[2]) is made[2]
    assert compiler.compile(grammars[1]) is not made[1]
    for each in grammars * 2:
        compiler.compile(each)
        assert compiler.num_cached_bytes == compiler.num_cached * size <= 1000
    long = Grammar.regex("a" * 1001)
    assert compiler.compile(long).new_matcher().masks()
    assert (compiler.num_cached, compiler.num_cached_bytes) == (0, 0)


def test_threads_compile_and_follow_grammars_at_once(tokenizer: Tokenizer) -> None:
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size)

    def work(index: int) -> list[bytes]:
        matcher = compiler.compile(Grammar.json_schema(SCHEMA | {"title": str(index % 3)})).new_matcher()
        found = []
        for token_id in tokenizer.encode(TEXT, add_special=False):
            found += matcher.masks()
            matcher.accept(token_id)
        return found

    with ThreadPoolExecutor(8) as pool:
        first, *others = pool.map(work, range(24))
    assert all(other == first for other in others)


def test_a_model_with_more_rows_than_tokens(tokenizer: Tokenizer) -> None:
    """None of the rows that are no token is ever allowed, nor one beyond the mask's last bit."""
    for more in (0, 1, 7, 64, 100):
        vocab_size = tokenizer.vocab_size + more
        matcher = GrammarCompiler(tokenizer, vocab_size).compile(Grammar.regex("(.|\n)*")).new_matcher()
        (mask,) = matcher.masks()
        assert len(mask) == (vocab_size + 7) // 8
        assert not any(allows(mask, token_id) for token_id in range(tokenizer.vocab_size, 8 * len(mask)))


def test_a_model_without_an_end(tmp_path: Path) -> None:
    tokenizer = GGUFTokenizer(read_gguf(tiny_llama(tmp_path / "tiny.gguf")).metadata, "tiny")
    tokenizer.eos_token_ids = frozenset()
    matcher = GrammarCompiler(tokenizer, tokenizer.vocab_size).compile(Grammar.regex("ab")).new_matcher()
    take(matcher, tokenizer, "ab")
    assert matcher.is_finished


def test_without_llguidance_it_says_what_to_install(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(InvalidInput, match="llguidance") as caught:
        GrammarCompiler(tokenizer, tokenizer.vocab_size).compile(Grammar.json_object())
    assert caught.value.hint == "pip install 'kvik[server]'"


def test_only_compiling_imports_llguidance() -> None:
    statement = "from kvik import LLM, Grammar; Grammar.json_object(); import sys; print('llguidance' in sys.modules)"
    assert python("-c", statement).stdout.strip() == "False"
