"""How a model writes tool calls, found by what its own chat template makes of a call that we know.

The idea is that of llama.cpp's auto-parser: render the same conversation with an answer in plain text, with one call
and with two, and see what the template put around names and arguments. Marked text is compared, in which a control
token is one character, since the names of two of them may begin alike.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kvik.errors import TemplateError, ToolsNotSupported
from kvik.text.chat_template import ChatTemplate
from kvik.text.marked_text import ID_CHARACTER, MARKS, MAX_MARKS, Marker, TooManyMarksError
from kvik.text.tokenizer import Tokenizer
from kvik.text.tool_format import CALL_ID_LENGTH, NAME_CHARACTER, ToolFormat
from kvik.text.tool_pairs import Pairs, manners

MAX_ANSWER_LENGTH = 4000  # characters of what a template makes of two short calls
MIN_TRIGGER_LENGTH = 3

QUESTION, ANSWER = "kvik question", "~plain words~"
KEY = "kvik_key"
RICH: Mapping[str, Any] = {"kvik_list": [True, {"kvik_inner": "kvik text"}, 2]}
_HINT = "take a model whose template writes calls in a known way, or leave out the tools"

_HALF_TAG_LAST = re.compile("[<\\[][^<>\\[\\]\\s\ud800-\udfff]*$")
_HALF_TAG_FIRST = re.compile("[^<>\\[\\]\\s\ud800-\udfff]*[>\\]]")


@dataclass(frozen=True)
class _Call:
    name: str
    value: str
    call_id: str

    others: Mapping[str, Any] = field(default_factory=lambda: {"kvik_number": 1})

    @property
    def arguments(self) -> dict[str, Any]:
        return {KEY: self.value, **self.others} if self.value else {}

    @property
    def given(self) -> str:
        """The arguments as no template writes them, so that it shows where one takes them as they are."""
        return json.dumps(self.arguments, separators=(" ,  ", " :  "))

    def message(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": self.given}
        return {"id": self.call_id, "type": "function", "function": function}

    def tool(self) -> dict[str, Any]:
        described = {"description": "kvik description"}  # which some templates want
        properties = {KEY: {"type": "string", **described}, "kvik_number": {"type": "integer", **described}}
        parameters = {"type": "object", "properties": properties, "required": [KEY]}
        function = {"name": self.name, "parameters": parameters, **described}
        return {"type": "function", "function": function}


FIRST = _Call("kvik_first", "kvik value", "kvikcall1")
SECOND = _Call("kvik_second", "kvik other", "kvikcall2")


class _UnlikeError(Exception):
    """The text is not as calls are written: a line that says why."""


def detect_tool_format(template: ChatTemplate, tokenizer: Tokenizer, marked_ids: Sequence[int] = ()) -> ToolFormat:
    """How the model writes tool calls: for its caller to keep, since it takes some renderings.

    The control tokens of `marked_ids` keep the marks that they have by their order.
    Raises ToolsNotSupported where the template takes no tools, or writes calls in a way that is not known.
    """
    try:
        return _Detection(template, tokenizer, marked_ids).format()
    except TemplateError as error:
        raise ToolsNotSupported(f"the model's chat template fails with tools: {error.message}", hint=_HINT) from error
    except TooManyMarksError as error:
        raise ToolsNotSupported(
            f"the model's chat template has more than {MAX_MARKS} control tokens in an answer", hint=_HINT
        ) from error
    except _UnlikeError as error:
        raise ToolsNotSupported(f"the model's chat template {error}", hint=_HINT) from error


class _Detection:
    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer, marked_ids: Sequence[int]) -> None:
        self._template = template
        self._tokenizer = tokenizer
        self._marker = Marker(tokenizer, marked_ids)

    def format(self) -> ToolFormat:
        question = [{"role": "user", "content": QUESTION}]
        if FIRST.name not in self._template.render(question, tools=[FIRST.tool()]):
            raise _UnlikeError("ignores tools")
        plain = self._answer({"content": ANSWER})
        one = self._written(plain, FIRST)
        pairs = None
        try:
            begin, between, after_one = _literals(one, [FIRST], None)
        except _UnlikeError:
            if (pairs := self._pairs(plain, one)) is None:
                raise
            begin, between, after_one = _literals(one, [FIRST], pairs)
        after, separator, end = self._several(plain, begin, between, after_one, pairs)
        begin = begin[self._end_of_thought(begin) :]
        form = self._checked(begin, between, after, separator, end, self._lead(begin), _json_separators(one), pairs)
        if pairs is not None and not form.after:
            raise _UnlikeError("sets no end to the arguments of a call")
        return form

    def _written(self, plain: str, *calls: _Call) -> str:
        """What stands for the calls, where plain text would stand."""
        return self._differing(self._answer({"tool_calls": [call.message() for call in calls]}), plain)

    def _pairs(self, plain: str, one: str) -> Pairs | None:
        """The manner of arguments that are no JSON; None where it is none that is known."""
        try:
            empty = self._written(plain, replace(FIRST, value=""))
            rich = self._written(plain, replace(FIRST, others=RICH))
        except (TemplateError, _UnlikeError):
            return None
        found = _pairs_of(one, empty)
        if found is None:
            return None
        arguments = replace(FIRST, others=RICH).arguments
        fitting = (manner for manner in manners(found) if manner.write(arguments) in rich)
        # Python's own way to write a list may stand in tags: the model is held to JSON there.
        return next(fitting, found if found.kind == "raw" else None)

    def _several(
        self, plain: str, begin: str, between: str, after_one: str, pairs: Pairs | None
    ) -> tuple[str, str | None, str]:
        """What comes after a call's arguments in any case, between two calls, and after the last."""
        try:
            two = self._written(plain, FIRST, SECOND)
            begin_two, between_first, middle, between_second, after_two = _literals(two, [FIRST, SECOND], pairs)
        except (TemplateError, _UnlikeError):
            return after_one, None, ""
        # Some templates end calls in full only where there are several.
        alike = begin_two == begin and between_first == between_second == between and after_two.startswith(after_one)
        after = middle[: _num_common(middle, after_two)]
        if not alike or len(after) == len(middle):
            return after_one, None, ""
        return after, middle[len(after) :], after_two[len(after) :]

    def _end_of_thought(self, begin: str) -> int:
        """Where an empty thought ends, which some templates put before a call and no model has to."""
        marks = [mark for mark in MARKS.finditer(begin) if "think" in self._name(mark[0]).lower()]
        tags = re.finditer("<[^<>\ud800-\udfff]*think[^<>\ud800-\udfff]*>\\s*", begin, re.IGNORECASE)
        return max((found.end() for found in (*marks, *tags)), default=0)

    def _name(self, mark: str) -> str:
        return "" if mark == ID_CHARACTER else self._tokenizer.token_text(self._marker.id_of(mark))

    def _lead(self, begin: str) -> str:
        """The space between a text and the first call."""
        space = begin[: len(begin) - len(begin.lstrip())]
        try:
            both = self._answer({"content": ANSWER, "tool_calls": [FIRST.message()]})
        except TemplateError:
            return space
        lead = both.rpartition(begin + FIRST.name)[0].rpartition(ANSWER)[2]
        return lead + space if ANSWER + lead + begin in both and not lead.strip() else space

    def _checked(
        self,
        begin: str,
        between: str,
        after: str,
        separator: str | None,
        end: str,
        lead: str,
        json_separators: tuple[str, str] | None,
        pairs: Pairs | None,
    ) -> ToolFormat:
        head = begin.lstrip()
        is_bare = head.startswith(("{", "["))
        if is_bare:
            begin = trigger = head
        else:
            # The first token or tag or word: with what comes after it the grammar helps.
            found = re.match("[\ud800-\udfff]|[^\\s>\\]\ud800-\udfff]+[>\\]]?", head)
            trigger = found[0] if found else ""
        has_names = is_bare and pairs is not None  # behind the trigger, so that it need not be long
        is_mark = not is_bare and trigger != ID_CHARACTER and MARKS.fullmatch(trigger)
        if not is_mark and not has_names and (len(trigger) < MIN_TRIGGER_LENGTH or MARKS.search(trigger)):
            raise _UnlikeError("begins calls with nothing of their own")
        if NAME_CHARACTER.match(between):
            raise _UnlikeError("sets no end to the name of a call")
        return ToolFormat(
            begin=begin,
            between=between,
            after=after,
            separator=separator,
            end=end,
            lead=lead,
            trigger=trigger,
            is_bare=is_bare,
            marked_ids=tuple(self._marker.marked_ids),
            json_separators=json_separators,
            tokenizer=self._tokenizer,
            pairs=pairs,
        )

    def _ends_a_turn(self, mark: str) -> bool:
        return self._marker.id_of(mark) in self._tokenizer.eos_token_ids

    def _answer(self, message: Mapping[str, Any]) -> str:
        """The marked text from the question's end on, where the assistant answers with the message."""
        text = self._template.render(
            [{"role": "user", "content": QUESTION}, {"role": "assistant", **message}],
            add_generation_prompt=False,
            tools=[FIRST.tool(), SECOND.tool()],
        )
        text = text.rpartition(QUESTION)[2]
        if len(text) > MAX_ANSWER_LENGTH:
            raise _UnlikeError(f"makes {len(text):,} characters of one short answer")
        return self._marker.read(text)

    def _differing(self, answer: str, plain: str) -> str:
        """The answer without what it has in common with plain text, up to the end of its turn."""
        start = _num_common(answer, plain)
        stop = len(answer) - _num_common(answer[start:][::-1], plain[start:][::-1])
        # Tags may begin or end alike.
        if (tag := _HALF_TAG_LAST.search(answer, 0, start)) is not None:
            start = tag.start()
        if (tag := _HALF_TAG_FIRST.match(answer, stop)) is not None:
            stop = tag.end()
        ends = (mark.start() for mark in MARKS.finditer(answer, start, stop) if self._ends_a_turn(mark[0]))
        return answer[start : next(ends, stop)]


