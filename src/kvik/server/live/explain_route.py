"""`/v1/explain`: the page of `kvik explain`, made of a prompt and kept for a while."""

from __future__ import annotations

import asyncio
import copy
from dataclasses import replace
from typing import Annotated

from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from kvik.config import SamplingParams
from kvik.engine.llm import LLM
from kvik.explain.html import render_page
from kvik.explain.limits import MAX_PAGE_TOKENS
from kvik.explain.page_data import page_data
from kvik.explain.prefixes import default_follow_ups, follow_up
from kvik.explain.run import check_tokens, trace_run
from kvik.explain.selection import select
from kvik.server.bodies import json_response, read_body
from kvik.server.cache.match_route import token_ids_of
from kvik.server.errors import ApiError, api_error
from kvik.server.fields import Body
from kvik.server.live.explained import LINK_S, MAX_KEPT
from kvik.server.live.race_route import race_kv_bytes
from kvik.server.openai.chat_input import ChatMessage
from kvik.server.served import ServedModel
from kvik.server.state import ServerState, tenant_of

POLICY = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline' data:; style-src 'unsafe-inline';"
    " img-src data:; frame-ancestors 'self'"
)
"""What the page itself asks for, in an origin of its own: it reaches neither this server nor the live page."""


class ExplainRequest(Body, frozen=True, kw_only=True):
    """What is answered, greedily, and watched."""

    model: str | None = None
    prompt: Annotated[str, Meta(max_length=4096)] | None = None
    messages: list[ChatMessage] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_PAGE_TOKENS)] = 16


async def explain(request: Request) -> Response:
    """Answer a prompt without the cache and with it, watch both, and make a page of it."""
    state = ServerState.of(request)
    body = await read_body(request, ExplainRequest)
    served = state.models.get(body.model)
    if state.config.read_only:
        raise ApiError(403, "this server can be watched, not asked", code="read_only")
    if state.live.racing.locked():
        raise ApiError(429, "a race is on already (hint: try again when it is over)", code="rate_limit_exceeded")
    async with state.live.racing:
        try:
            page = await asyncio.to_thread(_page, served, body)
        except Exception as error:
            raise api_error(error, frozenset(ExplainRequest.__struct_fields__)) from error
    page_id = state.live.explained.keep(tenant_of(request), page)
    return json_response(
        {"id": page_id, "object": "explained", "url": f"/v1/explain/{page_id}", "bytes": len(page.encode())}
    )


async def explained(request: Request) -> Response:
    """A page that was made."""
    page = ServerState.of(request).live.explained.get(tenant_of(request), request.path_params["id"])
    if page is None:
        raise _no_page()
    return _shown(page)


async def link(request: Request) -> Response:
    """An address of such a page that opens once, without a key."""
    secret = ServerState.of(request).live.explained.link(tenant_of(request), request.path_params["id"])
    if secret is None:
        raise _no_page()
    return json_response({"url": f"/explained/{secret}", "expires_s": LINK_S})


async def opened(request: Request) -> Response:
    """The page of such an address, to whoever has it and comes first."""
    if request.method == "HEAD":  # whoever looks whether a link is good must not use it up
        return _shown("")
    page = ServerState.of(request).live.explained.open(request.path_params["secret"])
    if page is None:
        raise ApiError(404, "this link was opened, or is too old (hint: ask for another)", code="not_found")
    return _shown(page)


def _no_page() -> ApiError:
    return ApiError(404, f"there is no such page (hint: the newest {MAX_KEPT} are kept)", code="not_found")


def _shown(page: str) -> Response:
    headers = {"content-security-policy": POLICY, "referrer-policy": "no-referrer", "cache-control": "no-store"}
    return Response(page, media_type="text/html", headers=headers)


def _page(served: ServedModel, body: ExplainRequest) -> str:
    prompt_ids, num_written = token_ids_of(served, body.prompt, body.messages), body.max_tokens
    check_tokens(served.llm, len(prompt_ids), num_written)
    llm = _with_small_caches(served.llm)
    spec, kv_spec = llm.model.decoder.spec, llm.engine.kv_spec
    selection = select(spec, kv_spec, len(prompt_ids) + num_written)
    run = trace_run(llm, prompt_ids, SamplingParams(max_tokens=num_written, ignore_eos=True), selection)
    follow_ups = default_follow_ups(llm, run.prompt_ids, run.token_ids)
    found = [follow_up(llm, run.token_ids, title, token_ids) for title, token_ids in follow_ups]
    return render_page(page_data(run, served.id, found, []))


def _with_small_caches(llm: LLM) -> LLM:
    """The same model, whose further engines take little memory."""
    small = copy.copy(llm)
    small.config = replace(llm.config, kv_memory=race_kv_bytes(llm.engine.kv_spec, MAX_PAGE_TOKENS))
    return small
