"""The body of a chat request: messages, their parts, and what may be asked for with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import msgspec

from kvik.server.cache.breakpoints import Mark
from kvik.server.errors import bad_request
from kvik.server.fields import MAX_TOP_LOGPROBS, Body, Count, JsonObject, SamplingFields, Text
from kvik.server.preparing import FunctionTool, ToolChoice

MAX_TEMPLATE_BYTES = 1 << 14  # of a template's switches

Role = Literal["system", "developer", "user", "assistant", "tool"]


class Breakpoint(Body, frozen=True, kw_only=True):
    """OpenAI's `prompt_cache_breakpoint`: what stands before it is to be kept."""

    mode: Literal["explicit"] = "explicit"
    ttl: str | None = None


class TextPart(Body, tag="text", tag_field="type", frozen=True, kw_only=True):
    """Text of a message."""

    text: str
    prompt_cache_breakpoint: Breakpoint | None = None


class RefusalPart(Body, tag="refusal", tag_field="type", frozen=True, kw_only=True):
    """An answer that was refused, in a history."""

    refusal: str


class ImagePart(msgspec.Struct, tag="image_url", tag_field="type", frozen=True):
    """Refused: kvik's models read text."""


class AudioPart(msgspec.Struct, tag="input_audio", tag_field="type", frozen=True):
    """Refused."""


class FilePart(msgspec.Struct, tag="file", tag_field="type", frozen=True):
    """Refused."""


Part = TextPart | RefusalPart | ImagePart | AudioPart | FilePart


class CalledFunction(Body, frozen=True, kw_only=True):
    """A function and its arguments, in JSON."""

    name: str
    arguments: str | JsonObject = "{}"


class ToolCall(Body, frozen=True, kw_only=True):
    """A call in a history."""

    function: CalledFunction
    id: str | None = None
    type: Literal["function"] | None = None
    index: int | None = None


class ChatMessage(Body, frozen=True, kw_only=True):
    """One message."""

    role: Role
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None

    def plain(self, where: str) -> dict[str, Any]:
        """As templates take it. Raises `ApiError`."""
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role}
        if self.content is not None:
            message["content"] = (
                self.content
                if isinstance(self.content, str)
                else [_plain_part(part, f"{where}.content[{at}]") for at, part in enumerate(self.content)]
            )
        elif self.refusal is not None:
            message["content"] = self.refusal
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": call.function.arguments},
                    **({} if call.id is None else {"id": call.id}),
                }
                for call in self.tool_calls
            ]
        for name in ("name", "tool_call_id", "reasoning_content"):
            if (value := getattr(self, name)) is not None:
                message[name] = value
        return message


class ChatRequest(SamplingFields, frozen=True, kw_only=True):
    """A request for answers to a conversation."""

    accepted = frozenset(
        {"user", "metadata", "service_tier", "safety_identifier", "prompt_cache_retention", "store", "verbosity"}
        | {"client_metadata", "timings_per_token"}
    )

    model: str | None = None
    messages: list[ChatMessage]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: JsonObject | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    session_id: Text | None = None
    store: Literal[False] | None = None
    modalities: list[Literal["text"]] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    reasoning_effort: str | None = None
    client_metadata: JsonObject | None = None

    def check(self) -> None:
        """Raise `ApiError` for fields that contradict each other."""
        super().check()
        size = len(msgspec.json.encode(self.chat_template_kwargs or {}))
        if size > MAX_TEMPLATE_BYTES:
            raise bad_request(
                f"chat_template_kwargs has {size:,} bytes, give up to {MAX_TEMPLATE_BYTES:,}", "chat_template_kwargs"
            )
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise bad_request(f"top_logprobs is {self.top_logprobs}, give 0 to {MAX_TOP_LOGPROBS}", "top_logprobs")
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
        if self.session_id is not None:
            others = {
                "n": (self.n or 1) > 1,
                "cache_salt": self.cache_salt is not None,
                "continue_final_message": self.continue_final_message,
                "add_generation_prompt": self.add_generation_prompt is False,
            }
            if given := [name for name, is_given in others.items() if is_given]:
                raise bad_request(f"{given[0]} cannot be said of one turn of a session", given[0])

    def marks(self, num_before: int) -> list[Mark]:
        """The breakpoints, behind so many messages of a session."""
        return [
            Mark(num_before + at, index, f"messages[{at}].content[{index}]", part.prompt_cache_breakpoint.ttl)
            for at, message in enumerate(self.messages)
            if isinstance(message.content, list)
            for index, part in enumerate(message.content)
            if isinstance(part, TextPart) and part.prompt_cache_breakpoint is not None
        ]

    @property
    def wanted_tokens(self) -> int | None:
        """Most tokens of an answer, by either name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


CHAT_FIELDS = frozenset(ChatRequest.__struct_fields__)


def texts_of(messages: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """What people and models wrote in them."""
    for message in messages:
        yield message.get("reasoning_content") or ""
        content = message.get("content")
        if isinstance(content, str):
            yield content
        else:
            yield from (part["text"] for part in content or ())


def _plain_part(part: Part, where: str) -> dict[str, str]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    if isinstance(part, RefusalPart):
        return {"type": "text", "text": part.refusal}
    kind = part.__struct_config__.tag
    raise bad_request(f"{where} is {kind}; the models of this server read text", where, code="unsupported_content")
