"""`/v1/chat/completions`: messages in, an answer, a stream or tool calls out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeAlias

from starlette.requests import Request
from starlette.responses import Response

from kvik.engine.output import TokenLogprobs
from kvik.engine.request import TemplateOptions
from kvik.engine.sequence import Sequence as Written
from kvik.server.bodies import read_body
from kvik.server.cache.breakpoints import with_breakpoints
from kvik.server.cache.diagnostics import Diagnosis, with_diagnostics
from kvik.server.cache.sessions import Session
from kvik.server.cache.turns import Turn, as_history
from kvik.server.errors import api_error, bad_request
from kvik.server.event_stream import CallWriter, EventStream, ends_text, logprobs_entry
from kvik.server.fields import CacheOptions
from kvik.server.generation import (
    Generation,
    Running,
    check_texts,
    check_work,
    default_max_tokens,
    start,
)
from kvik.server.openai.chat_input import CHAT_FIELDS, ChatRequest, texts_of
from kvik.server.openai.openai_writer import OpenAIWriter
from kvik.server.preparing import (
    Tools,
    constraint_of,
    ignored_header,
    make_parser,
    options_of,
)
from kvik.server.reasoning import effort_vars, with_thoughts
from kvik.server.reply import reply
from kvik.server.served import ServedModel
from kvik.server.sse import encode
from kvik.server.state import ServerState, tenant_of
from kvik.text.answer_events import ArgumentsDelta, CallBegin, CallEnd, TextDelta, ThoughtDelta
from kvik.text.answer_parser import AnswerParser
from kvik.text.chat_prompt import find_part_ends
from kvik.text.thoughts import Place


async def chat(request: Request) -> Response | EventStream:
    """Answer a conversation."""
    state = ServerState.of(request)
    body = await read_body(request, ChatRequest)
    session = session_of(state, request, body)
    served = state.models.get(body.model) if session is None else session.served
    turn = None if session is None else Turn(state.kept.sessions, session)
    with turn or nullcontext():
        try:
            body.check()
            generation = await asyncio.to_thread(prepare_chat, state, request, body, served, session)
        except Exception as error:
            raise api_error(error, CHAT_FIELDS) from error
        if turn is not None:
            generation = take_turn(turn, generation, body)
        running = await start(generation, wants_pieces=bool(body.stream))
    headers = ignored_header([*body.ignored(), *unheard_effort(served, body)])
    writer = ChatWriter(running, body) if body.stream else None
    return await reply(request, running, headers, writer=writer, whole=partial(chat_completion, running, body))


def session_of(state: ServerState, request: Request, body: ChatRequest) -> Session | None:
    """The idle session that a request names. Raises `ApiError`."""
    if body.session_id is None:
        return None
    session = state.kept.sessions.get_idle(tenant_of(request), body.session_id)
    if body.model is not None and state.models.get(body.model) is not session.served:
        raise bad_request(f"model is {body.model[:100]!r}, the session's is {session.served.id!r}", "model")
    return session


def take_turn(turn: Turn, generation: Generation, body: ChatRequest) -> Generation:
    """The generation as a turn of a session, which gets the same ids of calls as the answer has."""
    new_parser = generation.new_parser

    def message_of(running: Running) -> dict[str, Any]:
        parser = None if new_parser is None else new_parser(generation.origin.new_call_ids(0))
        return as_history(*calls_and_text(running, 0, parser))

    new = [message.plain(f"messages[{at}]") for at, message in enumerate(body.messages)]
    return turn.begin(generation, new, message_of)


def prepare_chat(
    state: ServerState,
    request: Request,
    body: ChatRequest,
    served: ServedModel,
    session: Session | None = None,
    tell: Callable[[Diagnosis], dict[str, Any]] = Diagnosis.openai,
) -> Generation:
    """Render, tokenize and compile; not on the event loop, for it takes its time."""
    served.check_queue()
    given_tools = body.tools if body.tools is not None or session is None else session.tools
    tools = Tools.of(given_tools, body.tool_choice, body.parallel_tool_calls)
    history = [] if session is None else session.messages
    messages = [*history, *(message.plain(f"messages[{at}]") for at, message in enumerate(body.messages))]
    if session is not None:
        session.check_size(messages)
    if tools is not None:
        served.tool_format  # noqa: B018  # raises where the model has none
    check_texts(served, texts_of(messages), "messages")
    messages = with_thoughts(served, messages)
    for_template = template_options(body, tools, effort_vars(served, body.reasoning_effort))
    prompt_ids = served.llm.render_chat(messages, **for_template)
    thoughts = served.thoughts
    place: Place = "header" if thoughts is None else thoughts.place_after(prompt_ids)
    has_parts = thoughts is not None or (tools is not None and tools.choice != "none")
    max_tokens = body.wanted_tokens or default_max_tokens(state, served, len(prompt_ids), body.n or 1)
    check_work(state, 1, body.n or 1, max_tokens)
    num_top = (body.top_logprobs or 0) if body.logprobs else None
    params = body.params(max_tokens=max_tokens, logprobs=num_top)
    options = options_of(state, request, body, constraint_of(served, body, tools, place))
    if session is not None:
        options |= {"salt": session.salt, "hold": True, "lease": session.held}
    generation = Generation(
        served=served,
        prompts=[prompt_ids],
        params=params,
        options=options,
        request_id=request.scope["state"]["request_id"],
        origin=request.scope["state"]["origin"],
        tenant=tenant_of(request),
        fields=CHAT_FIELDS,
        new_parser=partial(make_parser, served, tools, place) if has_parts else None,
        wants_progress=bool(body.return_progress),
    )
    template, tokenizer = served.llm.model.chat_template, served.llm.model.tokenizer
    assert template is not None  # it has rendered
    wanted = body.prompt_cache_options or CacheOptions()
    generation = with_breakpoints(
        state,
        tenant_of(request),
        generation,
        body.marks(len(history)),
        lambda ends: find_part_ends(template, tokenizer, messages, ends, prompt_ids, **for_template),
        explicit=wanted.mode == "explicit",
        ttl=wanted.ttl,
    )
    return with_diagnostics(
        state,
        request,
        generation,
        compared_id=body.compared_id,
        fields={
            "tools": None if tools is None else tools.functions,
            "template": body.chat_template_kwargs,
            "prompt_cache_key": body.prompt_cache_key,
            "text_format": body.response_format,
            "reasoning_effort": body.reasoning_effort,
            "verbosity": body.verbosity,
            "service_tier": body.service_tier,
        },
        messages=messages,
        tell=tell,
    )


def unheard_effort(served: ServedModel, body: ChatRequest) -> list[str]:
    """The name of the effort that was asked for, where the model's template has no switch for it."""
    is_heard = body.reasoning_effort is None or effort_vars(served, body.reasoning_effort)
    return [] if is_heard else ["reasoning_effort"]


