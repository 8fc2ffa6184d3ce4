"""`/v1/cache/match`: how far a prompt would be found in the cache, and where and why it would not be."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from kvik.cache import MissReason
from kvik.server.bodies import json_response, read_body
from kvik.server.errors import api_error, bad_request
from kvik.server.fields import Body, Text
from kvik.server.generation import check_texts
from kvik.server.openai.chat_input import ChatMessage, texts_of
from kvik.server.preparing import FunctionTool, Tools
from kvik.server.reasoning import with_thoughts
from kvik.server.served import ServedModel
from kvik.server.state import ServerState

MAX_PROMPT = 1 << 20  # characters
SHOWN_TOKENS = 8  # on each side of where the match ends


class MatchRequest(Body, frozen=True, kw_only=True):
    """A text, or a conversation, to be looked for in the cache."""

    model: str | None = None
    prompt: Annotated[str, Meta(max_length=MAX_PROMPT)] | None = None
    messages: list[ChatMessage] | None = None
    tools: list[FunctionTool] | None = None
    cache_salt: Text | None = None


async def match(request: Request) -> Response:
    """How far a prompt would be found in the cache, and why no further; nothing is computed."""
    state = ServerState.of(request)
    body = await read_body(request, MatchRequest)
    served = state.models.get(body.model)
    salt = state.salt(request, body.cache_salt)
    tells_salts, shows_text, may_read = state.is_operator_alone, not state.config.redact, state.may_read(request, salt)
    try:
        told = await asyncio.to_thread(_told, served, body, salt, tells_salts=tells_salts, shows_text=shows_text)
    except Exception as error:
        raise api_error(error, frozenset(MatchRequest.__struct_fields__)) from error
    if not may_read:  # it would tell how the text of others goes on
        told.pop("expected", None)
    return json_response(told)


def token_ids_of(
    served: ServedModel,
    prompt: str | None,
    messages: list[ChatMessage] | None,
    tools: list[FunctionTool] | None = None,
) -> list[int]:
    """Those of a text or a conversation, of which one must be given; tools go with a conversation."""
    if (prompt is None) == (messages is None):
        raise bad_request("send one of prompt and messages", "prompt")
    told_tools = Tools.of(tools, None, None)
    if told_tools is not None and messages is None:
        raise bad_request("tools go with messages, not with prompt", "tools")
    if messages is None:
        assert prompt is not None
        token_ids = served.llm.model.tokenizer.encode(prompt)
    else:
        plain = [message.plain(f"messages[{at}]") for at, message in enumerate(messages)]
        check_texts(served, texts_of(plain), "messages")
        if told_tools is not None:
            served.tool_format  # noqa: B018  # raises where the model has none
        functions = None if told_tools is None else told_tools.functions
        token_ids = served.llm.render_chat(with_thoughts(served, plain), tools=functions, plain_content=True)
    if not token_ids:
        raise bad_request("the prompt has no tokens", "prompt")
    return token_ids


def _told(
    served: ServedModel, body: MatchRequest, salt: str | None, *, tells_salts: bool, shows_text: bool
) -> dict[str, Any]:
    token_ids = token_ids_of(served, body.prompt, body.messages, body.tools)
    found = served.llm.cache.match(token_ids, salt)
    reason, end = found.miss_reason, found.num_cached_tokens
    if reason is MissReason.OTHER_SALT and not tells_salts:
        reason = MissReason.UNSEEN
    told: dict[str, Any] = {
        "object": "cache.match",
        "model": served.id,
        "num_tokens": len(token_ids),
        "num_cached_tokens": end,
        "num_blocks": len(found.block_ids),
        "block_ids": found.block_ids,
        "miss_reason": reason.name.lower(),
    }
    if shows_text:
        token_text = served.llm.model.tokenizer.token_text
        told["before"] = [token_text(each) for each in token_ids[max(0, end - SHOWN_TOKENS) : end]]
        told["found"] = [token_text(each) for each in token_ids[end : end + SHOWN_TOKENS]]
        told["expected"] = [token_text(each) for each in found.expected_ids[:SHOWN_TOKENS]]
    return told
