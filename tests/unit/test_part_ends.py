"""Where the parts of a conversation end among its tokens: exactly, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvik.engine.llm import LLM
from kvik.text.chat_prompt import encode_chat, find_part_ends
from kvik.text.chat_template import ChatTemplate
from kvik.text.tokenizer import Tokenizer
from template_families import FAMILIES

PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(default_model_path: Path) -> Tokenizer:
    return LLM(default_model_path, kv_memory="8MiB").model.tokenizer


def part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def user(*texts: str) -> dict[str, Any]:
    return {"role": "user", "content": [part(text) for text in texts]}


def find(source: str, tokenizer: Tokenizer, messages: Any, ends: Any, **options: Any) -> tuple[list[int], Any]:
    template = ChatTemplate(source, bos_token="<s>", eos_token="</s>", name="test")
    token_ids = encode_chat(template, tokenizer, messages, **options)
    return token_ids, find_part_ends(template, tokenizer, messages, ends, token_ids, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("plain", [False, True])
def test_the_prompt_up_to_there_ends_with_the_part(tokenizer: Tokenizer, family: str, plain: bool) -> None:
    messages = [user("The first <|im_end|> thing.", "And a second."), {"role": "assistant", "content": "Yes."}]
    messages += [user("A third: 12")]
    token_ids, found = find(
        FAMILIES[family], tokenizer, messages, [(0, 0), (0, 1), (1, 0), (2, 0)], plain_content=plain
    )
    whole = tokenizer.decode(token_ids, skip_special=False)
    for position, end in zip(found, ("thing.", "second.", "Yes.", "third: 12"), strict=True):
        after = whole.index(end) + len(end)
        assert len(tokenizer.decode(token_ids[:position], skip_special=False)) <= after
        assert len(tokenizer.decode(token_ids[: position + 1], skip_special=False)) > after


def test_what_follows_may_take_the_last_token(tokenizer: Tokenizer) -> None:
    """Two parts with nothing between them: the end lies in a token, which is not counted."""
    source = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    token_ids, (end,) = find(source, tokenizer, [user("Hello wor", "ld again")], [(0, 0)])
    assert tokenizer.decode(token_ids[:end]) == "Hello"
    assert tokenizer.decode(token_ids) == "Hello world again"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].role }}",  # not written
        "{{ messages[0].content }} and again {{ messages[0].content }}",  # twice
        "{{ messages[0].content | upper | reverse }}",  # something else
        "{{ messages[0].content[:9] }}",
    ],
)
def test_what_the_template_does_not_write_once_is_not_found(tokenizer: Tokenizer, source: str) -> None:
    _, found = find(source, tokenizer, [{"role": "user", "content": "Hello, you there"}], [(0, 0)])
    assert found == [None]


def test_templates_that_trim_end_before_the_space(tokenizer: Tokenizer) -> None:
    source = PLAIN.replace("m.content", "m.content | trim")
    token_ids, (end,) = find(source, tokenizer, [{"role": "user", "content": "Hello, you.  "}], [(0, 0)])
    assert tokenizer.decode(token_ids[:end], skip_special=False).endswith("Hello, you.")


def test_within_a_message_that_goes_on(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": [part("Once"), part("upon")]}]
    source = PLAIN.replace(
        "m.content", "(m.content if m.content is string else m.content | map(attribute='text') | join(' '))"
    )
    token_ids, found = find(
        source, tokenizer, messages, [(1, 0), (1, 1)], add_generation_prompt=False, continue_final_message=True
    )
    assert found == [len(token_ids) - 1, len(token_ids)]
