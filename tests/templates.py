"""Chat templates given as text, and a message to render."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvik.text.chat_template import ChatTemplate

USER = {"role": "user", "content": ' Hej 🙂 你好 e\u0301\n\n<|im_end|> what\'s {{ 1 + 1 }} < 3 & 4 > "2"? \u2028'}


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>", name="model.gguf")


def ask(source: str, messages: Sequence[Any] = (USER,), **variables: Any) -> str:
    return template(source).render(messages, **variables)
