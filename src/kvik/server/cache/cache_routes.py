"""`/v1/cache`: the blocks of each model's cache, its hit statistics, and what pins and sessions hold."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, overload

from starlette.requests import Request
from starlette.responses import Response

from kvik.engine.cache_view import TreeRow
from kvik.engine.store_tier import StoreTier
from kvik.server.bodies import json_response
from kvik.server.cache.sessions import Session
from kvik.server.errors import ApiError, bad_request
from kvik.server.served import ServedModel
from kvik.server.state import ServerState, tenant_of

MAX_LEVEL, MAX_ROWS, MAX_BLOCK = 64, 2000, 1 << 28
DEFAULT_LEVEL, DEFAULT_ROWS = 16, 200
MAX_TEXT = 500


async def show(request: Request) -> Response:
    """The state of all models' caches, and the caller's own pins and sessions."""
    state = ServerState.of(request)
    state.kept.sweep()
    sessions = [*state.kept.sessions.of(tenant_of(request))]
    told = await asyncio.to_thread(  # which may have to wait for a step
        lambda: [_told(state, tenant_of(request), served, sessions) for served in state.models]
    )
    return json_response({"object": "cache", "models": told})


async def tree(request: Request) -> Response:
    """A model's prefix tree; text only where it is the caller's own."""
    state = ServerState.of(request)
    served = state.models.get(request.query_params.get("model"))
    max_level = _number(request, "max_level", DEFAULT_LEVEL, MAX_LEVEL)
    max_rows = _number(request, "max_rows", DEFAULT_ROWS, MAX_ROWS)
    below = _number(request, "below", None, MAX_BLOCK)
    view = served.llm.cache
    rows = await asyncio.to_thread(view.tree, max_level=max_level, max_rows=max_rows + 1, below=below)
    if below is not None and not rows:
        raise ApiError(
            404, f"block {below:,} is not in the tree (hint: it was evicted, or is not full)", code="not_found"
        )
    told = [_row(row, is_own=state.may_read(request, row.salt)) for row in rows[:max_rows]]
    return json_response(
        {
            "object": "list",
            "model": served.id,
            "data": told,
            "has_more": len(rows) > max_rows,
            "max_level": max_level,
            "has_deeper": any(row.level == max_level and row.num_children for row in rows),
            "above": None if below is None else await asyncio.to_thread(view.last_block_above, below),
        }
    )


async def clear(request: Request) -> Response:
    """Forget what nobody holds: for the operator alone, since it is everybody's."""
    state = ServerState.of(request)
    if not state.is_operator_alone:
        raise ApiError(
            403,
            "the cache is that of several keys, and none of them may clear it (hint: restart the server, or let it"
            " evict what nobody uses)",
            code="not_the_operator",
        )
    name = request.query_params.get("model")
    models = list(state.models) if name is None else [state.models.get(name)]
    cleared = {}
    for served in models:
        before = served.llm.cache.num_reusable
        await asyncio.to_thread(served.llm.cache.clear)
        cleared[served.id] = max(0, before - served.llm.cache.num_reusable)
    return json_response({"object": "cache", "cleared_blocks": cleared})


def _store_told(tier: StoreTier | None) -> dict[str, Any] | None:
    """What is stored, and what was read and written; None where nothing is."""
    if tier is None:
        return None
    stats = tier.store.stats
    return {
        "blocks": stats.num_kept,
        "bytes": stats.kept_bytes,
        "hit_tokens": tier.stats.num_stored_tokens,
        "num_loads": tier.stats.num_loads,
        "num_declined_loads": tier.stats.num_declined,
        "read_bytes": stats.read_bytes,
        "written_bytes": stats.written_bytes,
        "num_evicted_blocks": stats.num_evicted,
        "num_errors": stats.num_errors,
        "misses": {fault.name.lower(): count for fault, count in stats.faults.items()},
    }


def _told(state: ServerState, tenant: str | None, served: ServedModel, sessions: Sequence[Session]) -> dict[str, Any]:
    view, engine = served.llm.cache, served.llm.engine
    stats, now, now_s = view.stats, time.time(), state.clock()
    with engine.lock:
        num_pinned = engine.cache.num_pinned
        blocks = {
            "total": view.num_blocks,
            "held": view.num_held,
            "reusable": view.num_reusable,
            "free": view.num_free,
            "pinned": num_pinned,
            "pinned_limit": state.kept.pins.limit(served),
        }
    own = [pin for pin in state.kept.pins if pin.served is served and pin.tenant == tenant]
    return {
        "id": served.id,
        "block_size": engine.kv_spec.block_size,
        "kv_dtype": engine.kv_spec.dtype,
        "blocks": blocks,
        "bytes": {"reserved": view.num_bytes, "committed": view.committed_bytes, "token": engine.kv_spec.token_bytes},
        "prompt_tokens": {
            "queried": stats.num_queried_tokens,
            "cached": stats.num_cached_tokens,
            "hit_rate": round(stats.hit_rate, 6),
        },
        "num_queries": stats.num_queries,
        "num_evicted_blocks": stats.num_evicted_blocks,
        "store": _store_told(engine.tier),
        "num_copied_blocks": stats.num_copied_blocks,
        "pins": [
            {"kind": pin.kind, "tokens": pin.num_tokens, "expires_at": int(now + pin.expires_s - now_s)} for pin in own
        ],
        "sessions": [session.id for session in sessions if session.served is served],
    }


def _row(row: TreeRow, *, is_own: bool) -> dict[str, Any]:
    told: dict[str, Any] = {
        "level": row.level,
        "first_token": row.first_token,
        "num_tokens": row.num_tokens,
        "num_blocks": len(row.block_ids),
        "last_block": row.block_ids[-1],
        "num_holders": row.num_holders,
        "num_children": row.num_children,
        "is_own": is_own,
    }
    if is_own:
        told |= {"text": row.text[:MAX_TEXT], "is_cut": len(row.text) > MAX_TEXT}
    return told


@overload
def _number(request: Request, name: str, default: int, most: int) -> int: ...
@overload
def _number(request: Request, name: str, default: None, most: int) -> int | None: ...
def _number(request: Request, name: str, default: int | None, most: int) -> int | None:
    text = request.query_params.get(name)
    if text is None:
        return default
    if not text.isascii() or not text.isdecimal() or len(text) > 9 or int(text) > most:
        raise bad_request(f"{name} is {text[:40]!r}, give a number from 0 to {most:,}", name)
    return int(text)
