"""Thoughts, calls and text out of the tokens of an answer, while they arrive."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kvik.text.answer_events import AnswerEvent, TextDelta, ThoughtDelta
from kvik.text.chat_messages import check_tools
from kvik.text.harmony import Harmony, HarmonyParser
from kvik.text.marked_text import MARKS, MarkedStream
from kvik.text.thoughts import Place, TagSplitter, ThoughtFormat
from kvik.text.tool_calls import ToolCallParser
from kvik.text.tool_format import ToolFormat


class AnswerParser:
    """Tells an answer's parts apart; `place` is where its prompt ends, as `ThoughtFormat.place_after` says.

    The tool format, where there is one, must have been found with the thoughts' marks.
    """

    def __init__(
        self,
        thoughts: ThoughtFormat | None,
        tool_format: ToolFormat | None,
        tools: Sequence[Mapping[str, Any]],
        new_id: Callable[[int], str],
        *,
        place: Place = "header",
    ) -> None:
        marked = tool_format or thoughts
        assert marked is not None
        self._stream = MarkedStream(marked.tokenizer, marked.marked_ids)
        self.num_thought_tokens = 0
        self._parser: HarmonyParser | _TaggedParser
        if isinstance(thoughts, Harmony):
            names = [] if tool_format is None else [tool["function"]["name"] for tool in check_tools(tools) or []]
            self._parser = HarmonyParser(thoughts, names, new_id, place=place)
        else:
            splitter = None if thoughts is None else TagSplitter(thoughts, has_begun=place == "thought")
            calls = None if tool_format is None else ToolCallParser(tool_format, tools, new_id)
            self._parser = _TaggedParser(splitter, calls)

    def feed(self, token_id: int, text: str) -> list[AnswerEvent]:
        """What is known with one more token; `text` is what became certain with it, as a `Piece` has it."""
        was_thinking = self._parser.is_thinking
        events = self._parser.feed(self._stream.add(token_id, text))
        self.num_thought_tokens += was_thinking or self._parser.is_thinking
        return events

    def finish(self) -> list[AnswerEvent]:
        """What was held back, when no more tokens come."""
        return self._parser.finish()


class _TaggedParser:
    """Of an answer that may begin with a thought between tags; then come text and calls."""

    def __init__(self, splitter: TagSplitter | None, calls: ToolCallParser | None) -> None:
        self._splitter = splitter
        self._calls = calls

    @property
    def is_thinking(self) -> bool:
        """Whether what comes is a thought."""
        return self._splitter is not None and self._splitter.is_thinking

    def feed(self, text: str, *, is_last: bool = False) -> list[AnswerEvent]:
        pieces = [(False, text)] if self._splitter is None else self._splitter.feed(text, is_last=is_last)
        events: list[AnswerEvent] = []
        for is_thought, piece in pieces:
            if is_thought:
                events.append(ThoughtDelta(piece))
            elif self._calls is not None:
                events += self._calls.feed_marked(piece)
            elif plain := MARKS.sub("", piece):
                events.append(TextDelta(plain))
        return events

    def finish(self) -> list[AnswerEvent]:
        events = self.feed("", is_last=True)
        return events if self._calls is None else [*events, *self._calls.finish()]
