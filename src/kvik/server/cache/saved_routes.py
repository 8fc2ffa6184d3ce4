"""`/v1/saved_sessions`: conversations that outlive the server, kept by name in the store of their model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from kvik.cache.digest import Digest, next_digest
from kvik.errors import KvikError
from kvik.server.bodies import json_response, read_body
from kvik.server.errors import ApiError, api_error, bad_request
from kvik.server.fields import Body, Text
from kvik.server.preparing import FunctionTool
from kvik.server.served import ServedModel
from kvik.server.state import ServerState, tenant_of
from kvik.store.files import FileStore
from kvik.store.sessions import SavedSession, check_name, load_session, remove_session, save_session, session_names

T = TypeVar("T")

FLUSH_S = 60.0
"""That saving waits for blocks to be written."""


class SaveSession(Body, frozen=True, kw_only=True):
    """The name to save a session by; one that has it is replaced."""

    name: Text


async def save(request: Request) -> Response:
    """Save a session's messages, and the blocks that were computed of them."""
    state = ServerState.of(request)
    body = await read_body(request, SaveSession)
    session = state.kept.sessions.get_idle(tenant_of(request), request.path_params["id"])
    store, engine, lease = _store_of(session.served), session.served.llm.engine, session.lease
    state.kept.sessions.touch(session)

    def work() -> SavedSession:
        check_name(body.name)
        digests = [] if lease is None else engine.store_lease(lease)
        engine.flush_store(FLUSH_S)
        saved = SavedSession(
            name=body.name,
            model=session.served.id,
            messages=session.messages,
            template={} if session.tools is None else {"tools": msgspec.to_builtins(session.tools)},
            num_tokens=len(digests) * engine.kv_spec.block_size,
            digests=[digest.hex() for digest in digests],
            num_stored_blocks=sum(map(store.exists, digests)),
        )
        save_session(store, owner_of(session.served, session.tenant, session.salt), saved)
        return saved

    session.is_busy = True  # a turn would replace the lease
    try:
        saved = await _done(work)
    finally:
        session.is_busy = False
    return json_response(told(saved))


async def list_saved(request: Request) -> Response:
    """The caller's saved sessions of a model."""
    state = ServerState.of(request)
    if tenant_of(request) is None and not state.is_operator_alone:
        raise ApiError(
            403, "without keys nobody's sessions can be told from others' (hint: name one)", code="not_the_operator"
        )
    served, owner = _asked(request)
    names = await _done(partial(session_names, _store_of(served), owner))
    return json_response({"object": "list", "data": [{"name": name, "object": "saved_session"} for name in names]})


async def forget(request: Request) -> Response:
    """Forget one; its blocks go when nobody wants them."""
    served, owner = _asked(request)
    name = request.path_params["name"]
    if not await _done(partial(remove_session, _store_of(served), owner, name)):
        raise ApiError(404, f"there is no saved session {name[:100]!r}", code="session_not_found", param="name")
    return json_response({"name": name, "object": "saved_session", "deleted": True})


async def load(
    request: Request, served: ServedModel, salt: str | None, name: str
) -> tuple[list[Any], list[Any] | None]:
    """Messages and tools of a saved session."""
    owner = owner_of(served, tenant_of(request), salt)
    saved = await _done(partial(load_session, _store_of(served), owner, name))
    tools = saved.template.get("tools")
    try:
        return list(saved.messages), None if tools is None else msgspec.convert(tools, list[FunctionTool])
    except msgspec.ValidationError as error:
        raise bad_request(f"saved session {name!r} cannot be read: {error}", "load") from None


def owner_of(served: ServedModel, tenant: str | None, salt: str | None) -> Digest:
    """Whose a saved session is: of one key, where keys share the cache too, and of one salt."""
    root = served.llm.engine.cache.root(salt)
    return root if tenant is None else next_digest(root, tenant.encode(errors="surrogatepass"))


def told(saved: SavedSession) -> dict[str, Any]:
    """A saved session as answers have it."""
    return {
        "name": saved.name,
        "object": "saved_session",
        "model": saved.model,
        "created": saved.saved,
        "num_messages": len(saved.messages),
        "num_tokens": saved.num_tokens,
        "num_blocks": len(saved.digests),
        "num_stored_blocks": saved.num_stored_blocks,
    }


def _asked(request: Request) -> tuple[ServedModel, Digest]:
    """The model of the query, or the only one, and the owner that the caller and the salt make."""
    state = ServerState.of(request)
    served = state.models.get(request.query_params.get("model"))
    salt = state.salt(request, request.query_params.get("cache_salt"))
    return served, owner_of(served, tenant_of(request), salt)


def _store_of(served: ServedModel) -> FileStore:
    tier = served.llm.engine.tier
    if tier is None:
        raise ApiError(409, f"{served.id} stores nothing (hint: the operator can, kvik serve --store)", code="no_store")
    if not isinstance(tier.store, FileStore):
        raise ApiError(
            409,
            f"{served.id} shares its blocks through a server, where no sessions are saved (hint: the operator can give"
            " --store=DIR instead)",
            code="no_store",
        )
    return tier.store


async def _done(work: Callable[[], T]) -> T:
    """What the work gives, off the event loop."""
    try:
        return await asyncio.to_thread(work)
    except KvikError as error:
        raise api_error(error) from error
