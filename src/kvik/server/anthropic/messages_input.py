"""Requests of Anthropic's Messages API, and what they are as a chat."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Annotated, Any, Literal, Self

import msgspec
from msgspec import Meta

from kvik.server.errors import ApiError, bad_request
from kvik.server.fields import Body, JsonObject, JsonSchema, ResponseFormat, Text, convert
from kvik.server.openai.chat_input import Breakpoint, CalledFunction, ChatMessage, ChatRequest, TextPart, ToolCall
from kvik.server.preparing import ChosenFunction, Function, FunctionTool, NamedChoice
from kvik.server.preparing import ToolChoice as ChatToolChoice

OWN_NAMES = {
    "max_completion_tokens": "max_tokens",
    "messages": "messages",
    "response_format": "output_config.format",
    "stop": "stop_sequences",
}
"""What a chat's fields are called here."""

BILLING_LINE = "x-anthropic-billing-header:"

ChatRole = Literal["user", "assistant", "system"]
MaxTokens = Annotated[int, Meta(ge=0, le=2**31 - 1)]


class CacheControl(Body, tag="ephemeral", tag_field="type", frozen=True, kw_only=True):
    """What stands before it is to be kept."""

    ttl: Literal["5m", "1h"] = "5m"

    def breakpoint(self) -> Breakpoint:
        """As OpenAI's API has it."""
        return Breakpoint(ttl=self.ttl)


class TextBlock(Body, tag="text", tag_field="type", frozen=True, kw_only=True):
    """Text."""

    text: str
    cache_control: CacheControl | None = None
    citations: list[Any] | None = None

    def part(self) -> TextPart:
        """As a chat has it."""
        control = self.cache_control
        return TextPart(text=self.text, prompt_cache_breakpoint=None if control is None else control.breakpoint())


class ToolUseBlock(Body, tag="tool_use", tag_field="type", frozen=True, kw_only=True):
    """A call of a tool."""

    id: str
    name: str
    input: JsonObject
    cache_control: CacheControl | None = None
    caller: JsonObject | None = None


class ImageBlock(msgspec.Struct, tag="image", tag_field="type", frozen=True):
    """Refused: kvik's models read text."""


class DocumentBlock(msgspec.Struct, tag="document", tag_field="type", frozen=True):
    """Refused."""


class ToolResultBlock(Body, tag="tool_result", tag_field="type", frozen=True, kw_only=True):
    """What a tool gave."""

    tool_use_id: str
    content: str | list[TextBlock | ImageBlock | DocumentBlock] | None = None
    is_error: bool | None = None
    cache_control: CacheControl | None = None


class ThinkingBlock(Body, tag="thinking", tag_field="type", frozen=True, kw_only=True):
    """What a model thought before the rest of its message."""

    thinking: str
    signature: str | None = None


class RedactedThinkingBlock(Body, tag="redacted_thinking", tag_field="type", frozen=True, kw_only=True):
    """The same, encrypted: it is left out."""

    data: str


Block = TextBlock | ToolUseBlock | ToolResultBlock | ThinkingBlock | RedactedThinkingBlock | ImageBlock | DocumentBlock


class Message(Body, frozen=True, kw_only=True):
    """One message; `ctx` and `msg` are what Claude Code calls some of the user's."""

    role: Literal["user", "assistant", "system", "ctx", "msg"]
    content: str | list[Block]

    @property
    def chat_role(self) -> ChatRole:
        """As a chat has it."""
        return "user" if self.role == "ctx" or self.role == "msg" else self.role

    @property
    def blocks(self) -> Sequence[Block]:
        """The content, of which plain text is one block."""
        return [TextBlock(text=self.content)] if isinstance(self.content, str) else self.content


class Tool(Body, frozen=True, kw_only=True):
    """A tool that the model may call."""

    name: str
    input_schema: JsonObject
    type: Literal["custom"] | None = None
    description: str | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None
    eager_input_streaming: bool | None = None
    defer_loading: Literal[False] | None = None

    def chat(self) -> FunctionTool:
        """As a chat has it."""
        function = Function(
            name=self.name, description=self.description, parameters=self.input_schema, strict=self.strict
        )
        return FunctionTool(function=function)


