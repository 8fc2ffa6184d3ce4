"""A conversation as token ids: the template's text, tokenized with or without control tokens in what people wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from kvik.errors import InvalidInput
from kvik.text.chat_messages import check_messages
from kvik.text.chat_template import ChatTemplate
from kvik.text.tokenizer import Tokenizer

FIRST_PRIVATE, LAST_PRIVATE = 0xF0000, 0xF00FF
"""Characters of private use, one of which stands for what is put in later: one that the request does not contain."""

MAX_MERGED = 4
"""Tokens at the end of a part that may come out differently for what follows them; more, and it was not found."""


def encode_chat(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_vars: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    plain_content: bool = False,
) -> list[int]:
    """Token ids of the rendered conversation.

    `continue_final_message` ends them within the last message, which the answer continues. With `plain_content` the
    names of control tokens in messages and tools are text; only the template writes control tokens. Raises as
    `ChatTemplate.render_request` does.
    """
    prompt = _Prompt(
        template,
        tokenizer,
        messages,
        tools=tools,
        template_vars=template_vars,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        plain_content=plain_content,
    )
    return prompt.encode(prompt.text)


def find_part_ends(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    ends: Sequence[tuple[int, int]],
    token_ids: Sequence[int],
    **options: Any,
) -> list[int | None]:
    """How many of the conversation's `token_ids` stand before the end of each of these parts (message, part).

    `token_ids` are those of `encode_chat` with the same options. A token that the end falls into is not counted, and
    a part that the template does not write once, or not as it is given, has None.
    """
    mark = _unused_character(messages, options.get("tools"))
    marked: list[Mapping[str, Any]] = list(messages)
    for number, (at, part) in enumerate(ends):
        marked[at] = _with_text_behind(marked[at], part, f"{mark}{number}{mark}")
    prompt = _Prompt(template, tokenizer, marked, **options)
    pieces = re.split(f"{mark}(\\d+){mark}", prompt.text)
    found: dict[int, list[int | None]] = {}
    for at in range(1, len(pieces), 2):
        before = prompt.encode("".join(pieces[:at:2]))
        num_common = next(
            (n for n, (mine, theirs) in enumerate(zip(before, token_ids, strict=False)) if mine != theirs),
            min(len(before), len(token_ids)),
        )
        is_there = len(before) - num_common <= MAX_MERGED
        found.setdefault(int(pieces[at]), []).append(num_common if is_there and num_common else None)
    return [places[0] if len(places := found.get(number, [])) == 1 else None for number in range(len(ends))]


class _Prompt:
    """A rendered conversation, in which marks and numbers stand for the names of control tokens that are text."""

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_vars: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        plain_content: bool = False,
    ) -> None:
        if continue_final_message and add_generation_prompt:
            raise InvalidInput(
                "continue_final_message and add_generation_prompt contradict each other",
                hint="set add_generation_prompt to false",
            )
        mark = self._mark = _unused_character(messages, tools)
        self._tokenizer = tokenizer
        names = self._names = control_names(tokenizer) if plain_content else ()
        checked = check_messages(messages)
        if continue_final_message:
            # Unlike the marks of two names side by side.
            end = f"{mark}end{mark}"
            checked[-1] = _ended(checked[-1], end)
        pattern = re.compile("|".join(map(re.escape, names))) if names else None
        if pattern is not None:
            checked = [_escaped(message, pattern, names, mark) for message in checked]
            tools = _escaped(tools, pattern, names, mark)
        text = template.render_request(
            checked, tools=tools, template_vars=template_vars, add_generation_prompt=add_generation_prompt
        )
        if json.dumps(mark)[1:-1] in text:
            raise InvalidInput(
                "the chat template changes its input, so control tokens in messages cannot be recognised",
                hint="take the names of control tokens, such as <|im_end|>, out of the messages",
            )
        if continue_final_message:
            text, found, _ = text.partition(end)
            if not found:
                raise InvalidInput(
                    "the chat template does not write the last message", hint="end with a message of the assistant"
                )
        self.text = text

    def encode(self, text: str) -> list[int]:
        """Token ids of the text, or of a beginning of it."""
        # The template writes the beginning-of-text token itself where the model wants one, or should.
        token_ids: list[int] = []
        for at, part in enumerate(re.split(f"{self._mark}(\\d+){self._mark}", text)):
            if at % 2:
                token_ids += self._tokenizer.encode(self._names[int(part)], add_special=False, parse_special=False)
            elif part:
                token_ids += self._tokenizer.encode(part, add_special=False)
        bos = self._tokenizer.chat_bos_token_id
        return token_ids if bos is None or token_ids[:1] in ([], [bos]) else [bos, *token_ids]


@lru_cache(maxsize=16)
def control_names(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The texts that a tokenizer reads as control tokens, the longest first."""
    names = {
        tokenizer.token_bytes(token_id, skip_special=False).decode(errors="replace")
        for token_id in tokenizer.special_token_ids
    }
    return tuple(sorted(filter(None, names), key=lambda name: (-len(name), name)))


def _unused_character(*values: object) -> str:
    text = repr(values)
    for code in range(FIRST_PRIVATE, LAST_PRIVATE):
        if chr(code) not in text and f"\\U{code:08x}" not in text:
            return chr(code)
    raise InvalidInput("the messages use up characters of private use", hint="take those from U+F0000 on out")


def _ended(message: dict[str, Any], end: str) -> dict[str, Any]:
    """The message with this text at its end."""
    content = message.get("content")
    if content is None:
        return message | {"content": end}
    return _with_text_behind(message, len(content) - 1, end)


def _with_text_behind(message: Mapping[str, Any], part: int, text: str) -> dict[str, Any]:
    """The message with more text at the end of one of its parts; its content of plain text is part 0."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": content + text}
    parts = list(content)
    parts[part] = {**parts[part], "text": parts[part]["text"] + text}
    return {**message, "content": parts}


def _escaped(value: Any, pattern: re.Pattern[str], names: tuple[str, ...], mark: str) -> Any:
    """The value with a mark and its number for each name of a control token."""
    if isinstance(value, str):
        return pattern.sub(lambda match: f"{mark}{names.index(match[0])}{mark}", value)
    if isinstance(value, Mapping):
        return {key: _escaped(item, pattern, names, mark) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_escaped(item, pattern, names, mark) for item in value]
    return value
