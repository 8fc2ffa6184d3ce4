"""The page at `/`, its files, the events that it is drawn from, and what its buttons do."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from kvik import __version__
from kvik.engine.cache_view import BlockView
from kvik.engine.sequence import Sequence
from kvik.server.bodies import json_response
from kvik.server.errors import ApiError
from kvik.server.live.event_answer import EventAnswer
from kvik.server.live.hub import MAX_WATCHERS, Live, Viewer
from kvik.server.live.page_files import PAGE, PAGE_FILES
from kvik.server.served import ServedModel
from kvik.server.state import ServerState, tenant_of

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:;"
    " frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {"content-security-policy": POLICY, "referrer-policy": "no-referrer", "cache-control": "no-cache"}


async def page(request: Request) -> Response:
    """The live page."""
    config = ServerState.of(request).config
    facts = {"key": bool(config.api_keys), "read-only": config.read_only, "redact": config.redact}
    told = " ".join(name for name, is_so in facts.items() if is_so)
    text = PAGE.replace("__VERSION__", __version__).replace("__FACTS__", told)
    return Response(text, media_type="text/html", headers=HEADERS)


async def page_file(request: Request) -> Response:
    """A module or the style of the live page."""
    found = PAGE_FILES.get(request.path_params["name"])
    if found is None:
        raise ApiError(404, "the page has no such file (hint: it is at /)", code="not_found")
    headers = {**HEADERS, "etag": found.tag}
    if request.headers.get("if-none-match") == found.tag:
        return Response(status_code=304, headers=headers)
    return Response(found.text, media_type=found.kind, headers=headers)


async def events(request: Request) -> Events | Response:
    """What happens in all models, as server-sent events: `state` at first, then each `change`, ten a second at most."""
    state = ServerState.of(request)
    state.check_open()
    if state.live.num_watchers >= MAX_WATCHERS:
        raise ApiError(
            429,
            f"{MAX_WATCHERS} watch already (hint: close a page, or try again later)",
            code="rate_limit_exceeded",
        )
    if request.method == "HEAD":
        return Response(media_type="text/event-stream")
    viewer = Viewer(tenant_of(request), sees_all=not state.config.api_keys, sees_text=not state.config.redact)
    return Events(state.live, viewer)


class Events(EventAnswer):
    """Messages until the one who watches leaves, or the server drains."""

    def __init__(self, live: Live, viewer: Viewer) -> None:
        self._live = live
        self._viewer = viewer

    async def messages(self) -> AsyncIterator[bytes]:
        """The state, then changes."""
        watcher = await self._live.join(self._viewer)
        try:
            while (data := await watcher.read(self._live)) is not None:
                yield data
        finally:
            await asyncio.shield(self._live.leave(watcher))


async def one_block(request: Request) -> Response:
    """A block of the cache, and the tokens in it where they are the caller's own."""
    state = ServerState.of(request)
    served = state.models.get(request.query_params.get("model"))
    text, group = request.path_params["id"], request.query_params.get("group", "0")
    found = None
    if all(each.isascii() and each.isdecimal() and len(each) < 10 for each in (text, group)):
        found = await asyncio.to_thread(served.llm.cache.block, int(text), int(group))
    if found is None:
        raise ApiError(404, f"there is no block {text[:40]!r} in group {group[:40]!r}", code="not_found")
    tenant = tenant_of(request)
    is_own = any(_owns(state, tenant, served, each) for each in found.holders) or state.owns(tenant, found.salt)
    return json_response(_told(served, found, shows_text=is_own and not state.config.redact, is_own=is_own))


def _told(served: ServedModel, found: BlockView, *, shows_text: bool, is_own: bool) -> dict[str, Any]:
    token_text = served.llm.model.tokenizer.token_text
    return {
        "object": "cache.block",
        "model": served.id,
        "id": found.block_id,
        "state": found.state,
        "num_holders": found.num_holders,
        "is_sealed": found.is_sealed,
        "first_token": found.first_token,
        "num_tokens": len(found.token_ids),
        "num_evicted_before": found.num_evicted_before,
        "is_own": is_own,
        **({"tokens": [token_text(token_id) for token_id in found.token_ids]} if shows_text else {}),
    }


async def abort(request: Request) -> Response:
    """End a request of the caller's that is not whole yet; its blocks are given back."""
    state = ServerState.of(request)
    if state.config.read_only:
        raise ApiError(403, "this server's requests can be watched, not ended", code="read_only")
    request_id, tenant, num_aborted = request.path_params["id"], tenant_of(request), 0
    for served in state.models:
        unfinished = list(served.llm.engine.scheduler.unfinished)
        own = [
            sequence
            for sequence in unfinished
            if sequence.request.request_id == request_id and _owns(state, tenant, served, sequence)
        ]
        await served.async_llm.abort(own)
        num_aborted += len(own)
    if not num_aborted:
        raise ApiError(404, f"no request {request_id[:128]!r} runs or waits", code="request_not_found")
    return json_response({"id": request_id, "object": "request", "aborted": num_aborted})


async def prompt(request: Request) -> Response:
    """The whole prompt of a request of the caller's own, which the events show the end of."""
    state = ServerState.of(request)
    if state.config.redact:
        raise ApiError(403, "this server shows the text of tokens to nobody who watches", code="redacted")
    request_id = request.path_params["id"]
    found = state.live.prompt_of(request_id, tenant_of(request))
    if found is None:
        raise ApiError(
            404,
            f"no prompt of {request_id[:128]!r} is kept (hint: those of requests that came while somebody watched are,"
            " the newest of them)",
            code="request_not_found",
        )
    served, packed_ids = found
    token_ids = array("i", packed_ids)
    text = await asyncio.to_thread(served.llm.model.tokenizer.decode, token_ids.tolist(), skip_special=False)
    return json_response(
        {
            "id": request_id,
            "object": "request",
            "model": served.id,
            "num_prompt_tokens": len(token_ids),
            "prompt": text,
        }
    )


def _owns(state: ServerState, tenant: str | None, served: ServedModel, sequence: Sequence) -> bool:
    owner = served.tenants.get(sequence)
    return (owner is not None and owner == tenant) or state.owns(tenant, sequence.request.salt)