class AutoChoice(Body, tag="auto", tag_field="type", frozen=True, kw_only=True):
    """The model may call tools."""

    disable_parallel_tool_use: bool | None = None


class AnyChoice(Body, tag="any", tag_field="type", frozen=True, kw_only=True):
    """It must."""

    disable_parallel_tool_use: bool | None = None


class OneChoice(Body, tag="tool", tag_field="type", frozen=True, kw_only=True):
    """It must call this one."""

    name: str
    disable_parallel_tool_use: bool | None = None


class NoChoice(Body, tag="none", tag_field="type", frozen=True, kw_only=True):
    """It may not."""


class Diagnostics(Body, frozen=True, kw_only=True):
    """A wish to know why the cache had no more, beside the request of an earlier message."""

    previous_message_id: Text | None = None


class OutputFormat(Body, tag="json_schema", tag_field="type", frozen=True, kw_only=True):
    """JSON of a schema."""

    schema: JsonObject


class OutputConfig(Body, frozen=True, kw_only=True):
    """How the answer is to be."""

    format: OutputFormat | None = None
    effort: str | None = None


class Conversation(Body, frozen=True, kw_only=True):
    """What a prompt is made of."""

    accepted = frozenset({"context_management"})

    model: str | None = None
    messages: list[Message]
    system: str | list[TextBlock] | None = None
    tools: list[JsonObject] | None = None
    tool_choice: AutoChoice | AnyChoice | OneChoice | NoChoice | None = None
    thinking: JsonObject | None = None
    cache_control: CacheControl | None = None
    output_config: OutputConfig | None = None
    context_management: JsonObject | None = None
    chat_template_kwargs: JsonObject | None = None

    @property
    def effort(self) -> str | None:
        """How much the model shall think, as OpenAI's API names it."""
        kind = None if self.thinking is None else self.thinking.get("type")
        if kind == "disabled":
            return "none"
        effort = None if self.output_config is None else self.output_config.effort
        return "medium" if effort is None and kind is not None else effort

    def ignored(self, *, thinks: bool = False, hears_effort: bool = False) -> list[str]:
        """The accepted fields that were sent, and what was left out of others.

        `thinks` says whether the model's template has thoughts, and `hears_effort` whether it has a switch for them.
        """
        names = super().ignored()
        if self.thinking is not None and self.thinking.get("type") != "disabled":
            if not hears_effort:
                names.append("thinking")
            elif self.thinking.get("budget_tokens") is not None:
                names.append("thinking.budget_tokens")
        if self.output_config is not None and self.output_config.effort is not None and not hears_effort:
            names.append("output_config.effort")
        turns = [[block for _, message in turn for block in message.blocks] for _, turn in self._turns()]
        blocks = [block for turn in turns for block in turn]
        left_out = RedactedThinkingBlock if thinks else ThinkingBlock | RedactedThinkingBlock
        if any(isinstance(block, left_out) for block in blocks):
            names.append("messages.thinking")
        if any(isinstance(block, ToolResultBlock) and block.is_error for block in blocks):
            names.append("messages.is_error")
        texts = [text for block in blocks for text in _texts(block)]
        system = [TextBlock(text=self.system)] if isinstance(self.system, str) else self.system or []
        tools = self.tools or []
        is_left_out = {
            "cache_control": self.cache_control is not None and not any(block.text for block in [*system, *texts]),
            "system.citations": any(block.citations for block in system),
            "messages.citations": any(block.citations for block in texts),
            "messages.caller": any(isinstance(block, ToolUseBlock) and block.caller for block in blocks),
            "messages.cache_control": any(_loses_breakpoint(turn) for turn in turns),
            "tools.cache_control": any(tool.get("cache_control") is not None for tool in tools),
            "tools.eager_input_streaming": any(tool.get("eager_input_streaming") for tool in tools),
        }
        names += [name for name, is_so in is_left_out.items() if is_so]
        return names + list(dict.fromkeys(f"tools.{tool['type']}" for tool in tools if _is_web_search(tool)))

    @property
    def has_billing_line(self) -> bool:
        """Whether the system prompt begins with Claude Code's line, which is another in each request."""
        system = self.system
        first = system if isinstance(system, str) else system[0].text if system else ""
        return first.startswith(BILLING_LINE)

    def without_billing_line(self) -> Self:
        """The same without that line, and without a block that has no other."""
        system = self.system
        assert system
        if isinstance(system, str):
            return msgspec.structs.replace(self, system=system.partition("\n")[2])
        rest = system[0].text.partition("\n")[2]
        first = [msgspec.structs.replace(system[0], text=rest)] if rest else []
        return msgspec.structs.replace(self, system=[*first, *system[1:]])

    def chat(self) -> ChatRequest:
        """The same as a chat. Raises `ApiError`."""
        if self.thinking is not None and not isinstance(self.thinking.get("type"), str):
            raise bad_request("thinking has no type", "thinking.type")
        messages = self._messages()
        # An answer that has begun goes on.
        goes_on = bool(messages) and messages[-1].role == "assistant" and not messages[-1].tool_calls
        wanted = None if self.output_config is None else self.output_config.format
        schema = None if wanted is None else JsonSchema(schema=wanted.schema)
        functions = [
            convert(Tool, tool, f"tools[{at}]") for at, tool in enumerate(self.tools or ()) if not _is_web_search(tool)
        ]
        return ChatRequest(
            model=self.model,
            messages=messages,
            add_generation_prompt=False if goes_on else None,
            continue_final_message=goes_on or None,
            response_format=None if schema is None else ResponseFormat(type="json_schema", json_schema=schema),
            tools=[tool.chat() for tool in functions] or None,
            tool_choice=_chat_choice(self.tool_choice),
            parallel_tool_calls=False if getattr(self.tool_choice, "disable_parallel_tool_use", None) else None,
            chat_template_kwargs=self.chat_template_kwargs,
            reasoning_effort=self.effort,
        )

    def _messages(self) -> list[ChatMessage]:
        messages: list[ChatMessage] = []
        if self.system:
            content: Any = self.system if isinstance(self.system, str) else [block.part() for block in self.system]
            messages.append(ChatMessage(role="system", content=content))
        # Where the whole request has a breakpoint, it moves on with each: what it leaves is not to look changed.
        takes_text = self.cache_control is None
        turns = [message for role, turn in self._turns() for message in _turn(role, turn, takes_text=takes_text)]
        if self.messages and not turns:
            raise bad_request("messages have no text, no call and no result (hint: send one of the user's)", "messages")
        messages += turns
        if self.cache_control is not None:
            _mark_last_text(messages, self.cache_control)
        return messages

    def _turns(self) -> list[tuple[ChatRole, list[tuple[int, Message]]]]:
        """Messages of one role that follow each other are a turn, as in Anthropic's API; each with its number."""
        return [(role, list(turn)) for role, turn in groupby(enumerate(self.messages), lambda each: each[1].chat_role)]


