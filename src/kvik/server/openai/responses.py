"""`/v1/responses`: items in, items out, whole or as events; a translation to chats."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from kvik.engine.output import Piece, Progress
from kvik.server.bodies import json_response, read_body
from kvik.server.errors import ApiError
from kvik.server.event_stream import EventStream
from kvik.server.generation import Generation, Running, start
from kvik.server.openai.chat import prepare_chat
from kvik.server.openai.item_writer import Item, ItemKind, ItemWriter, named_event
from kvik.server.openai.responses_input import OWN_NAMES, ResponsesRequest
from kvik.server.openai.translation import own_names
from kvik.server.preparing import ignored_header
from kvik.server.reasoning import effort_vars
from kvik.server.reply import reply
from kvik.server.served import ServedModel
from kvik.server.state import ServerState


async def responses(request: Request) -> Response | EventStream:
    """Answer with a response."""
    state = ServerState.of(request)
    body = await read_body(request, ResponsesRequest)
    served = state.models.get(body.model)
    generation = await asyncio.to_thread(prepare, state, request, body, served)
    headers = ignored_header(ignored(body, served))
    with own_names(OWN_NAMES):
        running = await start(generation, wants_pieces=bool(body.stream))
    writer = ResponseWriter(running, body)
    return await reply(request, running, headers, writer=writer if body.stream else None, whole=writer.whole)


async def count_response_tokens(request: Request) -> Response:
    """How many tokens a request's prompt has."""
    state = ServerState.of(request)
    body = await read_body(request, ResponsesRequest)
    served = state.models.get(body.model)
    generation = await asyncio.to_thread(prepare, state, request, body, served)
    answer = {"object": "response.input_tokens", "input_tokens": len(generation.prompts[0])}
    return json_response(answer, headers=ignored_header(ignored(body, served)))


def ignored(body: ResponsesRequest, served: ServedModel) -> list[str]:
    """What was accepted and has no effect with this model."""
    return body.ignored(thinks=served.thoughts is not None, hears_effort=bool(effort_vars(served, body.effort)))


def prepare(state: ServerState, request: Request, body: ResponsesRequest, served: ServedModel) -> Generation:
    """Translate and prepare; not on the event loop, for it takes its time."""
    body.check()
    chat = body.chat()
    with own_names(OWN_NAMES):
        generation = prepare_chat(state, request, chat, served)
    return replace(generation, prewarm=bool(body.prewarm))


_PREFIXES: Mapping[ItemKind, str] = {"call": "fc_", "text": "msg_", "thought": "rs_"}