def template_options(body: ChatRequest, tools: Tools | None, effort: Mapping[str, Any]) -> TemplateOptions:
    """What the template gets beside the messages; what it is given by name goes before the `effort`."""
    return {
        "tools": None if tools is None else tools.functions,
        "template_vars": {**effort, **(body.chat_template_kwargs or {})} or None,
        "add_generation_prompt": body.add_generation_prompt is not False,
        "continue_final_message": bool(body.continue_final_message),
        "plain_content": True,
    }


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


AnswerParts: TypeAlias = tuple[str, list[dict[str, Any]], str | None]


def calls_and_text(running: Running, at: int, parser: AnswerParser | None = None) -> AnswerParts:
    """A completion's text, its calls and its thoughts, as its own parser or a new one finds them."""
    branch = running.branches[at]
    if running.parsers is None:
        return branch.text.text, [], None
    parser = parser or running.parsers[at]
    events = [
        each
        for token_id, text in zip(branch.completion_ids, branch.text.parts, strict=True)
        for each in parser.feed(token_id, text)
    ]
    text, calls, thought = "", list[dict[str, Any]](), None
    for found in (*events, *parser.finish()):
        match found:
            case TextDelta():
                text += found.text
            case ThoughtDelta():
                thought = (thought or "") + found.text
            case CallBegin():
                function = {"name": found.name, "arguments": ""}
                calls.append({"id": found.call_id, "type": "function", "function": function})
            case ArgumentsDelta():
                calls[found.index]["function"]["arguments"] += found.text
    return text, calls, thought


def chat_completion(running: Running, body: ChatRequest) -> dict[str, Any]:
    """The whole answer."""
    running.response_id = running.new_id("chatcmpl-")
    choices = []
    for at, branch in enumerate(running.branches):
        text, calls, thought = calls_and_text(running, at)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": text if text or not calls else None,
            "refusal": None,
            "annotations": [],
        }
        if thought is not None:
            message["reasoning_content"] = thought
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
                **({"token_ids": branch.completion_ids} if body.return_token_ids else {}),
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
        **({"prompt_token_ids": running.generation.prompts[0]} if body.return_token_ids else {}),
        **running.extras(),
    }


def chat_logprobs(running: Running, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """Those of some tokens."""
    return {"content": [logprobs_entry(running, entry) for entry in entries], "refusal": None}


class ChatWriter(OpenAIWriter, CallWriter):
    """Chunks of a chat completion."""

    def __init__(self, running: Running, body: ChatRequest) -> None:
        super().__init__(
            running,
            body.stream_options,
            prefix="chatcmpl-",
            kind="chat.completion.chunk",
            with_token_ids=body.return_token_ids,
        )
        self._num_calls = [0] * len(running.branches)

    def _delta(self, index: int, delta: bytes, logprobs: bytes = b"null", others: bytes = b"") -> bytes:
        ids = self.encoded_token_ids(index)
        choice = b'{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":null%b}' % (index, delta, logprobs, ids)
        return self.chunk(choice, others)

    def begin(self) -> bytes:
        """The role of each choice, in their order; with token ids, the first chunk has the prompt's."""
        delta = b'{"role":"assistant","content":""}'
        prompt = b""
        if self._token_ids is not None:
            prompt = b',"prompt_token_ids":' + encode(self.running.generation.prompts[0])
        return b"".join(
            self._delta(index, delta, others=prompt if index == 0 else b"")
            for index in range(len(self.running.branches))
        )

    def text(self, index: int, text: str, logprobs: TokenLogprobs | None) -> bytes:
        """More of the answer."""
        told = b"null" if logprobs is None else encode(chat_logprobs(self.running, [logprobs]))
        return self._delta(index, b'{"content":' + encode(text) + b"}", told)

    def thought(self, index: int, event: ThoughtDelta) -> bytes:
        """More of what comes before the answer."""
        return self._delta(index, b'{"reasoning_content":' + encode(event.text) + b"}")

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

    def call_end(self, index: int, event: CallEnd) -> bytes:
        """Nothing: the next call, or the end, says so."""
        return b""

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
