"""How a model writes what it thinks before it answers, found by what its own chat template makes of a known thought.

Where the template leaves thoughts out of the history, the tags that it names are those of a known pair. Models of the
harmony format have channels instead: see `harmony`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from kvik.errors import TemplateError
from kvik.text.chat_template import ChatTemplate
from kvik.text.harmony import Harmony, find_harmony
from kvik.text.marked_text import FIRST_MARK, MARKS, Marker, TooManyMarksError, overlap
from kvik.text.tokenizer import Tokenizer

QUESTION, THOUGHT, ANSWER = "kvik question", "~kvik thought~", "~kvik answer~"
KEYS = ("reasoning_content", "reasoning", "thinking")
KNOWN_TAGS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),
)
MAX_TAG_LENGTH = 64
MAX_PROMPT_END = 64  # tokens at a prompt's end in which a thought may have begun

_BEGIN = re.compile("([\ud800-\udfff]|<[^<>\\s]+>|\\[[^\\[\\]\\s]+\\])[^<>\\[\\]\ud800-\udfff]*$")
_END = re.compile("\\s*([\ud800-\udfff]|<[^<>\\s]+>|\\[[^\\[\\]\\s]+\\])")


@dataclass(frozen=True)
class ThoughtTags:
    """A thought stands between two tags, before all else; marked text."""

    begin: str
    end: str
    marked_ids: tuple[int, ...]
    tokenizer: Tokenizer = field(repr=False, compare=False)

    def place_after(self, prompt_ids: Sequence[int]) -> Place:
        """Whether the prompt ends within a "thought", as some templates begin one, or an answer begins behind it."""
        marker = Marker(self.tokenizer, self.marked_ids)
        control = self.tokenizer.special_token_ids | self.tokenizer.eos_token_ids
        parts: list[str] = []
        for token_id in prompt_ids[-MAX_PROMPT_END:]:
            if token_id in control:
                parts.append(marker.mark(token_id) if token_id in self.marked_ids else "\n")
            else:
                parts.append(self.tokenizer.token_bytes(token_id).decode(errors="replace"))
        text = "".join(parts)
        begun = text.rfind(self.begin)
        return "thought" if begun >= 0 and not text[begun + len(self.begin) :].strip() else "header"

    def grammar(self, answer: str, *, place: Place) -> str:
        """The grammar, in llguidance's Lark, of a thought and what `answer` has rules for behind it."""
        rules = thought_rules(self, place=place)
        return "\n".join(["%llguidance {}", f"start: thought{'' if place == 'thought' else '?'} {answer}", *rules, ""])


Place: TypeAlias = Literal["header", "thought", "text"]
"""Where a prompt ends: an answer begins behind it, or a thought or a text goes on."""

ThoughtFormat: TypeAlias = ThoughtTags | Harmony


def detect_thoughts(template: ChatTemplate, tokenizer: Tokenizer) -> ThoughtFormat | None:
    """How the model writes thoughts; None where its template has none."""
    if (harmony := find_harmony(template.source, tokenizer)) is not None:
        return harmony
    marker = Marker(tokenizer)
    try:
        tags = _rendered_tags(template, marker) or _named_tags(template, marker)
    except TooManyMarksError:
        return None
    if tags is None:
        return None
    begin, end = tags
    return ThoughtTags(begin, end, tuple(marker.marked_ids), tokenizer)


def _rendered_tags(template: ChatTemplate, marker: Marker) -> tuple[str, str] | None:
    """What stands around a thought where the template writes it."""
    question = {"role": "user", "content": QUESTION}
    answer: Mapping[str, Any] = {"role": "assistant", "content": ANSWER}

    def rendered(message: Mapping[str, Any]) -> str:
        try:
            text = template.render([question, message], add_generation_prompt=False)
        except TemplateError:
            return ""
        return marker.read(text.rpartition(QUESTION)[2])

    plain = rendered(answer).partition(ANSWER)[0]
    for key in KEYS:
        before, found, after = rendered({**answer, key: THOUGHT}).partition(THOUGHT)
        between, is_answered, _ = after.partition(ANSWER)
        begin, end = _BEGIN.search(before), _END.match(between)
        if not found or not is_answered or begin is None or end is None:
            continue
        opening = begin[0].strip()
        if len(opening) <= MAX_TAG_LENGTH and opening != end[1] and not plain.endswith(begin[0]):
            return opening, end[1]
    return None


