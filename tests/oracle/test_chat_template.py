"""Conversations as token ids, next to transformers' rendering and tokenisation of the same file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from oracle.conftest import LLMFactory

CONVERSATIONS = {
    "question": [{"role": "user", "content": "Why is the sky blue?"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 12345 + 678,90?"}],
    "turns": [
        {"role": "user", "content": "Grüße! 你好 👋🏽 e\u0301"},
        {"role": "assistant", "content": "  Hej\n\n- one\n- two\t \n"},
        {"role": "user", "content": "def f(x):\n    return x**2  # it's\r\n"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "{{ messages }} {% raw %} </s> <b>&amp;</b>"},
    ],
}


@pytest.fixture(scope="module")
def hf_tokenizer(default_model_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(
        default_model_path.parent, gguf_file=default_model_path.name, local_files_only=True
    )


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_render_to_the_same_tokens(llm_of: LLMFactory, hf_tokenizer: Any, name: str) -> None:
    llm, messages = llm_of("int8", "f16"), CONVERSATIONS[name]
    template = llm.model.chat_template
    assert template is not None
    options = {"add_generation_prompt": True, "return_dict": False}
    assert template.render(messages) == hf_tokenizer.apply_chat_template(messages, tokenize=False, **options)
    assert llm.render_chat(messages) == hf_tokenizer.apply_chat_template(messages, **options)
