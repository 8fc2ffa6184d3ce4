"""`/v1/chat/completions`: messages in, an answer, a stream or tool calls out."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from kvik.engine.output import TokenLogprobs
from kvik.engine.sequence import Sequence as Written
from kvik.server.bodies import json_response, read_body
from kvik.server.errors import ApiError, api_error, bad_request
from kvik.server.event_stream import EventStream, encode, ends_text, logprobs_entry
from kvik.server.fields import MAX_TOP_LOGPROBS, Body, Count, JsonObject, SamplingFields, Text
from kvik.server.generation import (
    Generation,
    Running,
    check_work,
    default_max_tokens,
    new_id,
    start,
    unless_client_leaves,
)
from kvik.server.openai_writer import OpenAIWriter
from kvik.server.preparing import (
    FunctionTool,
    ToolChoice,
    Tools,
    constraint_of,
    ignored_header,
    options_of,
    parser_maker,
)
from kvik.server.served import ServedModel
from kvik.server.state import ServerState
from kvik.text.tool_calls import ArgumentsDelta, CallBegin, TextDelta

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
        else:  # templates add it to other text without a look
            message["content"] = self.refusal or ""
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
        | {"reasoning_effort", "client_metadata", "timings_per_token"}
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
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise bad_request(f"top_logprobs is {self.top_logprobs}, give 0 to {MAX_TOP_LOGPROBS}", "top_logprobs")
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")

    @property
    def wanted_tokens(self) -> int | None:
        """Most tokens of an answer, by either name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


CHAT_FIELDS = frozenset(ChatRequest.__struct_fields__)


async def chat(request: Request) -> Response | EventStream:
    """Answer a conversation."""
    state = ServerState.of(request)
    state.check_open()
    body = await read_body(request, ChatRequest)
    served = state.models.get(body.model)
    try:
        body.check()
        generation = await asyncio.to_thread(prepare_chat, state, request, body, served)
    except Exception as error:
        raise api_error(error, CHAT_FIELDS) from error
    headers = ignored_header(body.ignored())
    running = await start(generation, wants_pieces=bool(body.stream))
    if body.stream:
        writer = ChatWriter(running, body)
        return EventStream(running, writer, ping_s=state.config.ping_s, headers=headers)
    return await answer(request, running, partial(chat_completion, running, body), headers)


async def answer(request: Request, running: Running, make: Any, headers: dict[str, str]) -> Response:
    """Wait for the completions, and give what `make` makes of them; abort them where the client leaves."""
    try:
        with running.stream:
            if await unless_client_leaves(request, asyncio.ensure_future(_whole(running))) is None:
                raise ApiError(499, "the client left", code="client_left")
    except Exception as error:
        raise api_error(error, running.generation.fields) from error
    finally:
        for told in running.generation.on_end:
            told(running)
    return json_response(make(), headers={"server-timing": running.server_timing(), **headers})


async def _whole(running: Running) -> bool:
    await running.wait()
    running.completions()  # raises what went wrong
    return True


def prepare_chat(state: ServerState, request: Request, body: ChatRequest, served: ServedModel) -> Generation:
    """Render, tokenize and compile; not on the event loop, for it takes its time."""
    tools = Tools.of(body.tools, body.tool_choice, body.parallel_tool_calls)
    messages = [message.plain(f"messages[{at}]") for at, message in enumerate(body.messages)]
    if tools is not None:
        served.tool_format  # noqa: B018  # raises where the model has none
    prompt_ids = render(served, messages, body, tools)
    max_tokens = body.wanted_tokens or default_max_tokens(served, len(prompt_ids))
    check_work(state, 1, body.n or 1, max_tokens)
    num_top = (body.top_logprobs or 0) if body.logprobs else None
    params = body.params(max_tokens=max_tokens, logprobs=num_top)
    options = options_of(state, request, body, constraint_of(served, body, tools))
    return Generation(
        served=served,
        prompts=[prompt_ids],
        params=params,
        options=options,
        request_id=request.scope["state"]["request_id"],
        fields=CHAT_FIELDS,
        new_parser=partial(parser_maker, served, tools) if tools is not None and tools.choice != "none" else None,
        wants_progress=bool(body.return_progress),
    )


def render(
    served: ServedModel, messages: Sequence[dict[str, Any]], body: ChatRequest, tools: Tools | None
) -> list[int]:
    """The prompt's token ids."""
    return served.llm.render_chat(
        messages,
        tools=None if tools is None else tools.functions,
        template_vars=body.chat_template_kwargs,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        plain_content=True,
    )


