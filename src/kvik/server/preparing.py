"""From a request's fields to what the engine takes, for all generating routes: options, grammar and tools."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from starlette.requests import Request as HttpRequest

from kvik.engine.request import HeldOptions
from kvik.errors import InvalidGrammar
from kvik.server.errors import bad_request
from kvik.server.fields import Body, JsonObject, SamplingFields
from kvik.server.served import ServedModel
from kvik.server.state import ServerState
from kvik.text.answer_parser import AnswerParser
from kvik.text.constraint import Constraint
from kvik.text.grammar import Grammar
from kvik.text.harmony import Harmony
from kvik.text.thoughts import Place, answer_after_thought
from kvik.text.tool_format import Named, chosen_functions


class Function(Body, frozen=True, kw_only=True):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class FunctionTool(Body, tag="function", tag_field="type", frozen=True, kw_only=True):
    """OpenAI's function tool."""

    function: Function


class ChosenFunction(Body, frozen=True, kw_only=True):
    """Its name."""

    name: str


class NamedChoice(Body, tag="function", tag_field="type", frozen=True, kw_only=True):
    """The one function that must be called."""

    function: ChosenFunction


class AllowedTools(Body, frozen=True, kw_only=True):
    """Functions that may be called, of all that the prompt lists."""

    mode: Literal["auto", "required"]
    tools: list[NamedChoice]


class AllowedChoice(Body, tag="allowed_tools", tag_field="type", frozen=True, kw_only=True):
    """A choice among some of the functions, so that the prompt is the same whichever they are."""

    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedChoice | AllowedChoice


@dataclass(frozen=True, slots=True)
class Tools:
    """Tools as the template writes them, and what the model may do with them."""

    functions: Sequence[Mapping[str, Any]]
    choice: Literal["none", "auto", "required"] = "auto"
    name: str | None = None  # of the one function that must be called
    parallel: bool = True
    allowed: frozenset[str] | None = None  # names of those that may be called; None: all

    @property
    def callable(self) -> Sequence[Mapping[str, Any]]:
        """The functions that may be called."""
        if self.allowed is None:
            return self.functions
        return [each for each in self.functions if each["function"]["name"] in self.allowed]

    @classmethod
    def of(cls, tools: Sequence[FunctionTool] | None, choice: ToolChoice | None, parallel: bool | None) -> Tools | None:
        """From OpenAI's fields. Raises `ApiError`."""
        if not tools:
            if choice not in (None, "none", "auto"):
                raise bad_request("tool_choice asks for a call, but there are no tools", "tool_choice")
            return None
        names = [tool.function.name for tool in tools]
        name = choice.function.name if isinstance(choice, NamedChoice) else None
        allowed = None
        if isinstance(choice, AllowedChoice):
            allowed = frozenset(each.function.name for each in choice.allowed_tools.tools)
            choice = choice.allowed_tools.mode
            if not allowed:
                raise bad_request("tool_choice allows no tool (hint: choose none)", "tool_choice")
        for wanted in (allowed or ()) if name is None else (name,):
            if wanted not in names:
                raise bad_request(
                    f"tool_choice names {wanted[:100]!r}, the tools are {', '.join(names)[:400]}", "tool_choice"
                )
        functions = []
        for tool in tools:
            function = tool.function
            parameters = {} if function.parameters is None else {"parameters": function.parameters}
            # Several templates fail on a tool without a description.
            told = {"name": function.name, "description": function.description or "", **parameters}
            functions.append({"type": "function", "function": told})
        return cls(functions, choice if isinstance(choice, str) else "auto", name, parallel is not False, allowed)


