"""Tool calls out of the tokens of an answer, while they arrive."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvik.text.answer_events import ArgumentsDelta, CallBegin, CallEnd, TextDelta, ToolEvent
from kvik.text.chat_messages import check_tools
from kvik.text.json_arguments import JsonArguments
from kvik.text.marked_text import ID_CHARACTER, MARKS, MarkedStream, overlap
from kvik.text.tool_format import CALL_ID_LENGTH, ToolFormat
from kvik.text.tool_pairs import PairsReader

LONG_ID_LENGTH = 24


class ToolCallParser:
    """Tells the calls in one answer from its text, token by token.

    `new_id` makes as many random letters and digits as it is asked for. Text that may yet be the beginning of a call
    is held back; what is no call after all is text, to the last character. A call has begun with its name and the `{`
    of its arguments, or what else stands between the two.
    """

    def __init__(self, format: ToolFormat, tools: Sequence[Mapping[str, Any]], new_id: Callable[[int], str]) -> None:
        schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in check_tools(tools) or []}
        self._schemas = {name: schema or {} for name, schema in schemas.items()}
        self._format = format
        self._new_id = new_id
        head = format.begin.lstrip()
        opening = format.between + ("{" if format.pairs is None else "")
        self._first = {head + name + opening: name for name in schemas}
        self._ended = format.after + format.end
        self._next: dict[str, str] = {}
        if format.separator is not None:
            before = format.after + format.separator
            self._next = {before + name + opening: name for name in schemas}
        self._stream = MarkedStream(format.tokenizer, format.marked_ids)
        self._pending = ""  # marked text that no event has told of
        self._state = self._in_text
        self._text_begins = True
        self._lead = ""  # what stands before the head of a call, if it is one
        self._num_calls = 0
        self._arguments: JsonArguments | PairsReader = JsonArguments()
        self._finished = False

    def feed(self, token_id: int, text: str) -> list[ToolEvent]:
        """What is known with one more token; `text` is what became certain with it, as a `Piece` has it."""
        return self.feed_marked(self._stream.add(token_id, text))

    def feed_marked(self, text: str) -> list[ToolEvent]:
        """The same for marked text, of whoever has it already."""
        self._pending += text
        return self._events()

    def finish(self) -> list[ToolEvent]:
        """What was held back, when no more tokens come."""
        self._finished = True
        return self._events()

    def _events(self) -> list[ToolEvent]:
        events: list[ToolEvent] = []
        while (found := self._state()) is not None:
            for event in found:
                last = events[-1] if events else None
                if isinstance(event, TextDelta) and isinstance(last, TextDelta):
                    events[-1] = TextDelta(last.text + event.text)
                else:
                    events.append(event)
        return events

    # Each state takes what it can of the pending text and gives its events, or None when it needs more text.

    def _in_text(self) -> list[ToolEvent] | None:
        if self._format.is_bare:
            return self._in_text_of_bare_format()
        at = self._pending.find(self._format.trigger)
        if at < 0:
            lead, trigger = self._format.lead, self._format.trigger
            held = 0 if self._finished else max(overlap(self._pending, lead + trigger), overlap(self._pending, trigger))
            return self._take_text(len(self._pending) - held) or None
        before = self._pending[:at]
        self._lead = self._format.lead if before.endswith(self._format.lead) else ""
        events = self._take_text(at - len(self._lead))
        self._pending = self._pending.removeprefix(self._lead)
        self._state = self._in_head
        return events

    def _in_text_of_bare_format(self) -> list[ToolEvent] | None:
        if not self._pending:
            return None
        mark = MARKS.search(self._pending)
        if mark is not None and (mark.start() == 0 or not self._text_begins):
            self._text_begins = True
            return self._take_text(mark.end())
        if self._text_begins:
            self._text_begins = False
            self._state = self._in_head
            return []
        return self._take_text(len(self._pending))

    def _in_head(self) -> list[ToolEvent] | None:
        candidate, may_grow = self._match(self._first)
        if candidate is not None:
            return self._begin_call(candidate, self._first[candidate])
        if may_grow and not self._finished:
            return None
        self._pending = self._lead + self._pending
        self._state = self._in_text
        # Of other formats the trigger may stand again in what follows its own first character.
        return self._take_text(0 if self._format.is_bare else len(self._lead) + 1)

    def _begin_call(self, head: str, name: str) -> list[ToolEvent]:
        pairs = self._format.pairs
        self._state = self._in_arguments
        random = self._new_id(CALL_ID_LENGTH if self._format.has_ids else LONG_ID_LENGTH)
        self._num_calls += 1
        begun = CallBegin(self._num_calls - 1, random if self._format.has_ids else f"call_{random}", name)
        if pairs is None:
            self._pending = self._pending[len(head) - 1 :]
            self._arguments = JsonArguments()
            return [begun]
        self._pending = self._pending[len(head) :]
        self._arguments = PairsReader(pairs, self._format.after, self._schemas[name])
        return [begun, ArgumentsDelta(begun.index, "{")]

    def _in_arguments(self) -> list[ToolEvent] | None:
        index = self._num_calls - 1
        num_read, text, is_over = self._arguments.read(self._pending)
        if not (num_read or text or is_over):
            return None
        self._pending = self._pending[num_read:]
        events: list[ToolEvent] = [ArgumentsDelta(index, text)] if text else []
        if is_over:
            self._state = self._after_arguments
            events.append(CallEnd(index))
        return events

    def _after_arguments(self) -> list[ToolEvent] | None:
        candidate, may_grow = self._match({self._ended: "", **self._next})
        if may_grow and not self._finished:
            return None
        if candidate is not None and candidate != self._ended:
            return self._begin_call(candidate, self._next[candidate])
        if candidate is None and may_grow:  # the answer was cut off here
            self._pending = ""
        self._pending = self._pending[len(candidate or "") :]
        self._text_begins = False
        self._state = self._in_text
        return []

    def _match(self, candidates: Mapping[str, str]) -> tuple[str | None, bool]:
        """The longest candidate that the pending text begins with, and whether a longer one may yet be."""
        text = self._pending
        fitting = [candidate for candidate in candidates if _fits(candidate, text)]
        whole = [candidate for candidate in fitting if len(candidate) <= len(text)]
        return max(whole, key=len, default=None), len(whole) < len(fitting)

    def _take_text(self, length: int) -> list[ToolEvent]:
        text = MARKS.sub("", self._pending[:length])
        self._pending = self._pending[length:]
        return [TextDelta(text)] if text else []


def _fits(pattern: str, text: str) -> bool:
    """Whether one of pattern and text begins with the other."""
    if ID_CHARACTER not in pattern:
        return text.startswith(pattern) or pattern.startswith(text)
    return all(
        want == have or (want == ID_CHARACTER and have.isascii() and have.isalnum())
        for want, have in zip(pattern, text, strict=False)
    )
