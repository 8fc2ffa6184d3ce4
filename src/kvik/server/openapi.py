"""`/openapi.json`: the API in the words of OpenAPI 3.1, made of the table of routes and the structs of their bodies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from kvik import __version__
from kvik.server.answers import AnthropicError, Error, Health
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
    409: "The session is in use, or nothing of it is in the cache",
    413: "The body is too large",
    415: "The body is not JSON by its content type",
    429: "The queue is full; `Retry-After` says when to ask again",
    500: "The server or the model's template failed",
    503: "The models are being loaded, the server is about to stop, or the engine is dead or hangs",
}
OF_BODIES = (400, 404, 413, 415, 429, 500)


async def openapi(request: Request) -> Response:
    """The API in the words of OpenAPI 3.1."""
    state = ServerState.of(request)
    return json_response(describe(request.app.routes, state.models.names, has_keys=bool(state.config.api_keys)))


def describe(routes: Iterable[BaseRoute], model_names: Sequence[str], *, has_keys: bool = False) -> Json:
    """The whole document; `model_names` are what fields named `model` may be, where there are some."""
    endpoints = [route for route in routes if isinstance(route, Endpoint)]
    bodies = [endpoint.body for endpoint in endpoints if endpoint.body is not None]
    answers = [each for endpoint in endpoints for each in (endpoint.answer, endpoint.event) if isinstance(each, type)]
    kinds = list(dict.fromkeys([*bodies, *answers, Error, AnthropicError]))
    found, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    schemas = dict(zip(kinds, found, strict=True))
    for body in bodies:
        _name_models(components[body.__name__], model_names)
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
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(
    endpoint: Endpoint, method: str, schemas: Mapping[type, Json], model_names: Sequence[str], *, has_keys: bool
) -> Json:
    path = plain_path(endpoint.path)
    error = {"application/json": {"schema": schemas[AnthropicError if is_anthropic_path(path) else Error]}}
    answer = _answer(endpoint, schemas, error["application/json"]["schema"])
    statuses = [*endpoint.statuses, 403, *(() if path in OPEN_PATHS else (401,))]
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
            "content": answer if endpoint.answer is Health and status == 503 else error,
        }
        for status in sorted(set(statuses))
    }
    operation["responses"] = {"200": {"description": "It went well", "content": answer}} | errors
    operation["security"] = [] if path in OPEN_PATHS or not has_keys else [{"key": []}]
    return operation


def _answer(endpoint: Endpoint, schemas: Mapping[type, Json], error: Json) -> Json:
    """What a 200 holds, by content type."""
    if isinstance(endpoint.answer, str):
        is_stream = endpoint.answer == "text/event-stream"
        return {endpoint.answer: {"schema": _each_event({}) if is_stream else {"type": "string"}}}
    content = {"application/json": {"schema": schemas[endpoint.answer]}}
    if endpoint.event is not None:
        data = {"anyOf": [schemas[endpoint.event], error]}
        content["text/event-stream"] = {"schema": _each_event(data)}
    return content


def _each_event(data: Json) -> Json:
    """An event of a stream, whose data is JSON of this schema, or the word that ends OpenAI's streams."""
    return {
        "type": "object",
        "required": ["data"],
        "properties": {
            "event": {"type": "string"},
            "data": {"type": "string", "contentMediaType": "application/json", "contentSchema": data},
        },
    }


def _parameter(name: str, model_names: Sequence[str]) -> Json:
    return {"type": "string"} | ({"examples": list(model_names)} if name == "name" and model_names else {})


def _name_models(schema: Json, model_names: Sequence[str]) -> None:
    model = schema.get("properties", {}).get("model")
    if model is None or not model_names:
        return
    for kind in model.get("anyOf", [model]):
        if kind.get("type") == "string":
            kind["enum"] = list(model_names)