def _plain_part(part: Part, where: str) -> dict[str, str]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    if isinstance(part, RefusalPart):
        return {"type": "text", "text": part.refusal}
    kind = part.__struct_config__.tag
    raise bad_request(f"{where} is {kind}; the models of this server read text", where, code="unsupported_content")


def finish_reason(branch: Written, num_calls: int) -> str:
    """As OpenAI's API has it."""
    reason = branch.finish_reason or "stop"
    return "tool_calls" if num_calls and reason == "stop" else reason


def stop_reason(branch: Written) -> str | int | None:
    """vLLM's: the stop string or the token id of the request's that ended it."""
    if branch.finish_reason != "stop":
        return None
    if branch.text.stopped_by is not None:
        return branch.text.stopped_by
    last = branch.token_ids[-1]
    return last if last in branch.params.stop_token_ids else None


def calls_and_text(running: Running, at: int) -> tuple[str, list[dict[str, Any]]]:
    """A whole completion's text and its calls."""
    branch = running.branches[at]
    if running.parsers is None:
        return branch.text.text, []
    parser = running.parsers[at]
    events = [
        each
        for token_id, text in zip(branch.completion_ids, branch.text.parts, strict=True)
        for each in parser.feed(token_id, text)
    ]
    text, calls = "", list[dict[str, Any]]()
    for found in (*events, *parser.finish()):
        match found:
            case TextDelta():
                text += found.text
            case CallBegin():
                function = {"name": found.name, "arguments": ""}
                calls.append({"id": found.call_id, "type": "function", "function": function})
            case ArgumentsDelta():
                calls[found.index]["function"]["arguments"] += found.text
    return text, calls


def chat_completion(running: Running, body: ChatRequest) -> dict[str, Any]:
    """The whole answer."""
    running.response_id = new_id("chatcmpl-")
    choices = []
    for at, branch in enumerate(running.branches):
        text, calls = calls_and_text(running, at)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": text if text or not calls else None,
            "refusal": None,
            "annotations": [],
        }
        if calls:
            message["tool_calls"] = calls
        entries = branch.logprobs
        if entries and ends_text(running, branch.token_ids[-1], branch.finish_reason):
            entries = entries[:-1]
        choices.append(
            {
                "index": at,
                "message": message,
                "logprobs": chat_logprobs(running, entries) if body.logprobs else None,
                "finish_reason": finish_reason(branch, len(calls)),
                "stop_reason": stop_reason(branch),
            }
        )
    return {
        "id": running.response_id,
        "object": "chat.completion",
        "created": running.created,
        "model": running.served.id,
        "system_fingerprint": running.served.fingerprint,
        "choices": choices,
        "usage": running.usage().openai(),
        "timings": running.timings(),
        **running.extras(),
    }


def chat_logprobs(running: Running, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """Those of some tokens."""
    return {"content": [logprobs_entry(running, entry) for entry in entries], "refusal": None}


class ChatWriter(OpenAIWriter):
    """Chunks of a chat completion."""

    def __init__(self, running: Running, body: ChatRequest) -> None:
        super().__init__(running, body.stream_options, prefix="chatcmpl-", kind="chat.completion.chunk")
        self._num_calls = [0] * len(running.branches)

    def _delta(self, index: int, delta: bytes, logprobs: bytes = b"null") -> bytes:
        return self.chunk(b'{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":null}' % (index, delta, logprobs))

    def begin(self) -> bytes:
        """The role of each choice, in their order."""
        delta = b'{"role":"assistant","content":""}'
        return b"".join(self._delta(index, delta) for index in range(len(self.running.branches)))

    def text(self, index: int, text: str, logprobs: TokenLogprobs | None) -> bytes:
        """More of the answer."""
        told = b"null" if logprobs is None else encode(chat_logprobs(self.running, [logprobs]))
        return self._delta(index, b'{"content":' + encode(text) + b"}", told)

    def call_begin(self, index: int, event: CallBegin) -> bytes:
        """A call's id and name, once."""
        self._num_calls[index] += 1
        function = {"name": event.name, "arguments": ""}
        call = {"index": event.index, "id": event.call_id, "type": "function", "function": function}
        return self._delta(index, encode({"tool_calls": [call]}))

    def call_arguments(self, index: int, event: ArgumentsDelta) -> bytes:
        """More of a call's arguments."""
        call = {"index": event.index, "function": {"arguments": event.text}}
        return self._delta(index, encode({"tool_calls": [call]}))

    def finished_choice(self, index: int) -> dict[str, Any]:
        """An empty delta and why it ended."""
        branch = self.running.branches[index]
        return {
            "index": index,
            "delta": {},
            "logprobs": None,
            "finish_reason": finish_reason(branch, self._num_calls[index]),
            "stop_reason": stop_reason(branch),
        }
