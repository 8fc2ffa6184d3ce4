"""The harmony format of gpt-oss: an answer is messages in channels, for thoughts, for calls and for what is said.

https://cookbook.openai.com/articles/openai-harmony. A message is `<|start|>`, a header with role, recipient and
channel, `<|message|>`, its text and `<|end|>`; calls end with `<|call|>`, the last message with `<|return|>`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from kvik.text.answer_events import AnswerEvent, ArgumentsDelta, CallBegin, CallEnd, TextDelta, ThoughtDelta
from kvik.text.json_arguments import JsonArguments
from kvik.text.marked_text import MARKS, mark_of, ranges_lark
from kvik.text.tokenizer import Tokenizer

NAMES = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
OPTIONAL_NAMES = ("<|call|>", "<|return|>", "<|constrain|>")
MAX_PROMPT_END = 1 << 16  # tokens, in which the last message of a prompt is looked for
ID_LENGTH = 24

_RECIPIENT = re.compile(r"to=(?:functions\.)?([A-Za-z0-9_.-]+)")


@dataclass(frozen=True)
class Harmony:
    """The control tokens of one model, by their names without `<|` and `|>`."""

    ids: Mapping[str, int]
    tokenizer: Tokenizer = field(repr=False, compare=False)

    @property
    def marked_ids(self) -> tuple[int, ...]:
        """Those that have marks."""
        return tuple(self.ids.values())

    def mark(self, name: str) -> str:
        """What stands for a token in marked text."""
        return mark_of(self.ids[name], self.marked_ids) if name in self.ids else ""

    def place_after(self, prompt_ids: Sequence[int]) -> Literal["header", "thought", "text"]:
        """Where a prompt ends: in a message's header, in a thought, or in text that is said."""
        tail = list(prompt_ids[-MAX_PROMPT_END:])
        if self.ids["start"] not in tail:
            return "text"
        last = tail[len(tail) - tail[::-1].index(self.ids["start"]) :]
        if self.ids["message"] not in last:
            return "header"
        header = self.tokenizer.decode(last[: last.index(self.ids["message"])], skip_special=False)
        return "thought" if "analysis" in header else "text"

    def grammar(
        self, schemas: Mapping[str, Mapping[str, Any]] | None, *, is_forced: bool, place: str, answer: str = ""
    ) -> str | None:
        """The grammar of an answer, in llguidance's Lark: thoughts and words to the user, then the answer or a call.

        What is said follows `answer` where there is one, which is a rule's name. None behind a text that the caller
        has begun.
        """
        if place == "text":
            return None
        token = {name: f"<[{token_id}]>" for name, token_id in self.ids.items()}
        channel, message, end = token["channel"], token["message"], token["end"]
        said = f'{channel} "final" {message} {answer or "text*"}'
        calls = list(schemas or ())
        control = self.tokenizer.special_token_ids | self.tokenizer.eos_token_ids
        ends = "call" if is_forced else "(said | call)" if calls else "said"
        again = f'{end} {token["start"]} "assistant"'
        first = f"text* {again}" if place == "thought" else ""
        lines = [
            "%llguidance {}",
            f"start: {first} aside* {ends}",
            f'aside: {channel} ("analysis" | "commentary") {message} text* {again}',
            f"said: {said}",
            # As tokens: llguidance 1.9 fails at the third control token that follows a lexeme of any length.
            f"text: <[{ranges_lark(set(range(self.tokenizer.vocab_size)) - control)}]>",
        ]
        if not calls:
            return "\n".join([*lines, ""])
        kinds = ['" json"', '"json"']
        if "constrain" in token:
            kinds.append(f'" "? {token["constrain"]} "json"')
        is_end = self.ids.get("call") in self.tokenizer.eos_token_ids
        close = "" if is_end or "call" not in token else token["call"]
        lines.append("call: " + " | ".join(f"call_{at}" for at in range(len(calls))))
        lines.append(f"kind: {' | '.join(kinds)}")
        for at, name in enumerate(calls):
            to = f"to=functions.{name}"
            heads = (
                f"{channel} {json.dumps('commentary ' + to)} kind? | {json.dumps(' ' + to)} {channel}"
                ' "commentary" kind?'
            )
            options = {"whitespace_flexible": True}
            arguments = "%json " + json.dumps({**(schemas or {})[name], "x-guidance": options})
            lines.append(f"call_{at}: ({heads}) {message} {arguments} {close}")
        return "\n".join([*lines, ""])