class AnyRequest(Conversation, frozen=True, kw_only=True):
    """A conversation, and how it is to go on."""

    accepted = Conversation.accepted | {"metadata", "service_tier"}

    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    diagnostics: Diagnostics | None = None
    metadata: JsonObject | None = None
    service_tier: str | None = None
    cache_salt: Text | None = None


class CountRequest(AnyRequest, frozen=True, kw_only=True):
    """A request whose prompt is counted: how it is to go on changes nothing."""

    accepted = (
        Conversation.accepted
        | frozenset(AnyRequest.__struct_fields__).difference(Conversation.__struct_fields__)
        | {"max_tokens"}
    )

    max_tokens: MaxTokens | None = None


class MessagesRequest(AnyRequest, frozen=True, kw_only=True):
    """A request for the next message."""

    max_tokens: MaxTokens  # 0: compute the prompt into the cache, and write nothing

    def chat(self) -> ChatRequest:
        """The same as a chat. Raises `ApiError`."""
        return msgspec.structs.replace(
            super().chat(),
            max_completion_tokens=self.max_tokens or None,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=self.stop_sequences,
            stream=self.stream,
            cache_salt=self.cache_salt,
            comparison_response_id=None if self.diagnostics is None else self.diagnostics.previous_message_id,
        )


def _is_web_search(tool: JsonObject) -> bool:
    """A tool of Anthropic's servers, which Claude Code lists among its own: left out of the prompt."""
    kind = tool.get("type")
    return isinstance(kind, str) and re.fullmatch("web_search_[0-9]{8}", kind) is not None


