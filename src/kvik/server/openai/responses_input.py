"""Requests of the Responses API, and what they are as a chat."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from kvik.server.errors import bad_request
from kvik.server.fields import (
    MAX_TOP_LOGPROBS,
    Body,
    CacheOptions,
    Count,
    JsonObject,
    JsonSchema,
    ResponseFormat,
    Text,
    convert,
)
from kvik.server.openai.chat_input import (
    Breakpoint,
    CalledFunction,
    ChatMessage,
    ChatRequest,
    RefusalPart,
    TextPart,
    ToolCall,
)
from kvik.server.preparing import AllowedChoice, AllowedTools, ChosenFunction, Function, FunctionTool, NamedChoice
from kvik.server.preparing import ToolChoice as ChatToolChoice

OWN_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
}
"""What a chat's fields are called here."""

LOGPROBS = "message.output_text.logprobs"

# As `ChatRequest` has them, by the same names.
_SAME_FIELDS = (
    *("model", "temperature", "top_p", "top_k", "seed", "parallel_tool_calls", "chat_template_kwargs", "stream"),
    *("cache_salt", "cache_prompt", "priority", "return_progress"),
    *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "comparison_response_id"),
)


class InputText(Body, tag="input_text", tag_field="type", frozen=True, kw_only=True):
    """Text that was sent."""

    text: str
    prompt_cache_breakpoint: Breakpoint | None = None


class OutputText(Body, tag="output_text", tag_field="type", frozen=True, kw_only=True):
    """Text that was answered."""

    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class Refusal(Body, tag="refusal", tag_field="type", frozen=True, kw_only=True):
    """An answer that was refused."""

    refusal: str


class InputImage(msgspec.Struct, tag="input_image", tag_field="type", frozen=True):
    """Refused: kvik's models read text."""


class InputFile(msgspec.Struct, tag="input_file", tag_field="type", frozen=True):
    """Refused."""


class InputAudio(msgspec.Struct, tag="input_audio", tag_field="type", frozen=True):
    """Refused."""


Content = str | list[InputText | OutputText | Refusal | InputImage | InputFile | InputAudio]
Status = Literal["in_progress", "completed", "incomplete"]


class MessageItem(Body, frozen=True, kw_only=True):
    """A message."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    id: str | None = None
    status: Status | None = None
    phase: str | None = None


class CallItem(Body, frozen=True, kw_only=True):
    """A call of a function."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: Status | None = None
    namespace: None = None
    caller: None = None


class CallOutputItem(Body, frozen=True, kw_only=True):
    """What a function gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: Content
    id: str | None = None
    status: Status | None = None
    name: str | None = None
    namespace: None = None
    caller: None = None


class ReasoningItem(Body, frozen=True, kw_only=True):
    """What a model thought before the message or the call that follows."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: list[Any] | None = None
    content: list[Any] | None = None
    encrypted_content: str | None = None
    status: Status | None = None


Item = MessageItem | CallItem | CallOutputItem | ReasoningItem
_ITEMS: dict[Any, type[Item]] = {
    "message": MessageItem,
    "function_call": CallItem,
    "function_call_output": CallOutputItem,
    "reasoning": ReasoningItem,
}


class FlatFunction(Body, tag="function", tag_field="type", frozen=True, kw_only=True):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None
    defer_loading: Literal[False] | None = None


class NamespaceTool(msgspec.Struct, tag="namespace", tag_field="type", frozen=True):
    """Codex's group of tools: left out of the prompt."""


class WebSearchTool(msgspec.Struct, tag="web_search", tag_field="type", frozen=True):
    """A tool of OpenAI's servers: left out too."""


class FlatChoice(Body, tag="function", tag_field="type", frozen=True, kw_only=True):
    """The one function that must be called."""

    name: str


class FlatAllowed(Body, tag="allowed_tools", tag_field="type", frozen=True, kw_only=True):
    """Functions that may be called, of all that the prompt lists."""

    mode: Literal["auto", "required"]
    tools: list[FlatChoice]


class TextFormat(Body, frozen=True, kw_only=True):
    """What the text is to be."""

    type: Literal["text", "json_object", "json_schema"]
    name: str = ""
    description: str | None = None
    schema: JsonObject | bool | None = None
    strict: bool | None = None


