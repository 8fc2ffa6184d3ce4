"""How one model writes tool calls, and the grammar that makes it write them so.

A call's arguments are JSON, or pairs of name and value. A format's literals are *marked text*: text in which a half of
a surrogate pair, which no decoded text can hold, stands for a control token, and another for a character of a call's
id.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from kvik.errors import InvalidInput
from kvik.text.chat_messages import check_tools
from kvik.text.grammar import MAX_GRAMMAR_BYTES
from kvik.text.marked_text import FIRST_MARK, ID_CHARACTER, MARKS, mark_of, ranges_lark
from kvik.text.pairs_grammar import PairsGrammar
from kvik.text.thoughts import Place, ThoughtTags, thought_rules
from kvik.text.tokenizer import Tokenizer
from kvik.text.tool_pairs import Pairs

MAX_TOOLS = 128
MAX_SCHEMA_BYTES = 1 << 16  # of one tool
MAX_SCHEMA_OBJECTS = 2000  # of all tools; what a grammar costs grows with it

CALL_ID_LENGTH = 9  # where a model writes ids; Mistral's alone do, and their templates refuse any other length
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
NAME_CHARACTER = re.compile(r"[A-Za-z0-9_.-]")


_NOTES = frozenset({"description", "title", "examples", "default", "$comment"})
_SCHEMAS_BY_NAME = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_SCHEMAS = frozenset({"items", "prefixItems", "additionalProperties", "anyOf", "oneOf", "allOf"})
"""Keywords of a schema: those without a meaning for what is valid, and those that hold further schemas."""


@dataclass(frozen=True)
class Named:
    """The choice of one tool, which is called once."""

    name: str


ToolChoice: TypeAlias = Literal["none", "auto", "required"] | Named


@dataclass(frozen=True)
class ToolFormat:
    """The marked text around names and arguments of calls.

    Calls are `begin`, name, `between`, arguments, `after`; then for each further one `separator`, name, `between`,
    arguments, `after`; then `end`, and with it the turn. Without a `separator` there is one call.

    `trigger` is what no other text holds: with it, a call has begun. A *bare* format has nothing before its names but
    JSON or a bracket, so its trigger is all of `begin`, with the name where the arguments are `pairs`, and counts only
    where text begins: first of all, or after a control token.
    """

    begin: str
    between: str
    after: str
    separator: str | None
    end: str
    lead: str  # what stands between other text and the first call, and belongs to neither
    trigger: str
    is_bare: bool
    marked_ids: tuple[int, ...]  # the control tokens, in the order of their marks
    json_separators: tuple[str, str] | None  # between items and after keys, where the template writes the JSON
    tokenizer: Tokenizer = field(repr=False, compare=False)
    pairs: Pairs | None = None  # the manner of the arguments; None: JSON

    @property
    def has_ids(self) -> bool:
        """Whether the model writes an id for each call."""
        return ID_CHARACTER in self.begin + self.between + self.after + (self.separator or "") + self.end

    def mark_of(self, token_id: int) -> str:
        """What stands for a control token in marked text."""
        return mark_of(token_id, self.marked_ids)

    def grammar(
        self,
        tools: Sequence[Mapping[str, Any]] | None,
        choice: ToolChoice = "auto",
        *,
        parallel: bool = True,
        thoughts: ThoughtTags | None = None,
        place: Place = "header",
    ) -> str | None:
        """The grammar of an answer, in llguidance's Lark; None where calls are not to be written.

        With `auto` any text may stand before the calls, and nothing after them, as in the messages of the API. Without
        `parallel`, and for a named tool, it is one call. A thought may come before all else, and ends first where
        `place` says that the prompt has begun it. Raises InvalidInput for tools, schemas and choices that are none, by
        the tool's name, and for tools that are too much for one grammar.
        """
        schemas = chosen_functions(tools, choice)
        if schemas is None:
            return None
        several = parallel and not isinstance(choice, Named) and self.separator is not None
        text = "\n".join([*self._start(schemas, choice == "auto", thoughts, place), *self._calls(schemas, several), ""])
        if (num_bytes := len(text.encode())) > MAX_GRAMMAR_BYTES:
            raise InvalidInput(
                f"tools make a grammar of {num_bytes:,} bytes, more than {MAX_GRAMMAR_BYTES:,}",
                hint="send fewer tools, or simpler schemas; descriptions do not count",
            )
        return text

    def _start(
        self, schemas: Mapping[str, Any], is_auto: bool, thoughts: ThoughtTags | None, place: Place
    ) -> Iterator[str]:
        yield "%llguidance {}"
        head, begin, not_thought = self.begin.lstrip(), "", ""
        thought_ids: frozenset[int] = frozenset()
        if thoughts is not None:
            begin = "thought" if place == "thought" else "thought?"
            yield from thought_rules(thoughts, place=place)
            thought_ids = frozenset(thoughts.marked_ids)
            if not MARKS.match(thoughts.begin) and place != "thought":
                not_thought = f" & ~({self._lark(thoughts.begin)} ANY*)"
        if not is_auto:
            if thoughts is None:
                yield f"start: {self._lark(self.begin)} calls"
            else:
                yield f"start: thought {self._lark(head)} calls" + (
                    "" if place == "thought" else f" | {self._lark(self.begin)} calls"
                )
            return
        controls = self.tokenizer.special_token_ids - self.tokenizer.eos_token_ids - self._trigger_ids() - thought_ids
        others = ranges_lark(controls)
        text_before = f"{begin} (TEXT? other)*" if others else begin
        if others:
            yield f"other: <[{others}]>"
        yield "ANY: /(?s:.)/"
        trigger = self._lark(self.trigger)
        if self.is_bare and self.pairs is not None:
            firsts = [self._lark(head + name + self.between) for name in schemas]
            yield f"start: {text_before} (TEXT | calls_after_names)?"
            yield f"TEXT: ANY+ & ~(({' | '.join(firsts)}) ANY*){not_thought}"
            begun = (f"{first} call_{at}_rest" for at, first in enumerate(firsts))
            yield f"calls_after_names: ({' | '.join(begun)}) more_calls"
        elif self.is_bare:
            yield f"start: {text_before} (TEXT | {self._lark(head)} calls)?"
            yield f"TEXT: ANY+ & ~({trigger} ANY*){not_thought}"
        elif self._trigger_ids():
            yield f"start: {text_before} TEXT? ({self._lark(head)} calls)?"
            yield f"TEXT: ANY+{not_thought}"
        else:
            yield f"start: {text_before} (TEXT | until {self._lark(head.removeprefix(self.trigger))} calls)?"
            yield f"TEXT: ANY+ & ~(ANY* {trigger} ANY*){not_thought}"
            before = f"(ANY*{not_thought})" if not_thought else "ANY*"
            yield f"until[lazy]: {before} {trigger}"

    def _trigger_ids(self) -> frozenset[int]:
        return frozenset(token_id for token_id in self.marked_ids if self.mark_of(token_id) in self.trigger)

    def _calls(self, schemas: Mapping[str, Mapping[str, Any]], several: bool) -> Iterator[str]:
        more = f"({self._lark(self.separator)} call)*" if several and self.separator else ""
        yield "calls: call more_calls"
        yield f"more_calls: {more} {self._lark(self.end)}" if more or self.end else 'more_calls: ""'
        yield "call: " + " | ".join(f"call_{index}" for index in range(len(schemas)))
        options: dict[str, object] = {"whitespace_flexible": self.json_separators is None}
        if self.json_separators is not None:
            options |= dict(zip(("item_separator", "key_separator"), self.json_separators, strict=True))
        for index, (name, schema) in enumerate(schemas.items()):
            arguments = "%json " + json.dumps({**schema, "x-guidance": options})
            if self.pairs is not None:
                rules = PairsGrammar(self.pairs, self._lark, name, schema, f"a{index}")
                arguments = rules.arguments()
                yield from rules.rules
            yield f"call_{index}: {self._lark(name + self.between)} call_{index}_rest"
            yield f"call_{index}_rest: {arguments} {self._lark(self.after)}"
        if self.has_ids:
            yield f"CALL_ID: /[A-Za-z0-9]{{{CALL_ID_LENGTH}}}/"

    def _lark(self, literal: str) -> str:
        """Marked text as Lark has it."""
        parts = []
        for part in re.findall("[^\ud800-\udfff]+|\udffe+|.", literal, re.DOTALL):
            if part[0] == ID_CHARACTER:
                parts.append("CALL_ID")
            elif MARKS.match(part):
                parts.append(f"<[{self.marked_ids[ord(part) - ord(FIRST_MARK)]}]>")
            else:
                parts.append(json.dumps(part, ensure_ascii=False))
        return " ".join(parts)


def chosen_functions(tools: Sequence[Mapping[str, Any]] | None, choice: ToolChoice) -> dict[str, dict[str, Any]] | None:
    """The schemas of the tools that may be called, by name; None where none is to be. Raises InvalidInput."""
    schemas = check_functions(tools)
    if isinstance(choice, Named):
        if choice.name not in schemas:
            raise InvalidInput(
                f"tool_choice names {choice.name!r:.80}, which is none of the tools",
                hint="name one of: " + (", ".join(schemas) or "there are no tools"),
            )
        schemas = {choice.name: schemas[choice.name]}
    elif choice not in ("none", "auto", "required"):
        raise InvalidInput(f"tool_choice is {choice!r:.80}", hint="choose none, auto, required or the name of one tool")
    if choice == "required" and not schemas:
        raise InvalidInput("tool_choice is required, but there are no tools", hint="send tools, or choose auto")
    return None if choice == "none" or not schemas else schemas


def check_functions(tools: Sequence[Mapping[str, Any]] | None) -> dict[str, dict[str, Any]]:
    """The schema of each tool's arguments, by its name. Raises InvalidInput, which names the tool."""
    checked = check_tools(tools) or []
    if len(checked) > MAX_TOOLS:
        raise InvalidInput(f"there are {len(checked):,} tools, more than {MAX_TOOLS}", hint="send fewer tools")
    schemas: dict[str, dict[str, Any]] = {}
    num_objects = 0
    for tool in checked:
        name = tool["function"]["name"]
        if not _NAME.fullmatch(name):
            raise InvalidInput(
                f"the tool {name!r:.80} has a name that no model can write",
                hint="use at most 64 of the letters a to z, digits, '_', '-' and '.'",
            )
        if name in schemas:
            raise InvalidInput(f"two tools have the name {name!r}", hint="give each tool a name of its own")
        schemas[name] = _object_schema(name, tool["function"].get("parameters") or {})
        num_objects += _check_size(name, schemas[name])
        if num_objects > MAX_SCHEMA_OBJECTS:
            raise InvalidInput(
                f"the schemas of the tools have more than {MAX_SCHEMA_OBJECTS:,} objects",
                hint="send fewer tools, or simpler ones",
            )
        _check_schema(name, schemas[name])
        schemas[name] = _without_notes(schemas[name])
    return schemas