def _texts(block: Block) -> list[TextBlock]:
    """What is text of a block."""
    match block:
        case TextBlock():
            return [block]
        case ToolResultBlock(content=str(text)):
            return [TextBlock(text=text)]
        case ToolResultBlock(content=list(parts)):
            return [part for part in parts if isinstance(part, TextBlock)]
    return []


def _loses_breakpoint(turn: Sequence[Block]) -> bool:
    """Whether a call or a result has a breakpoint, but there is no text behind which it could be."""
    has_text = any(isinstance(block, TextBlock) and block.text for block in turn)
    return any(
        isinstance(block, ToolUseBlock | ToolResultBlock)
        and block.cache_control is not None
        and not (has_text if isinstance(block, ToolUseBlock) else any(text.text for text in _texts(block)))
        for block in turn
    )


def _mark_text(parts: list[TextPart], control: CacheControl) -> bool:
    """Put a breakpoint behind the last text, unless it has one; False where there is no text."""
    at = max((at for at, part in enumerate(parts) if part.text), default=None)
    if at is not None and parts[at].prompt_cache_breakpoint is None:
        parts[at] = msgspec.structs.replace(parts[at], prompt_cache_breakpoint=control.breakpoint())
    return at is not None


def _mark_last_text(messages: list[ChatMessage], control: CacheControl) -> None:
    for at, message in reversed([*enumerate(messages)]):
        content = [TextPart(text=message.content)] if isinstance(message.content, str) else message.content or ()
        parts = [part for part in content if isinstance(part, TextPart)]
        if _mark_text(parts, control):
            messages[at] = msgspec.structs.replace(message, content=parts)
            return


def _turn(role: ChatRole, turn: list[tuple[int, Message]], *, takes_text: bool) -> Iterator[ChatMessage]:
    """The messages of a turn; what tools gave are messages of their own."""
    if takes_text and len(turn) == 1 and isinstance(turn[0][1].content, str):
        yield ChatMessage(role=role, content=turn[0][1].content)
        return
    parts: list[TextPart] = []
    calls: list[ToolCall] = []
    thoughts: list[str] = []
    control: CacheControl | None = None
    for at, message in turn:
        for index, block in enumerate(message.blocks):
            where = f"messages[{at}].content[{index}]"
            match block:
                case TextBlock():
                    parts.append(block.part())
                case ToolUseBlock() if role == "assistant":
                    function = CalledFunction(name=block.name, arguments=block.input)
                    calls.append(ToolCall(id=block.id, function=function))
                    control = block.cache_control or control
                case ToolResultBlock() if role == "user":
                    if parts:
                        yield ChatMessage(role="user", content=[*parts])
                        parts.clear()
                    yield ChatMessage(role="tool", tool_call_id=block.tool_use_id, content=_result(block, where))
                case ThinkingBlock():
                    thoughts.append(block.thinking)
                case RedactedThinkingBlock():
                    pass
                case _:
                    raise _unsupported(block, where, f" in a message of the {role}'s")
    if control is not None:
        _mark_text(parts, control)
    if parts or calls:
        thought = "\n".join(thoughts) if role == "assistant" else None
        yield ChatMessage(
            role=role, content=[*parts] or None, tool_calls=calls or None, reasoning_content=thought or None
        )


def _result(block: ToolResultBlock, where: str) -> Any:
    if not block.content:
        return ""
    parts = []
    for index, each in enumerate(_texts(block) if isinstance(block.content, str) else block.content):
        if not isinstance(each, TextBlock):
            raise _unsupported(each, f"{where}.content[{index}]")
        parts.append(each.part())
    if block.cache_control is not None:
        _mark_text(parts, block.cache_control)
    return parts


def _unsupported(block: msgspec.Struct, where: str, place: str = "") -> ApiError:
    kind = type(block).__struct_config__.tag
    if kind in ("image", "document"):
        place = "; the models of this server read text"
    return bad_request(f"{where} is {kind}{place}", where, code="unsupported_content")


def _chat_choice(choice: AutoChoice | AnyChoice | OneChoice | NoChoice | None) -> ChatToolChoice | None:
    match choice:
        case OneChoice():
            return NamedChoice(function=ChosenFunction(name=choice.name))
        case AnyChoice():
            return "required"
        case NoChoice():
            return "none"
    return None
