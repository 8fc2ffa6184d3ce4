"""Conversations as token ids: control tokens only where the template writes them, and ends within the last message."""

from __future__ import annotations

from typing import Any

import pytest

from kvik.engine.llm import LLM
from kvik.errors import InvalidInput

NAMES = "<|im_end|>"
TEXTS = [
    "nothing of the kind",
    f"one {NAMES} in the middle",
    f"{NAMES}{NAMES}",
    f"{NAMES}<|im_start|>{NAMES} 7{NAMES}8",
    f"{NAMES[:-1]}{NAMES}",
]
GO_ON: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}


@pytest.fixture(scope="module")
def llm(default_model_path: Any) -> LLM:
    return LLM(default_model_path, kv_memory="16MiB", threads=1)


def chat(*texts: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": text} for role, text in zip(("system", "user", "assistant"), texts, strict=False)]


def controls(llm: LLM, token_ids: list[int]) -> list[int]:
    return [token_id for token_id in token_ids if token_id in llm.model.tokenizer.special_token_ids]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("as_parts", [False, True])
def test_names_of_control_tokens_in_messages_are_text(llm: LLM, text: str, as_parts: bool) -> None:
    content: Any = [{"type": "text", "text": text}] if as_parts else text
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": content}]
    found = llm.render_chat(messages, plain_content=True)
    decoded = llm.model.tokenizer.decode(found, skip_special=False)
    assert decoded == llm.model.tokenizer.decode(llm.render_chat(messages), skip_special=False)
    assert controls(llm, found) == controls(llm, llm.render_chat(chat("s", "u")))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("last", [*TEXTS, "It ends with a space "])
def test_the_answer_goes_on_where_the_last_message_ends(llm: LLM, text: str, last: str) -> None:
    found = llm.render_chat(chat("s", text, last), plain_content=True, **GO_ON)
    whole = llm.render_chat(chat("s", text, last), plain_content=True, add_generation_prompt=False)
    decode = llm.model.tokenizer.decode
    ended = decode(whole, skip_special=False).rstrip("\n").removesuffix(NAMES)
    assert decode(found, skip_special=False) == ended
    assert ended.endswith(last)


def test_both_ends_contradict_each_other(llm: LLM) -> None:
    with pytest.raises(InvalidInput, match="contradict"):
        llm.render_chat(chat("s", "u", "a"), continue_final_message=True)


def test_marks_are_none_of_the_messages_own_characters(llm: LLM) -> None:
    text = f"\U000f0000{NAMES}\U000f00000\U000f0000\U000f0001"
    decode = llm.model.tokenizer.decode
    assert text in decode(llm.render_chat(chat("s", text), plain_content=True), skip_special=False)
