"""The ASGI application: which path goes where, behind the gate that all of them share."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kvik.server import cache_routes, other_routes, session_routes
from kvik.server.chat import chat
from kvik.server.completions import completions
from kvik.server.errors import ApiError
from kvik.server.gate import Gate
from kvik.server.state import ServerState

ROUTES = (
    Route("/v1/chat/completions", chat, methods=["POST"]),
    Route("/v1/chat/completions/input_tokens", other_routes.count_chat_tokens, methods=["POST"]),
    Route("/v1/sessions", session_routes.create, methods=["POST"]),
    Route("/v1/sessions", session_routes.list_all, methods=["GET"]),
    Route("/v1/sessions/{id}", session_routes.retrieve, methods=["GET"]),
    Route("/v1/sessions/{id}", session_routes.delete, methods=["DELETE"]),
    Route("/v1/sessions/{id}/fork", session_routes.fork, methods=["POST"]),
    Route("/v1/sessions/{id}/rewind", session_routes.rewind, methods=["POST"]),
    Route("/v1/sessions/{id}/pin", session_routes.pin, methods=["POST"]),
    Route("/v1/sessions/{id}/unpin", session_routes.unpin, methods=["POST"]),
    Route("/v1/cache", cache_routes.show, methods=["GET"]),
    Route("/v1/cache", cache_routes.clear, methods=["DELETE"]),
    Route("/v1/cache/tree", cache_routes.tree, methods=["GET"]),
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/embeddings", other_routes.embeddings, methods=["POST"]),
    Route("/v1/models", other_routes.list_models, methods=["GET"]),
    Route("/v1/models/{name:path}", other_routes.one_model, methods=["GET"]),
    Route("/tokenize", other_routes.tokenize, methods=["POST"]),
    Route("/detokenize", other_routes.detokenize, methods=["POST"]),
    Route("/tokenizer_info", other_routes.tokenizer_info, methods=["GET"]),
    Route("/version", other_routes.version, methods=["GET"]),
)


def make_app(state: ServerState) -> Gate:
    """The whole application."""
    app = Starlette(routes=list(ROUTES), exception_handlers={HTTPException: _not_found, ApiError: _api_error})
    app.router.redirect_slashes = False
    app.state.server = state
    return Gate(app, state.config, state.note_answer)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    body = error.body(is_anthropic=request.scope["path"].startswith("/v1/messages"))
    return Response(body, error.status, error.headers, media_type="application/json")


async def _not_found(request: Request, error: Exception) -> Response:
    """Unknown routes and methods, in the shape of every other error."""
    assert isinstance(error, HTTPException)
    path = request.scope["path"][:100]
    if error.status_code == 405:
        told = ApiError(405, f"{path} takes no {request.method}", code="method_not_allowed", headers=error.headers)
    elif error.status_code == 404:
        told = ApiError(404, f"there is no {path} (hint: /docs lists all routes)", code="not_found")
    else:
        told = ApiError(error.status_code, str(error.detail), code="bad_request")
    return await _api_error(request, told)