def _without_notes(schema: Any) -> Any:
    """A checked schema without what only describes: the prompt has it, and a grammar's size is bounded."""
    if not isinstance(schema, Mapping):
        return schema
    kept: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _NOTES:
            continue
        if key in _SCHEMAS_BY_NAME and isinstance(value, Mapping):
            kept[key] = {name: _without_notes(each) for name, each in value.items()}
        elif key in _SCHEMAS and isinstance(value, list | tuple):
            kept[key] = [_without_notes(each) for each in value]
        elif key in _SCHEMAS:
            kept[key] = _without_notes(value)
        else:
            kept[key] = value
    return kept


def _object_schema(name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema, which is of an object even where it does not say so: arguments are nothing else."""
    if schema.get("type", "object") != "object":
        raise InvalidInput(
            f"the parameters of the tool {name!r} are of type {schema['type']!r:.80}, not an object",
            hint='send a JSON schema with "type": "object"',
        )
    return {"type": "object", **schema}


def _check_size(name: str, schema: Mapping[str, Any]) -> int:
    """The number of objects in the schema."""
    try:
        num_bytes = len(json.dumps(schema, allow_nan=False).encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidInput(
            f"the parameters of the tool {name!r} are not JSON: {error}", hint="send a JSON schema"
        ) from error
    if num_bytes > MAX_SCHEMA_BYTES:
        raise InvalidInput(
            f"the parameters of the tool {name!r} have {num_bytes:,} bytes, more than {MAX_SCHEMA_BYTES:,}",
            hint="send a simpler schema",
        )
    num_objects, left = 0, [schema]
    while left:
        value: Any = left.pop()
        num_objects += isinstance(value, Mapping)
        if isinstance(value, Mapping):
            left += value.values()
        elif isinstance(value, list | tuple):
            left += value
    return num_objects


def _check_schema(name: str, schema: Mapping[str, Any]) -> None:
    """Raise InvalidInput for a schema with what no grammar is made of, so that no keyword of it is passed over."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(
        initial_lexer_fuel=100_000, max_grammar_size=50_000, max_lexer_states=20_000, verbose_errors=False
    )
    grammar = json.dumps({"grammars": [{"json_schema": {**schema, "x-guidance": {}}}]})
    if error := LLMatcher.validate_grammar(grammar, limits=limits):
        raise InvalidInput(
            f"the parameters of the tool {name!r} cannot be kept to: {error.splitlines()[0]:.200}",
            hint="leave this out of the schema, and check it in the tool itself",
        )
