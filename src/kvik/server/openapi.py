"""`/openapi.json`: the API in the words of OpenAPI 3.1, made of the table of routes and the structs of their bodies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from kvik import __version__
from kvik.server.bodies import json_response
from kvik.server.endpoint import Endpoint, plain_path
from kvik.server.errors import is_anthropic_path
from kvik.server.gate import OPEN_PATHS, PATHS_WITHOUT_MODELS
from kvik.server.state import ServerState

Json = dict[str, Any]

STATUSES = {
    400: "The request is refused; `error.param` names the field",
    401: "The API key is missing or wrong",
    403: "The Host or Origin header is not one of this server's",
    404: "There is no such model or path",
    413: "The body is too large",
    415: "The body is not JSON by its content type",
    429: "The queue is full; `Retry-After` says when to ask again",
    500: "The server or the model's template failed",
    503: "The models are being loaded, the server is about to stop, or the engine is dead or hangs",
}
OF_ALL = (401, 403)
OF_BODIES = (400, 404, 413, 415, 429, 500)

ERROR: Json = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}

ANTHROPIC_ERROR: Json = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"type": "string", "enum": ["error"]},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
    },
}


async def openapi(request: Request) -> Response:
    """The API in the words of OpenAPI 3.1."""
    state = ServerState.of(request)
    return json_response(describe(request.app.routes, state.models.names, has_keys=bool(state.config.api_keys)))


def describe(routes: Iterable[BaseRoute], model_names: Sequence[str], *, has_keys: bool = False) -> Json:
    """The whole document; `model_names` are what fields named `model` may be, where there are some."""
    endpoints = [route for route in routes if isinstance(route, Endpoint)]
    bodies = list(dict.fromkeys(endpoint.body for endpoint in endpoints if endpoint.body is not None))
    found, components = msgspec.json.schema_components(bodies, ref_template="#/components/schemas/{name}")
    for schema in components.values():
        _name_models(schema, model_names)
    schemas = dict(zip(bodies, found, strict=True))
    paths: dict[str, Json] = {}
    for endpoint in endpoints:
        for method in sorted((endpoint.methods or set()) - {"HEAD"}):
            paths.setdefault(plain_path(endpoint.path), {})[method.lower()] = _operation(
                endpoint, method, schemas, model_names, has_keys=has_keys
            )
    return {
        "openapi": "3.1.0",
        "info": {"title": "kvik", "version": __version__, "description": "An LLM inference engine behind HTTP."},
        "paths": paths,
        "components": {
            "schemas": components | {"Error": ERROR, "AnthropicError": ANTHROPIC_ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(
    endpoint: Endpoint, method: str, schemas: dict[type, Json], model_names: Sequence[str], *, has_keys: bool
) -> Json:
    path = plain_path(endpoint.path)
    answer = _media(endpoint.answer)
    if endpoint.streams:
        answer |= _media("text/event-stream")
    statuses = [*endpoint.statuses, *(() if path in OPEN_PATHS else OF_ALL)]
    if path not in PATHS_WITHOUT_MODELS:
        statuses.append(503)
    operation: Json = {
        "operationId": f"{method.lower()}_{endpoint.name}",
        "summary": endpoint.summary,
        "tags": [endpoint.group],
    }
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    if names:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": _parameter(name, model_names)} for name in names
        ]
        statuses.append(404)
    if endpoint.body is not None:
        statuses += OF_BODIES
        content = {"application/json": {"schema": schemas[endpoint.body]}}
        operation["requestBody"] = {"required": True, "content": content}
    # 503 of a health route is no error: it has the shape of its 200.
    errors = {
        str(status): {
            "description": STATUSES[status],
            "content": answer if status in endpoint.statuses else _errors(is_anthropic=is_anthropic_path(path)),
        }
        for status in sorted(set(statuses))
    }
    operation["responses"] = {"200": {"description": "It went well", "content": answer}} | errors
    operation["security"] = [] if path in OPEN_PATHS or not has_keys else [{"key": []}]
    return operation


def _media(kind: str) -> Json:
    return {kind: {"schema": SCHEMAS.get(kind, {"type": "string"})}}


SCHEMAS: dict[str, Json] = {
    "application/json": {"type": "object"},
    # Of each event.
    "text/event-stream": {
        "type": "object",
        "required": ["data"],
        "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    },
}


def _errors(*, is_anthropic: bool) -> Json:
    name = "AnthropicError" if is_anthropic else "Error"
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def _parameter(name: str, model_names: Sequence[str]) -> Json:
    return {"type": "string"} | ({"examples": list(model_names)} if name == "name" and model_names else {})


def _name_models(schema: Json, model_names: Sequence[str]) -> None:
    model = schema.get("properties", {}).get("model")
    if model is None or not model_names:
        return
    for kind in model.get("anyOf", [model]):
        if kind.get("type") == "string":
            kind["enum"] = list(model_names)
