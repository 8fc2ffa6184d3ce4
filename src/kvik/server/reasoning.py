"""How much a model shall think, and what it thought in earlier turns, as far as its template has a place for it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from kvik.server.served import ServedModel
from kvik.text.harmony import Harmony

# As APIs name them, and as gpt-oss's template does.
EFFORTS: Mapping[str, str] = {
    "none": "low",
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "high",
    "max": "high",
}


def effort_vars(served: ServedModel, effort: str | None) -> dict[str, Any]:
    """The template's switches for this much thought; none where it has none, or the effort is unknown.

    A template that only switches thoughts on and off does so by whether the effort is `none`.
    """
    if effort is None or effort not in EFFORTS:
        return {}
    template = served.llm.model.chat_template
    if template is None:
        return {}
    is_on = effort != "none"
    values = {"reasoning_effort": EFFORTS[effort], "enable_thinking": is_on, "thinking": is_on}
    return {name: value for name, value in values.items() if name in _names(template.source)}


def _names(source: str) -> set[str]:
    """Names in a template's tags that are no attribute of something: its variables, and a few more."""
    tags = " ".join(re.findall(r"\{[{%].*?[}%]\}", source, re.DOTALL))
    without_texts = re.sub(r"'[^']*'|\"[^\"]*\"", "''", tags)
    return set(re.findall(r"(?<![.\w])[a-z_]+\b", without_texts))


def with_thoughts(served: ServedModel, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with thoughts by the name that the template has for them."""
    if not isinstance(served.thoughts, Harmony):
        return list(messages)
    return [_for_harmony(message) for message in messages]


def _for_harmony(message: dict[str, Any]) -> dict[str, Any]:
    thought = message.get("reasoning_content")
    # The template takes what is said before a call for a thought, and refuses both.
    is_refused = message.get("tool_calls") and message.get("content")
    return message if thought is None or is_refused else {**message, "thinking": thought}