class ResponseWriter(ItemWriter):
    """A response and the events of its making."""

    def __init__(self, running: Running, body: ResponsesRequest) -> None:
        super().__init__(running)
        self._body = body
        self._num_events = 0
        running.response_id = running.new_id("resp_")

    def whole(self) -> dict[str, Any]:
        """The response, when it is not streamed."""
        self.replay()
        return self._last_response()

    def begin(self) -> bytes:
        """The response, with nothing in it."""
        response = self._response("in_progress")
        return self._emit("response.created", response=response) + self._emit("response.in_progress", response=response)

    def progress(self, progress: Progress) -> bytes:
        """llama.cpp's `prompt_progress`."""
        report = {
            "total": progress.num_total,
            "cache": progress.num_cached,
            "processed": progress.num_processed,
            "time_ms": round(progress.elapsed_s * 1000),
        }
        response = self._response("in_progress")
        return self._emit("response.in_progress", response=response, prompt_progress=report)

    def item_id(self, kind: ItemKind) -> str:
        """An id by the kind."""
        return self.running.new_id(_PREFIXES[kind])

    def item_begin(self, item: Item) -> bytes:
        """The item, empty; but of a call also its one part."""
        data = self._emit("response.output_item.added", output_index=item.at, item=self._item(item, "in_progress"))
        if item.kind == "call":
            return data
        return data + self._emit("response.content_part.added", **self._part_of(item), part=_part(item))

    def item_delta(self, item: Item, text: str, logprobs: list[dict[str, Any]]) -> bytes:
        """More text or arguments."""
        if item.kind == "call":
            told = {"logprobs": logprobs} if self._has_logprobs else {}
            return self._emit("response.function_call_arguments.delta", **self._place(item), delta=text, **told)
        if item.kind == "thought":
            told = {"logprobs": logprobs} if self._has_logprobs else {}
            return self._emit("response.reasoning_text.delta", **self._part_of(item), delta=text, **told)
        return self._emit("response.output_text.delta", **self._part_of(item), delta=text, logprobs=logprobs)

    def item_end(self, item: Item) -> bytes:
        """All of it, in each form."""
        if item.kind == "call":
            data = self._emit(
                "response.function_call_arguments.done", **self._place(item), name=item.name, arguments=item.text
            )
        else:
            part = self._part_of(item)
            if item.kind == "thought":
                data = self._emit("response.reasoning_text.done", **part, text=item.text)
            else:
                data = self._emit("response.output_text.done", **part, text=item.text, logprobs=item.logprobs)
            data += self._emit("response.content_part.done", **part, part=_part(item))
        return data + self._emit("response.output_item.done", output_index=item.at, item=self._item(item))

    def finish(self, index: int, piece: Piece) -> bytes:
        """The last item ends; an answer without any has an empty message."""
        data = super().finish(index, piece)
        if not self.items:
            data += self._add("text", "") + super().finish(index, piece)
        return data

    def end(self) -> bytes:
        """The whole response."""
        response = self._last_response()
        return self._emit("response." + response["status"], response=response)

    def error(self, error: ApiError) -> bytes:
        """The error, and the response that failed."""
        told = self._emit("error", code=error.code, message=error.message, param=error.param)
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        response = self._response("failed", error={"code": code, "message": error.message})
        return told + self._emit("response.failed", response=response)

    def _emit(self, kind: str, **fields: Any) -> bytes:
        self._num_events += 1
        return named_event(kind, sequence_number=self._num_events - 1, **fields)

    @staticmethod
    def _place(item: Item) -> dict[str, Any]:
        return {"item_id": item.id, "output_index": item.at}

    @staticmethod
    def _part_of(item: Item) -> dict[str, Any]:
        return {"item_id": item.id, "output_index": item.at, "content_index": 0}

    @property
    def _has_logprobs(self) -> bool:
        return self.running.generation.params.logprobs is not None

    def _item(self, item: Item, status: str | None = None) -> dict[str, Any]:
        is_begun = status is not None
        status = status or ("completed" if item.is_whole else "incomplete")
        if item.kind == "call":
            call = {"call_id": item.call_id, "name": item.name, "arguments": item.text}
            told = {"logprobs": item.logprobs} if self._has_logprobs and not is_begun else {}
            return {"type": "function_call", "id": item.id, **call, "status": status, **told}
        content = [] if is_begun else [_part(item)]
        if item.kind == "thought":
            return {"type": "reasoning", "id": item.id, "summary": [], "content": content, "status": status}
        return {"type": "message", "id": item.id, "role": "assistant", "content": content, "status": status}

    def _last_response(self) -> dict[str, Any]:
        """The response when nothing more is written."""
        is_cut = any(branch.finish_reason == "length" for branch in self.running.branches)
        return self._response(
            "incomplete" if is_cut else "completed",
            incomplete_details={"reason": "max_output_tokens"} if is_cut else None,
            completed_at=None if is_cut else int(time.time()),
            output=[self._item(item) for item in self.items],
            usage=self.running.usage().responses(),
            timings=self.running.timings(),
            **self.running.extras(),
        )

    def _response(self, status: str, **others: Any) -> dict[str, Any]:
        body, running = self._body, self.running
        text = {} if body.text is None else msgspec.to_builtins(body.text)
        return {
            "id": running.response_id,
            "object": "response",
            "created_at": running.created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": None,
            "metadata": body.metadata or {},
            "model": running.served.id,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {"effort": body.effort if effort_vars(running.served, body.effort) else None, "summary": None},
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": {"type": "text"}, **text},
            "tool_choice": "auto" if body.tool_choice is None else msgspec.to_builtins(body.tool_choice),
            "tools": [
                {
                    "type": "function",
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": tool.parameters,
                    "strict": bool(tool.strict),
                }
                for tool in body.functions
            ],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
            **others,
        }


def _part(item: Item) -> dict[str, Any]:
    if item.kind == "thought":
        return {"type": "reasoning_text", "text": item.text}
    return {"type": "output_text", "text": item.text, "annotations": [], "logprobs": item.logprobs}
