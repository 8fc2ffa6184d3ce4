"""`/v1/sessions`: conversations whose messages and cache the server keeps between turns."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any, TypeVar

from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from kvik.errors import CacheTooSmall
from kvik.server.bodies import json_response, read_body
from kvik.server.cache import saved_routes
from kvik.server.cache.pins import PinTooLarge, parse_ttl
from kvik.server.cache.sessions import Session
from kvik.server.errors import ApiError, api_error, bad_request
from kvik.server.fields import Body, Text
from kvik.server.generation import new_id
from kvik.server.openai.chat_input import ChatMessage
from kvik.server.preparing import FunctionTool, Tools
from kvik.server.state import ServerState, tenant_of

T = TypeVar("T")


class NewSession(Body, frozen=True, kw_only=True):
    """A session to be made: with messages, or with those of another one."""

    model: str | None = None
    system: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[FunctionTool] | None = None
    ttl: str | None = None
    cache_salt: Text | None = None
    fork: Text | None = None
    load: Text | None = None


class Rewind(Body, frozen=True, kw_only=True):
    """How many messages to forget."""

    num_messages: Annotated[int, Meta(ge=1, le=2**31 - 1)] = 1


class Lifetime(Body, frozen=True, kw_only=True):
    """For how long."""

    ttl: str | None = None


async def create(request: Request) -> Response:
    """Make a session."""
    state = ServerState.of(request)
    body = await _read_options(request, NewSession)
    ttl_s = state.config.session_ttl_s if body.ttl is None else parse_ttl(body.ttl, "ttl")
    if body.fork is not None:
        others = {"model", "system", "messages", "tools", "cache_salt", "load"}
        if given := sorted(name for name in others if getattr(body, name) is not None):
            raise bad_request(f"a fork begins as the session is: leave out {', '.join(given)}", given[0])
        return json_response(told(state, await _fork(request, body.fork, body.ttl)))
    served = state.models.get(body.model)
    if not served.llm.is_chat_model:
        raise bad_request(f"{served.id} has no chat template, and sessions are chats", "model")
    messages = [] if body.system is None else [{"role": "system", "content": body.system}]
    messages += [message.plain(f"messages[{at}]") for at, message in enumerate(body.messages or ())]
    if body.cache_salt is not None and not body.cache_salt.isprintable():
        raise bad_request("cache_salt has characters that are not printable", "cache_salt")
    salt, tools = state.salt(request, body.cache_salt), body.tools
    if body.load is not None:
        if given := sorted(name for name in ("system", "messages", "tools") if getattr(body, name) is not None):
            raise bad_request(f"a saved session has its own {', '.join(given)}", given[0])
        messages, tools = await saved_routes.load(request, served, salt, body.load)
    Tools.of(tools, None, None)
    session = Session(
        id=new_id("sess_"),
        served=served,
        tenant=tenant_of(request),
        salt=salt,
        ttl_s=ttl_s,
        tools=tools,
        messages=messages,
    )
    session.check_size(messages)
    state.kept.sessions.add(session)
    state.kept.watch()
    return json_response(told(state, session))


async def list_all(request: Request) -> Response:
    """The caller's sessions."""
    state = ServerState.of(request)
    if tenant_of(request) is None and not state.is_operator_alone:
        raise ApiError(
            403,
            "without keys nobody's sessions can be told from others' (hint: name one by its id)",
            code="not_the_operator",
        )
    data = [told(state, session) for session in state.kept.sessions.of(tenant_of(request))]
    return json_response({"object": "list", "data": data})


async def retrieve(request: Request) -> Response:
    """One of them, with its messages."""
    state = ServerState.of(request)
    session = state.kept.sessions.get(tenant_of(request), request.path_params["id"])
    return json_response({**told(state, session), "messages": session.messages})


async def delete(request: Request) -> Response:
    """End it; a turn that is being written ends by itself."""
    state = ServerState.of(request)
    session = state.kept.sessions.get(tenant_of(request), request.path_params["id"])
    state.kept.sessions.close(session)
    return json_response({"id": session.id, "object": "session", "deleted": True})


async def fork(request: Request) -> Response:
    """Another session with the same past and the same blocks."""
    state = ServerState.of(request)
    body = await _read_options(request, Lifetime)
    return json_response(told(state, await _fork(request, request.path_params["id"], body.ttl)))