class TextOptions(Body, frozen=True, kw_only=True):
    """How the text is to be."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponseStreamOptions(Body, frozen=True, kw_only=True):
    """What a stream carries beside its events."""

    include_obfuscation: bool | None = None  # never done


class ResponsesRequest(Body, frozen=True, kw_only=True):
    """A request for a response."""

    accepted = frozenset(
        {"user", "metadata", "client_metadata", "service_tier", "safety_identifier", "prompt_cache_retention"}
    )

    model: str | None = None
    input: str | list[JsonObject]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    text: TextOptions | None = None
    tools: list[FlatFunction | NamespaceTool | WebSearchTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatChoice | FlatAllowed | None = None
    parallel_tool_calls: bool | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    chat_template_kwargs: JsonObject | None = None
    truncation: Literal["disabled"] | None = None
    max_tool_calls: None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    return_progress: bool | None = None
    # The cache.
    prewarm: bool | None = None
    cache_salt: Text | None = None
    cache_prompt: bool | None = None
    priority: Annotated[int, Meta(ge=-100, le=100)] | None = None
    prompt_cache_key: Text | None = None
    prompt_cache_options: CacheOptions | None = None
    prompt_cache_retention: str | None = None
    comparison_response_id: Text | None = None
    # State on the server, of which there is none.
    store: bool | None = None
    background: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    # Accepted.
    user: str | None = None
    metadata: JsonObject | None = None
    client_metadata: JsonObject | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    reasoning: JsonObject | None = None

    def check(self) -> None:
        """Raise `ApiError` for fields that contradict each other, or that kvik has nothing for."""
        for name in ("previous_response_id", "conversation", "prompt"):
            if getattr(self, name) is not None:
                hint = "send the whole conversation as input: what is equal comes from the cache"
                raise bad_request(
                    f"{name} names what was stored, this server stores no responses (hint: {hint})",
                    name,
                    code="unsupported_parameter",
                )
        if self.background:
            raise bad_request(
                "background is true, this server answers while the client waits (hint: leave it out)",
                "background",
                code="unsupported_parameter",
            )
        if self.top_logprobs and not self.wants_logprobs:
            raise bad_request(f'top_logprobs needs include: ["{LOGPROBS}"]', "top_logprobs")
        if self.prewarm and self.cache_prompt is False:
            raise bad_request("prewarm and cache_prompt: false contradict each other", "prewarm")
        for name in ("stream_options", "return_progress"):
            if getattr(self, name) and not self.stream:
                raise bad_request(f"{name} needs stream: true", name)

    @property
    def wants_logprobs(self) -> bool:
        """Whether the text's logprobs are asked for."""
        return LOGPROBS in (self.include or ())

    @property
    def functions(self) -> list[FlatFunction]:
        """The tools that the prompt lists."""
        return [tool for tool in self.tools or () if isinstance(tool, FlatFunction)]

    @property
    def effort(self) -> str | None:
        """How much the model shall think."""
        effort = None if self.reasoning is None else self.reasoning.get("effort")
        return effort if isinstance(effort, str) else None

    def ignored(self, *, thinks: bool = False, hears_effort: bool = False) -> list[str]:
        """The accepted fields that were sent, and what was left out of others.

        `thinks` says whether the model's template has thoughts, and `hears_effort` whether it has a switch for them.
        """
        names = super().ignored()
        if self.store:
            names.append("store")
        if set(self.include or ()) - {LOGPROBS}:
            names.append("include")
        if self.text is not None and self.text.verbosity is not None:
            names.append("text.verbosity")
        if self.stream_options is not None and self.stream_options.include_obfuscation:
            names.append("stream_options.include_obfuscation")
        items = self.input if isinstance(self.input, list) else ()
        thoughts = (_thought(item.get("content")) for item in items if item.get("type") == "reasoning")
        if not all(thinks and thought for thought in thoughts):
            names.append("input.reasoning")
        if self.reasoning is not None:
            others = sorted(name for name, value in self.reasoning.items() if value is not None and name != "effort")
            names += [f"reasoning.{name}" for name in others[:8]] if hears_effort else ["reasoning"]
        kinds = (type(tool).__struct_config__.tag for tool in self.tools or () if not isinstance(tool, FlatFunction))
        names += dict.fromkeys(f"tools.{kind}" for kind in kinds)
        return names

    def chat(self) -> ChatRequest:
        """The same as a chat. Raises `ApiError`."""
        same = {name: value for name in _SAME_FIELDS if (value := getattr(self, name)) is not None}
        return ChatRequest(
            messages=self._messages(),
            max_completion_tokens=self.max_output_tokens,
            logprobs=self.wants_logprobs or None,
            top_logprobs=self.top_logprobs,
            response_format=self._response_format(),
            tools=[_chat_tool(tool) for tool in self.functions] or None,
            tool_choice=_chat_choice(self.tool_choice),
            reasoning_effort=self.effort,
            **same,
        )

    def _response_format(self) -> ResponseFormat | None:
        wanted = None if self.text is None else self.text.format
        if wanted is None:
            return None
        if wanted.type != "json_schema":
            return ResponseFormat(type=wanted.type)
        if wanted.schema is None:
            raise bad_request("text.format has no schema", "text.format.schema")
        return ResponseFormat(type="json_schema", json_schema=JsonSchema(name=wanted.name, schema=wanted.schema))

    def _messages(self) -> list[ChatMessage]:
        messages = [] if self.instructions is None else [ChatMessage(role="system", content=self.instructions)]
        if isinstance(self.input, str):
            return [*messages, ChatMessage(role="user", content=self.input)]
        for at, value in enumerate(self.input):
            where = f"input[{at}]"
            kind = _ITEMS.get(value.get("type", "message")) if isinstance(value.get("type", ""), str) else None
            if kind is None:
                raise bad_request(
                    f"{where} is {value['type']!r:.80} (hint: send one of {', '.join(_ITEMS)})", f"{where}.type"
                )
            _add_item(messages, convert(kind, value, where), where)
        return [message for message in messages if not _is_thought_alone(message)]