def find_harmony(source: str, tokenizer: Tokenizer) -> Harmony | None:
    """The model's, where its template writes channels and its tokenizer has the tokens for them."""
    if "<|channel|>" not in source:
        return None
    special = {tokenizer.token_text(token_id): token_id for token_id in tokenizer.special_token_ids}
    if any(name not in special for name in NAMES):
        return None
    found = {name[2:-2]: special[name] for name in (*NAMES, *OPTIONAL_NAMES) if name in special}
    return Harmony(found, tokenizer)


class HarmonyParser:
    """Tells thoughts, calls and what is said from an answer's marked text, while it arrives.

    A call of what is no tool of the request is text, as the model wrote it; names of channels never are.
    """

    def __init__(self, harmony: Harmony, tools: Iterable[str], new_id: Callable[[int], str], *, place: str) -> None:
        self._harmony = harmony
        self._tools = frozenset(tools)
        self._new_id = new_id
        self._pending = ""
        self._num_calls = 0
        self._arguments = JsonArguments()
        self._is_last = False
        self._message, self._start = harmony.mark("message"), harmony.mark("start")
        ends = "".join(harmony.mark(name) for name in ("end", "call", "return", "start", "channel"))
        self._ends = re.compile(f"[{ends}]")
        states = {"header": self._at_begin, "thought": self._in_thought, "text": self._in_text}
        self._state: Callable[[], list[AnswerEvent] | None] = states[place]

    @property
    def is_thinking(self) -> bool:
        """Whether what comes is a thought."""
        return self._state == self._in_thought

    def feed(self, text: str) -> list[AnswerEvent]:
        """What is known with more marked text."""
        self._pending += text
        events: list[AnswerEvent] = []
        while (found := self._state()) is not None:
            events += found
        return events

    def finish(self) -> list[AnswerEvent]:
        """What was held back, when no more comes."""
        self._is_last = True
        return self.feed("")

    def _at_begin(self) -> list[AnswerEvent] | None:
        """Where an answer begins, which may be a model's that leaves out the header."""
        if not self._pending:
            return None
        is_header = self._pending.startswith(self._harmony.mark("channel")) or " to=".startswith(self._pending[:4])
        self._state = self._in_header if is_header else self._in_text
        return []

    def _in_header(self) -> list[AnswerEvent] | None:
        at = self._pending.find(self._message)
        if at < 0:
            return None
        header, self._pending = self._pending[:at], self._pending[at + 1 :]
        recipient = _RECIPIENT.search(header)
        if recipient is not None and recipient[1] in self._tools:
            self._state, self._arguments = self._in_call, JsonArguments()
            self._num_calls += 1
            return [CallBegin(self._num_calls - 1, "call_" + self._new_id(ID_LENGTH), recipient[1])]
        is_thought = "analysis" in header.partition(self._harmony.mark("channel"))[2]
        self._state = self._in_thought if is_thought else self._in_text
        return []

    def _in_thought(self) -> list[AnswerEvent] | None:
        return self._body(ThoughtDelta)

    def _in_text(self) -> list[AnswerEvent] | None:
        return self._body(TextDelta)

    def _body(self, kind: type[ThoughtDelta | TextDelta]) -> list[AnswerEvent] | None:
        if not self._pending:
            return None
        found = self._ends.search(self._pending)
        text = MARKS.sub("", self._pending[: found.start() if found else None])
        self._pending = "" if found is None else self._pending[found.start() :]
        if found is not None:
            self._state = self._outside
        return [kind(text)] if text else []

    def _in_call(self) -> list[AnswerEvent] | None:
        if not self._pending:
            return None
        num_read, text, is_over = self._arguments.read(self._pending)
        self._pending = self._pending[num_read:]
        events: list[AnswerEvent] = [ArgumentsDelta(self._num_calls - 1, text)] if text else []
        if is_over:
            self._state = self._outside
            events.append(CallEnd(self._num_calls - 1))
        return events

    def _outside(self) -> list[AnswerEvent] | None:
        """Between messages, where nothing is said."""
        found = re.search(f"[{self._start}{self._harmony.mark('channel')}]", self._pending)
        if found is None:
            self._pending = ""
            return None
        self._pending = self._pending[found.end() if found[0] == self._start else found.start() :]
        self._state = self._in_header
        return []
