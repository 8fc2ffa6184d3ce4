"""What the answers and the streams of Anthropic's routes hold."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import UNSET, UnsetType

from kvik.server.answers import Answer
from kvik.server.cache.answers import CacheBreakpoint, Findings


class MessageTokenCount(Answer, frozen=True, kw_only=True):
    """How many tokens a request's prompt has."""

    input_tokens: int


class MessageText(Answer, frozen=True, kw_only=True, tag_field="type", tag="text"):
    """A text of the answer."""

    text: str


class MessageThinking(Answer, frozen=True, kw_only=True, tag_field="type", tag="thinking"):
    """What the model thought before its answer."""

    thinking: str
    signature: str  # always empty


class MessageToolUse(Answer, frozen=True, kw_only=True, tag_field="type", tag="tool_use"):
    """A call of a tool."""

    id: str
    name: str
    input: dict[str, Any]


class CacheCreation(Answer, frozen=True, kw_only=True):
    """Tokens that were left in the cache, by how long they are kept at least."""

    ephemeral_5m_input_tokens: int
    ephemeral_1h_input_tokens: int


class MessageUsage(Answer, frozen=True, kw_only=True):
    """Counts of tokens: those of the prompt were read from the cache, written to it, or neither."""

    input_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int
    cache_creation: CacheCreation
    output_tokens: int


class CacheMissReason(Findings, frozen=True, kw_only=True):
    """Why a prompt was not found in the cache."""

    type: Literal[
        "model_changed",
        "system_changed",
        "tools_changed",
        "messages_changed",
        "previous_message_not_found",
        "unavailable",
    ]
    cache_missed_input_tokens: int | UnsetType = UNSET


class MessageDiagnostics(Answer, frozen=True, kw_only=True):
    """What the comparison with an earlier message found; null where the prompt was in the cache."""

    cache_miss_reason: CacheMissReason


StopReason = Literal["end_turn", "max_tokens", "model_context_window_exceeded", "stop_sequence", "tool_use"]


class MessageAnswer(Answer, frozen=True, kw_only=True):
    """A message."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[MessageText | MessageThinking | MessageToolUse]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage
    diagnostics: MessageDiagnostics | UnsetType | None = UNSET
    prompt_cache_breakpoints: list[CacheBreakpoint] | UnsetType = UNSET


class MessageDelta(Answer, frozen=True, kw_only=True):
    """More of a block, or why the message ends."""

    type: Literal["text_delta", "thinking_delta", "input_json_delta"] | UnsetType = UNSET
    text: str | UnsetType = UNSET
    thinking: str | UnsetType = UNSET
    partial_json: str | UnsetType = UNSET
    stop_reason: StopReason | UnsetType = UNSET
    stop_sequence: str | UnsetType | None = UNSET


class MessageEvent(Answer, frozen=True, kw_only=True):
    """An event of a message's making; which fields it has follows from its `type`, as in Anthropic's API."""

    type: Literal[
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    message: MessageAnswer | UnsetType = UNSET
    index: int | UnsetType = UNSET
    content_block: MessageText | MessageThinking | MessageToolUse | UnsetType = UNSET
    delta: MessageDelta | UnsetType = UNSET
    usage: MessageUsage | UnsetType = UNSET
    diagnostics: MessageDiagnostics | UnsetType | None = UNSET
    prompt_cache_breakpoints: list[CacheBreakpoint] | UnsetType = UNSET