async def rewind(request: Request) -> Response:
    """Forget the last messages; what was computed of those before them stays."""
    state = ServerState.of(request)
    body = await _read_options(request, Rewind)
    session = state.kept.sessions.get_idle(tenant_of(request), request.path_params["id"])
    if body.num_messages > len(session.messages):
        raise bad_request(
            f"num_messages is {body.num_messages:,}, the session has {len(session.messages):,}", "num_messages"
        )
    del session.messages[-body.num_messages :]
    state.kept.sessions.touch(session)
    return json_response(told(state, session))


async def pin(request: Request) -> Response:
    """Keep what is computed of it now, whoever else needs memory."""
    state = ServerState.of(request)
    body = await _read_options(request, Lifetime)
    sessions, pins = state.kept.sessions, state.kept.pins
    session = sessions.get_idle(tenant_of(request), request.path_params["id"])
    ttl_s = session.ttl_s if body.ttl is None else parse_ttl(body.ttl, "ttl")
    lease = session.lease
    if lease is None or not lease.num_tokens:
        raise ApiError(
            409, "nothing of the session is in the cache (hint: pin it after an answer)", code="session_not_cached"
        )
    sessions.touch(session)
    session.is_busy = True  # a turn would replace the lease
    try:
        new = await asyncio.to_thread(
            pins.add,
            lease,
            lease.num_tokens,
            kind="session",
            served=session.served,
            tenant=session.tenant,
            salt=session.salt,
            ttl_s=ttl_s,
        )
    except PinTooLarge:
        raise ApiError(
            400,
            f"the session's {lease.num_tokens:,} tokens take more blocks than all pins may,"
            f" {pins.limit(session.served):,} (hint: give the cache more memory)",
            code="pin_limit_exceeded",
        ) from None
    except CacheTooSmall as error:
        raise ApiError(409, f"{error.message} (hint: {error.hint})", code="no_room_to_pin") from error
    except Exception as error:
        raise api_error(error) from error
    finally:
        session.is_busy = False
    if session.is_closed:
        pins.drop(new)
    else:
        sessions.unpin(session)
        session.pin = new
    state.kept.watch()
    return json_response(told(state, session))


async def unpin(request: Request) -> Response:
    """Let others have the memory again."""
    state = ServerState.of(request)
    session = state.kept.sessions.get(tenant_of(request), request.path_params["id"])
    state.kept.sessions.unpin(session)
    return json_response(told(state, session))


async def _read_options(request: Request, kind: type[T]) -> T:
    """The body, all of whose fields have defaults; it may be left out."""
    return await read_body(request, kind) if await request.body() else kind()


async def _fork(request: Request, session_id: str, ttl: str | None) -> Session:
    state = ServerState.of(request)
    sessions = state.kept.sessions
    session = sessions.get_idle(tenant_of(request), session_id)
    forked = Session(
        id=new_id("sess_"),
        served=session.served,
        tenant=session.tenant,
        salt=session.salt,
        ttl_s=session.ttl_s if ttl is None else parse_ttl(ttl, "ttl"),
        tools=session.tools,
        parent=session.id,
        messages=[*session.messages],
        num_turns=session.num_turns,
    )
    lease = session.lease
    sessions.touch(session)
    if lease is not None and lease.num_tokens:
        session.is_busy = True  # a turn would replace the lease
        try:
            forked.lease = await asyncio.to_thread(lease.fork)
        except Exception as error:
            raise api_error(error) from error
        finally:
            session.is_busy = False
    try:
        sessions.add(forked)
    except ApiError:
        sessions.close(forked)
        raise
    state.kept.watch()
    return forked


def told(state: ServerState, session: Session) -> dict[str, Any]:
    """A session as answers have it."""
    now, now_s = time.time(), state.clock()
    pin = session.pin
    return {
        "id": session.id,
        "object": "session",
        "model": session.served.id,
        "created": session.created,
        "expires_at": int(now + session.used_s + session.ttl_s - now_s),
        "ttl_s": session.ttl_s,
        "num_messages": len(session.messages),
        "num_turns": session.num_turns,
        "cached_tokens": session.num_cached_tokens,
        "is_busy": session.is_busy,
        "forked_from": session.parent,
        "pin": None
        if pin is None or not pin.num_tokens
        else {"tokens": pin.num_tokens, "expires_at": int(now + pin.expires_s - now_s)},
    }
