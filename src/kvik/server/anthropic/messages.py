"""`/v1/messages`: Anthropic's API, whole or as events; a translation to chats."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from kvik.server.anthropic.messages_input import OWN_NAMES, Conversation, CountRequest, MessagesRequest
from kvik.server.bodies import json_response, read_body
from kvik.server.cache.diagnostics import Diagnosis
from kvik.server.errors import ApiError
from kvik.server.event_stream import EventStream
from kvik.server.generation import Generation, Running, default_max_tokens, start
from kvik.server.openai.chat import prepare_chat
from kvik.server.openai.item_writer import Item, ItemKind, ItemWriter, named_event
from kvik.server.openai.translation import own_names
from kvik.server.preparing import ignored_header
from kvik.server.reasoning import effort_vars
from kvik.server.reply import reply
from kvik.server.served import ServedModel
from kvik.server.sse import event
from kvik.server.state import ServerState


async def messages(request: Request) -> Response | EventStream:
    """Answer with a message."""
    state = ServerState.of(request)
    body = await read_body(request, MessagesRequest)
    served = state.models.get(body.model)
    generation = await asyncio.to_thread(prepare, state, request, body, served)
    headers = ignored_header(_ignored(state, body, served))
    with own_names(OWN_NAMES):
        running = await start(generation, wants_pieces=bool(body.stream))
    writer = MessageWriter(running, body)
    return await reply(request, running, headers, writer=writer if body.stream else None, whole=writer.whole)


async def count_message_tokens(request: Request) -> Response:
    """How many tokens a request's prompt has."""
    state = ServerState.of(request)
    body = await read_body(request, CountRequest)
    served = state.models.get(body.model)
    generation = await asyncio.to_thread(_prepared_chat, state, request, body, served)
    return json_response(
        {"input_tokens": len(generation.prompts[0])}, headers=ignored_header(_ignored(state, body, served))
    )


def prepare(state: ServerState, request: Request, body: MessagesRequest, served: ServedModel) -> Generation:
    """Translate and prepare; not on the event loop, for it takes its time."""
    # `max_tokens` is no wish here but a bound, which clients set far above any answer: the context is another.
    bounded = msgspec.structs.replace(body, max_tokens=min(body.max_tokens, served.llm.model.context))
    generation = _prepared_chat(state, request, bounded, served)
    room = default_max_tokens(state, served, len(generation.prompts[0]), 1)
    params = replace(generation.params, max_tokens=min(generation.params.max_tokens, room))
    return replace(generation, params=params, prewarm=body.max_tokens == 0)


def _prepared_chat(state: ServerState, request: Request, body: Conversation, served: ServedModel) -> Generation:
    if _drops_billing_line(state, body):
        body = body.without_billing_line()
    chat = body.chat()
    with own_names(OWN_NAMES):
        return prepare_chat(state, request, chat, served, tell=Diagnosis.anthropic)


def _drops_billing_line(state: ServerState, body: Conversation) -> bool:
    return state.config.drop_billing_line and body.has_billing_line


def _ignored(state: ServerState, body: Conversation, served: ServedModel) -> list[str]:
    names = body.ignored(thinks=served.thoughts is not None, hears_effort=bool(effort_vars(served, body.effort)))
    return names + (["billing_line"] if _drops_billing_line(state, body) else [])


_TEXT_KEYS: Mapping[ItemKind, str] = {"call": "input", "text": "text", "thought": "thinking"}


class MessageWriter(ItemWriter):
    """A message and the events of its making."""

    ping = named_event("ping")

    def __init__(self, running: Running, body: MessagesRequest) -> None:
        super().__init__(running)
        self._max_tokens = body.max_tokens
        running.response_id = running.new_id("msg_")

    def whole(self) -> dict[str, Any]:
        """The message, when it is not streamed."""
        self.replay()
        content: list[dict[str, Any]] = [
            _block(item) | {_TEXT_KEYS[item.kind]: _input(item.text) if item.kind == "call" else item.text}
            for item in self.items
        ]
        return {**self._message(), "content": content, **self._end_reason(), **self.running.extras()}

    def begin(self) -> bytes:
        """The message, with nothing in it."""
        # Clients keep what the first event says of the cache.
        told = {name: value for name, value in self.running.extras().items() if name == "diagnostics"}
        return named_event("message_start", message=self._message() | told) + self.ping

    def item_id(self, kind: ItemKind) -> str:
        """Blocks have none."""
        return ""

    def item_begin(self, item: Item) -> bytes:
        """A block, empty."""
        return named_event("content_block_start", index=item.at, content_block=_block(item))

    def item_delta(self, item: Item, text: str, logprobs: list[dict[str, Any]]) -> bytes:
        """More text or input."""
        if item.kind == "call":
            delta = {"type": "input_json_delta", "partial_json": text}
        elif item.kind == "thought":
            delta = {"type": "thinking_delta", "thinking": text}
        else:
            delta = {"type": "text_delta", "text": text}
        return named_event("content_block_delta", index=item.at, delta=delta)

    def item_end(self, item: Item) -> bytes:
        """No more of a block."""
        return named_event("content_block_stop", index=item.at)

    def end(self) -> bytes:
        """Why it ended, what it cost, and the end."""
        usage = self.running.usage().anthropic()
        delta = named_event("message_delta", delta=self._end_reason(), usage=usage, **self.running.extras())
        return delta + named_event("message_stop")

    def error(self, error: ApiError) -> bytes:
        """The error as the last event."""
        return event(error.anthropic(), "error")

    def _message(self) -> dict[str, Any]:
        return {
            "id": self.running.response_id,
            "type": "message",
            "role": "assistant",
            "model": self.running.served.id,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self.running.usage().anthropic(),
        }

    def _end_reason(self) -> dict[str, str | None]:
        (branch,) = self.running.branches
        stopped_by = None
        if self.running.generation.prewarm:
            reason = "max_tokens"
        elif branch.finish_reason == "length":
            is_asked = branch.num_completion_tokens >= self._max_tokens
            reason = "max_tokens" if is_asked else "model_context_window_exceeded"
        elif self.num_calls:
            reason = "tool_use"
        else:
            stopped_by = branch.text.stopped_by
            reason = "end_turn" if stopped_by is None else "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": stopped_by}


def _block(item: Item) -> dict[str, Any]:
    if item.kind == "thought":
        return {"type": "thinking", "thinking": "", "signature": ""}
    if item.kind == "call":
        return {"type": "tool_use", "id": item.call_id, "name": item.name, "input": {}}
    return {"type": "text", "text": ""}


def _input(arguments: str) -> dict[str, Any]:
    """The object that a call's arguments are; empty where the answer was cut off in them, as a stream would show."""
    try:
        found = json.loads(arguments)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
