"""What is told of an answer while it is written: thoughts, text and calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class ThoughtDelta:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of the text that is no call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A call of a tool, whose arguments follow. Calls count from 0."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The arguments of a call are whole. An answer that is cut off in a call has none for it."""

    index: int


ToolEvent: TypeAlias = TextDelta | CallBegin | ArgumentsDelta | CallEnd
AnswerEvent: TypeAlias = ThoughtDelta | ToolEvent
