"""`/v1/plan`: what a model, served or of the catalogue, would need, and whether that fits here."""

from __future__ import annotations

import asyncio
from functools import lru_cache
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from kvik.planner.advice import advice
from kvik.planner.catalogue import find_model, model_entries
from kvik.planner.memory import kv_memory
from kvik.planner.plan import Plan, plan_shape
from kvik.planner.shape import ModelShape
from kvik.planner.sources import find_shape
from kvik.server.bodies import json_response
from kvik.server.errors import ApiError, api_error, bad_request
from kvik.server.served import ServedModel
from kvik.server.state import ServerState


async def plan_models(request: Request) -> Response:
    """Models that can be planned with: those that are served, and the catalogue's."""
    models = ServerState.of(request).models
    own = [{"id": served.id, "is_served": True} for served in models]
    others = [{"id": name, "is_served": False} for name in model_entries() if name not in models.names]
    return json_response({"object": "list", "data": [*own, *others]})


async def plan(request: Request) -> Response:
    """What a model needs for so many users of so long a context, and what fits in the memory of this server's model."""
    state, query = ServerState.of(request), request.query_params
    served = state.models.get(query.get("served"))
    name = query.get("model", served.id)
    context, users = _number(query.get("context"), "context"), _number(query.get("users"), "users")
    kv = query.get("kv", "f16")
    try:
        told = await asyncio.to_thread(_told, state, served, name, context, 1 if users is None else users, kv)
    except Exception as error:
        raise api_error(error, frozenset({"model", "context", "users", "kv"})) from error
    return json_response(told)


def _told(
    state: ServerState, served: ServedModel, name: str, context: int | None, users: int, kv: str
) -> dict[str, Any]:
    memory_bytes = _held_bytes(served)
    found = plan_shape(_shape(state, name), context=context, users=users, kv=kv, memory=memory_bytes)
    fit = found.fit
    assert fit is not None, "a memory was named"
    return {
        "object": "plan",
        "model": name,
        "served": served.id,
        "attention": found.model.attention,
        "max_context": found.model.max_context,
        "kv_dtypes": list(found.model.kv_dtypes),
        "context": found.context,
        "users": found.users,
        "kv_dtype": found.kv.dtype,
        "bytes": {
            "token": found.kv.token_bytes,
            "sequence": found.kv.sequence_bytes,
            "kv": found.kv.num_bytes,
            "weights": None if found.weights is None else found.weights.held_bytes,
            "others": found.activation_bytes + found.table_bytes,
            "needed": found.needed_bytes,
            "memory": memory_bytes,
        },
        "fits": fit.fits is True,  # a served model's weights are known
        "most_users": fit.most_users,
        "largest_context": fit.largest_context,
        "doubled": _doubled(found),
        "advice": advice(found),
    }


def _doubled(found: Plan) -> dict[str, int] | None:
    """Twice the context, where the model allows it."""
    context = 2 * found.context
    if context > found.model.max_context:
        return None
    kv = kv_memory(found.model, found.kv.dtype, context, users=found.users)
    return {"context": context, "more_bytes": kv.num_bytes - found.kv.num_bytes}


def _held_bytes(served: ServedModel) -> int:
    """What serving this model takes now: its weights, its whole pool, and a plan's estimate of the rest."""
    llm = served.llm
    shape = _served_shape(str(llm.model.path))
    rest = plan_shape(shape, context=llm.model.context, users=llm.config.max_running)
    return llm.model.decoder.weights.num_bytes + llm.cache.num_bytes + rest.activation_bytes + rest.table_bytes


def _shape(state: ServerState, name: str) -> ModelShape:
    """That of a served model or of the catalogue; a client's name is never a path."""
    for served in state.models:
        if name == served.id:
            return _served_shape(str(served.llm.model.path))
    found = find_model(name)
    if found is None:
        raise ApiError(
            404,
            f"the catalogue has no {name[:100]!r} (hint: /v1/plan/models lists all)",
            code="model_not_found",
            param="model",
        )
    return found


@lru_cache(maxsize=64)
def _served_shape(path: str) -> ModelShape:
    return find_shape(path)


def _number(text: str | None, name: str) -> int | None:
    if text is None:
        return None
    if not text.isascii() or not text.isdecimal() or len(text) > 9:
        raise bad_request(f"{name} is {text[:40]!r}, give a whole number", name)
    return int(text)
