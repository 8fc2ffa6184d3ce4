"""An answer of items, thoughts, texts and calls in order, as Responses and Messages have it: streamed or whole."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from kvik.engine.output import Piece, TokenLogprobs
from kvik.engine.stream import PieceFeed
from kvik.server.event_stream import CallWriter, logprobs_entry
from kvik.server.generation import Running
from kvik.server.sse import event
from kvik.text.answer_events import ArgumentsDelta, CallBegin, CallEnd, ThoughtDelta

ItemKind: TypeAlias = Literal["thought", "text", "call"]


@dataclass(slots=True)
class Item:
    """A thought, a text or a call."""

    at: int
    id: str
    kind: ItemKind = "text"
    call_id: str = ""
    name: str = ""
    parts: list[str] = field(default_factory=list)  # of the text, or of the arguments' JSON
    logprobs: list[dict[str, Any]] = field(default_factory=list)  # of its tokens, as OpenAI's API has them
    is_whole: bool = False

    @property
    def text(self) -> str:
        """What is written of it."""
        return "".join(self.parts)


class ItemWriter(CallWriter):
    """Each item has events of its beginning, its growth and its end, and the writer keeps them all.

    The logprobs of a token are those of the item that is open when its text is known, or of the next one. Where they
    are asked for, a call ends with what comes behind it, so that those of its last tokens are the call's.
    """

    def __init__(self, running: Running) -> None:
        super().__init__(running)
        self.items: list[Item] = []
        self._open: Item | None = None
        self._logprobs: list[dict[str, Any]] = []  # of tokens whose text no event has told of

    @abstractmethod
    def item_id(self, kind: ItemKind) -> str:
        """An id for a new item."""

    @abstractmethod
    def item_begin(self, item: Item) -> bytes:
        """An item begins."""

    @abstractmethod
    def item_delta(self, item: Item, text: str, logprobs: list[dict[str, Any]]) -> bytes:
        """More of an item."""

    @abstractmethod
    def item_end(self, item: Item) -> bytes:
        """An item has ended, whole or not."""

    def text(self, index: int, text: str, logprobs: TokenLogprobs | None) -> bytes:
        """More text; where it may yet be of a call, its logprobs wait."""
        if logprobs is not None:
            self._logprobs.append(logprobs_entry(self.running, logprobs))
        if not text and self.running.parsers is not None:
            return b""
        return self._add("text", text)

    def thought(self, index: int, event: ThoughtDelta) -> bytes:
        """More of a thought."""
        return self._add("thought", event.text)

    def call_begin(self, index: int, event: CallBegin) -> bytes:
        """A call begins, and the text before it has ended."""
        if self._open is not None:
            self._open.is_whole = True
        return self._end() + self._begin("call", event.call_id, event.name)

    def call_arguments(self, index: int, event: ArgumentsDelta) -> bytes:
        """More of a call's arguments."""
        return self._grow(event.text)

    def call_end(self, index: int, event: CallEnd) -> bytes:
        """A call is whole."""
        assert self._open is not None
        self._open.is_whole = True
        return self._end() if self.running.generation.params.logprobs is None else b""

    def finish(self, index: int, piece: Piece) -> bytes:
        """The last item ends."""
        data = b""
        if self._logprobs:
            data = self._add("text", "") if self._open is None and not self.items else self._tell_logprobs()
        if self._open is not None and self._open.kind != "call":
            self._open.is_whole = self.running.branches[index].finish_reason == "stop"
        return data + self._end()

    def replay(self) -> None:
        """Take all items of a finished answer that nobody has streamed."""
        engine = self.running.served.llm.engine
        # Without the engine's lock: nobody changes what is finished, and a step would be waited for.
        self.pieces([piece for branch in self.running.branches for piece in PieceFeed(engine, branch).take()])

    @property
    def num_calls(self) -> int:
        """Calls among the items."""
        return sum(item.kind == "call" for item in self.items)

    def _add(self, kind: ItemKind, text: str) -> bytes:
        data = b""
        if self._open is None or self._open.kind != kind:
            if self._open is not None and self._open.kind == "thought":
                self._open.is_whole = True
            data = self._end() + self._begin(kind)
        return data + self._grow(text)

    def _grow(self, text: str) -> bytes:
        assert self._open is not None
        logprobs, self._logprobs = self._logprobs, []
        self._open.parts.append(text)
        self._open.logprobs += logprobs
        return self.item_delta(self._open, text, logprobs)

    def _tell_logprobs(self) -> bytes:
        """Those that are left are the last item's, which may have been told already."""
        if self._open is not None:
            return self._grow("")
        self.items[-1].logprobs += self._logprobs
        self._logprobs = []
        return b""

    def _begin(self, kind: ItemKind, call_id: str = "", name: str = "") -> bytes:
        self._open = Item(len(self.items), self.item_id(kind), kind, call_id, name)
        self.items.append(self._open)
        return self.item_begin(self._open)

    def _end(self) -> bytes:
        item, self._open = self._open, None
        return b"" if item is None else self.item_end(item)


def named_event(kind: str, **fields: Any) -> bytes:
    """An event whose data repeats its name as `type`."""
    return event({"type": kind, **fields}, kind)