def constraint_of(
    served: ServedModel, fields: SamplingFields, tools: Tools | None = None, place: Place | None = None
) -> Constraint | None:
    """The grammar that the answer follows, compiled; it takes its time. Raises `ApiError`, `InvalidInput`.

    Of a chat, `place` is where its prompt ends: thoughts may come before what is asked for.
    """
    wanted = structured_format(fields)
    thoughts = None if place is None else served.thoughts
    if tools is None or tools.choice == "none":
        if wanted is None:
            return None
        name, new_grammar = wanted
        before = None if thoughts is None or place is None else answer_after_thought(thoughts, place)
        try:
            grammar = new_grammar()
            return served.llm.compile_grammar(grammar if before is None else grammar.after(before))
        except InvalidGrammar as error:
            raise bad_request(f"{error.message} (hint: {error.hint})", name, code=error.code) from error
    if wanted is not None:
        raise bad_request(
            "an answer that may call tools cannot follow a format too (hint: set tool_choice to none)",
            "response_format",
            code="unsupported_combination",
        )
    choice = tools.choice if tools.name is None else Named(tools.name)
    place = place or "header"
    if isinstance(thoughts, Harmony):
        schemas = chosen_functions(tools.callable, choice)
        text = None if schemas is None else thoughts.grammar(schemas, is_forced=choice != "auto", place=place)
    else:
        text = served.tool_format.grammar(
            tools.callable, choice, parallel=tools.parallel, thoughts=thoughts, place=place
        )
    return None if text is None else served.llm.compile_grammar(Grammar.lark(text))


def make_parser(
    served: ServedModel, tools: Tools | None, place: Place, new_call_id: Callable[[int], str]
) -> AnswerParser:
    """A parser of one completion, whose calls are those of tools that may be called."""
    may_call = tools is not None and tools.choice != "none"
    functions = tools.functions if tools is not None else ()
    return AnswerParser(served.thoughts, served.tool_format if may_call else None, functions, new_call_id, place=place)


def structured_format(fields: SamplingFields) -> tuple[str, Callable[[], Grammar]] | None:
    """The one format that the fields ask for, by the name of the field. Raises `ApiError`."""
    found: dict[str, Callable[[], Grammar]] = {}
    if (wanted := fields.response_format) is not None:
        if wanted.type == "json_object":
            found["response_format"] = Grammar.json_object
        elif wanted.type == "json_schema":
            if wanted.json_schema is None or wanted.json_schema.schema is None:
                raise bad_request("response_format has no json_schema.schema", "response_format.json_schema")
            found["response_format"] = partial(Grammar.json_schema, wanted.json_schema.schema)
    given = fields.structured_outputs
    if given is None:
        prefix, schema, regex = "guided_", fields.guided_json, fields.guided_regex
        choice, lark = fields.guided_choice, fields.guided_grammar
    else:
        prefix, schema, regex = "structured_outputs.", given.json, given.regex
        choice, lark = given.choice, given.grammar
        if given.json_object:
            found["structured_outputs.json_object"] = Grammar.json_object
    if schema is not None:
        found[prefix + "json"] = partial(Grammar.json_schema, _schema(schema, prefix + "json"))
    if regex is not None:
        found[prefix + "regex"] = partial(Grammar.regex, regex)
    if choice is not None:
        found[prefix + "choice"] = partial(Grammar.choice, choice)
    if lark is not None:
        found[prefix + "grammar"] = partial(Grammar.lark, lark)
    if len(found) > 1:
        raise bad_request(f"{' and '.join(found)} contradict each other (hint: send one)", next(iter(found)))
    return next(iter(found.items()), None)


def _schema(value: JsonObject | bool | str, name: str) -> JsonObject | bool:
    if not isinstance(value, str):
        return value
    try:
        schema = json.loads(value)
    except (ValueError, RecursionError):
        schema = None
    if not isinstance(schema, dict | bool):
        raise bad_request(f"{name} is no JSON schema", name, code="invalid_json_schema")
    return schema


def options_of(
    state: ServerState, request: HttpRequest, fields: SamplingFields, constraint: Constraint | None
) -> HeldOptions:
    """The engine's options. Raises `ApiError`."""
    if fields.cache_salt is not None and not fields.cache_salt.isprintable():
        raise bad_request("cache_salt has characters that are not printable", "cache_salt")
    options: HeldOptions = {"salt": state.salt(request, fields.cache_salt)}
    if fields.cache_prompt is False:
        options["share"] = False  # computed anew, and left to nobody
    if fields.priority is not None:
        options["priority"] = fields.priority
    if constraint is not None:
        options["constraint"] = constraint
    return options


def ignored_header(names: Sequence[str]) -> dict[str, str]:
    """The header that names what was accepted and changes nothing; no header has other signs than those of a name."""
    fit = [name for name in names if re.fullmatch(r"[\w.]+", name, re.ASCII)]
    return {"x-kvik-ignored": ",".join(fit)} if fit else {}