def _named_tags(template: ChatTemplate, marker: Marker) -> tuple[str, str] | None:
    found = next((tags for tags in KNOWN_TAGS if tags[1] in template.source), None)
    return None if found is None else (marker.read(found[0]), marker.read(found[1]))


class TagSplitter:
    """Tells a thought from what follows it, in pieces of marked text: (whether it is a thought, text)."""

    def __init__(self, tags: ThoughtTags, *, has_begun: bool) -> None:
        self._tags = tags
        self._pending = ""
        self._state = self._in_thought if has_begun else self._at_begin
        self._is_first = True  # of a thought's or an answer's text, whose first line break is no part of it
        self.is_thinking = has_begun

    def feed(self, text: str, *, is_last: bool = False) -> list[tuple[bool, str]]:
        """What is known with more text."""
        self._pending += text
        return [piece for piece in self._pieces(is_last) if piece[1]]

    def _pieces(self, is_last: bool) -> Iterator[tuple[bool, str]]:
        while (found := self._state(is_last)) is not None:
            yield found

    def _at_begin(self, is_last: bool) -> tuple[bool, str] | None:
        begin, text = self._tags.begin, self._pending.lstrip()
        if text.startswith(begin):
            self._pending = text[len(begin) :]
            self._state, self.is_thinking = self._in_thought, True
            return True, ""
        if begin.startswith(text) and not is_last:
            return None
        self._state, self._is_first = self._in_answer, False
        return False, ""

    def _in_thought(self, is_last: bool) -> tuple[bool, str] | None:
        end = self._tags.end
        if not self._skipped_space(is_last):
            return None
        at = self._pending.find(end)
        if at >= 0:
            text, self._pending = self._pending[:at].rstrip(), self._pending[at + len(end) :]
            self._state, self.is_thinking, self._is_first = self._in_answer, False, True
            return True, MARKS.sub("", text)
        known = len(self._pending) - (0 if is_last else overlap(self._pending, end))
        if not is_last:
            known = len(self._pending[:known].rstrip())
        return self._take(known, is_thought=True)

    def _in_answer(self, is_last: bool) -> tuple[bool, str] | None:
        return self._take(len(self._pending), is_thought=False) if self._skipped_space(is_last) else None

    def _skipped_space(self, is_last: bool) -> bool:
        """Whether the line breaks behind a tag are gone."""
        if self._is_first:
            self._pending = self._pending.lstrip("\n")
            self._is_first = not self._pending
        return not self._is_first or is_last

    def _take(self, length: int, *, is_thought: bool) -> tuple[bool, str] | None:
        if not length:
            return None
        text, self._pending = self._pending[:length], self._pending[length:]
        return is_thought, MARKS.sub("", text) if is_thought else text


def thought_rules(tags: ThoughtTags, *, place: Place) -> list[str]:
    """Lark rules of a `thought`, with the space behind it; of one that the prompt has begun, they are of its rest."""
    begin, end = (literal_lark(text, tags.marked_ids) for text in (tags.begin, tags.end))
    begin = "" if place == "thought" else begin
    space = "thought_space: /\\s+/"
    if MARKS.match(tags.end):
        return [f"thought: {begin} THOUGHT? {end} thought_space?", "THOUGHT: /(?s:.+)/", space]
    return [f"thought: {begin} thought_end thought_space?", f"thought_end[lazy]: /(?s:.*)/ {end}", space]


def literal_lark(text: str, marked_ids: Sequence[int]) -> str:
    """Marked text as Lark has it."""
    return " ".join(
        f"<[{marked_ids[ord(part) - ord(FIRST_MARK)]}]>" if MARKS.match(part) else json.dumps(part, ensure_ascii=False)
        for part in re.findall("[^\ud800-\udfff]+|.", text, re.DOTALL)
    )


def answer_after_thought(thoughts: ThoughtFormat, place: Place) -> str | None:
    """The grammar of an answer, the rule `@answer`, behind thoughts; None where it begins at once."""
    if isinstance(thoughts, Harmony):
        return thoughts.grammar(None, is_forced=False, place=place, answer="@answer")
    return thoughts.grammar("@answer", place=place)