def _num_common(left: str, right: str) -> int:
    """How many characters both begin with."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(left), len(right)))


def _literals(text: str, calls: Sequence[_Call], pairs: Pairs | None) -> list[str]:
    """The marked text before, between and after names and arguments of the calls. Raises _UnlikeError."""
    for call in calls:
        text = text.replace(call.call_id, ID_CHARACTER * CALL_ID_LENGTH)
    literals, at = [], 0
    for call in calls:
        if call.name not in text:
            raise _UnlikeError("takes tools, but leaves out calls")
        if text.count(call.name) > 1:
            raise _UnlikeError(f"writes the name of a call {text.count(call.name)} times")
        start = text.find(call.name, at)
        stop = start + len(call.name)
        key = text.find(KEY, at)
        if not at <= start < key:
            raise _UnlikeError("writes a call without arguments after its name")
        opening, closing = _arguments_at(text, stop, key, call, pairs)
        literals += [text[at:start], text[stop:opening]]
        at = closing
    return [*literals, text[at:]]


def _arguments_at(text: str, stop: int, key: int, call: _Call, pairs: Pairs | None) -> tuple[int, int]:
    """Where the arguments of a call begin and end, whose name ends at `stop` and whose first key is at `key`."""
    if pairs is not None:
        written = pairs.write(call.arguments)
        if (opening := text.find(written, stop)) < 0:
            raise _UnlikeError("writes the calls of one answer differently")
        return opening, opening + len(written)
    opening = text.rfind("{", stop, key)
    try:
        arguments, closing = json.JSONDecoder().raw_decode(text, max(opening, 0))
    except (ValueError, RecursionError):
        arguments = None
    if opening < 0 or arguments != call.arguments:
        raise _UnlikeError(f"writes calls {_notation(text[stop:key])}, not with JSON arguments")
    return opening, closing


def _pairs_of(one: str, empty: str) -> Pairs | None:
    """The manner of a call's two arguments, a text and a number; `empty` is the same call without any."""
    value, number = FIRST.arguments.values()
    keys = list(FIRST.arguments)
    parts = re.fullmatch(f"(.*){FIRST.name}(.*){keys[0]}(.*){value}(.*){keys[1]}(.*?){number}(\\D.*)", one, re.DOTALL)
    if parts is None or FIRST.name not in empty:
        return None
    _, opening, to_text, between, middle, closing = parts.groups()
    without = empty.rpartition(FIRST.name)[2]
    quote = to_text.removeprefix(middle)
    if not middle or not to_text.startswith(middle) or not between.startswith(quote):
        return None
    between = between[len(quote) :]
    common = _num_common(without, opening)
    if (tag := _HALF_TAG_LAST.search(without, 0, common)) is not None:
        common = tag.start()
    end = without[common:]
    if not end or not closing.endswith(end):
        return None
    before, after = opening[common:], closing[: len(closing) - len(end)]
    if not between.startswith(after) or not between[len(after) :].endswith(before):
        return None
    separator = between[len(after) : len(between) - len(before)]
    is_ended = len(after.strip()) >= MIN_TRIGGER_LENGTH or MARKS.search(after)
    if (not quote and not is_ended) or (quote and not separator.strip()):
        return None
    return Pairs(before, middle, after, separator, quote)


def _notation(between: str) -> str:
    if "(" in between:
        return "as Python does"
    return "as XML" if "<" in between else "in a notation of its own"


def _json_separators(text: str) -> tuple[str, str] | None:
    """What the template writes between items and after keys; None where it leaves the JSON to others, or indents it."""
    both = ((", ", ": "), (",", ":"))
    return next((pair for pair in both if json.dumps(FIRST.arguments, separators=pair) in text), None)