def _add_item(messages: list[ChatMessage], item: Item, where: str) -> None:
    match item:
        case MessageItem():
            content = _content(item.content, f"{where}.content")
            thought = messages.pop().reasoning_content if messages and _is_thought_alone(messages[-1]) else None
            is_its = item.role == "assistant"
            messages.append(ChatMessage(role=item.role, content=content, reasoning_content=thought if is_its else None))
        case ReasoningItem():
            if thought := _thought(item.content):
                messages.append(ChatMessage(role="assistant", reasoning_content=thought))
        case CallOutputItem():
            content = _content(item.output, f"{where}.output")
            messages.append(ChatMessage(role="tool", tool_call_id=item.call_id, content=content))
        case CallItem():
            call = ToolCall(id=item.call_id, function=CalledFunction(name=item.name, arguments=item.arguments))
            last = messages[-1] if messages else None
            if last is not None and last.role == "assistant":  # text and calls of one turn are one message
                calls = [*(last.tool_calls or ()), call]
                messages[-1] = msgspec.structs.replace(last, tool_calls=calls)
            else:
                messages.append(ChatMessage(role="assistant", tool_calls=[call]))


def _is_thought_alone(message: ChatMessage) -> bool:
    """Whether nothing came of a thought, or not yet."""
    return message.role == "assistant" and message.content is None and not message.tool_calls


def _thought(content: Any) -> str:
    """The text of a reasoning item; what is encrypted or only a summary has none."""
    parts = content if isinstance(content, list) else ()
    texts = (part.get("text") for part in parts if isinstance(part, dict))
    return "".join(text for text in texts if isinstance(text, str))


def _content(content: Content, where: str) -> Any:
    """As a chat has it."""
    if isinstance(content, str):
        return content
    parts: list[TextPart | RefusalPart] = []
    for at, part in enumerate(content):
        match part:
            case InputText():
                parts.append(TextPart(text=part.text, prompt_cache_breakpoint=part.prompt_cache_breakpoint))
            case OutputText():
                parts.append(TextPart(text=part.text))
            case Refusal():
                parts.append(RefusalPart(refusal=part.refusal))
            case _:
                place, kind = f"{where}[{at}]", type(part).__struct_config__.tag
                raise bad_request(
                    f"{place} is {kind}; the models of this server read text", place, code="unsupported_content"
                )
    return parts


def _chat_tool(tool: FlatFunction) -> FunctionTool:
    function = Function(name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict)
    return FunctionTool(function=function)


def _chat_choice(choice: str | FlatChoice | FlatAllowed | None) -> ChatToolChoice | None:
    match choice:
        case FlatChoice():
            return _named(choice)
        case FlatAllowed():
            return AllowedChoice(
                allowed_tools=AllowedTools(mode=choice.mode, tools=[_named(each) for each in choice.tools])
            )
    return choice  # type: ignore[return-value]


def _named(choice: FlatChoice) -> NamedChoice:
    return NamedChoice(function=ChosenFunction(name=choice.name))
