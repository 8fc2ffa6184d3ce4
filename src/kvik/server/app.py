"""The ASGI application: which path goes where, behind the gate that all of them share."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kvik.server import other_routes
from kvik.server.answers import (
    Detokenized,
    EmbeddingList,
    Health,
    ModelCard,
    ModelList,
    TokenCount,
    Tokenized,
    TokenizerInfo,
    Version,
)
from kvik.server.anthropic.answers import MessageAnswer, MessageEvent, MessageTokenCount
from kvik.server.anthropic.messages import count_message_tokens, messages
from kvik.server.anthropic.messages_input import CountRequest, MessagesRequest
from kvik.server.cache import cache_routes, match_route, saved_routes, session_routes
from kvik.server.cache.answers import (
    CacheCleared,
    CacheState,
    CacheTree,
    SavedSessionAnswer,
    SavedSessionDeleted,
    SavedSessionList,
    SessionAnswer,
    SessionDeleted,
    SessionList,
    SessionWithMessages,
)
from kvik.server.docs import docs
from kvik.server.endpoint import Endpoint, plain_path
from kvik.server.errors import ApiError, is_anthropic_path, own_error
from kvik.server.gate import Gate
from kvik.server.live import explain_route, live_routes, plan_route, race_route
from kvik.server.live.answers import (
    BlockAnswer,
    ExplainedLink,
    ExplainedPage,
    MatchAnswer,
    PlanAnswer,
    PlannableModels,
    RequestAborted,
    RequestPrompt,
)
from kvik.server.openai.answers import (
    ChatAnswer,
    ChatChunk,
    CompletionAnswer,
    CompletionChunk,
    ResponseAnswer,
    ResponseEvent,
)
from kvik.server.openai.chat import chat
from kvik.server.openai.chat_input import ChatRequest
from kvik.server.openai.completions import CompletionRequest, completions
from kvik.server.openai.responses import count_response_tokens, responses
from kvik.server.openai.responses_input import ResponsesRequest
from kvik.server.openapi import openapi
from kvik.server.state import ServerState
from kvik.server.watch.health import decode_health, health, ready
from kvik.server.watch.metrics import metrics

ROUTES: tuple[Route, ...] = (
    Endpoint(
        "/v1/chat/completions",
        chat,
        methods=["POST"],
        body=ChatRequest,
        answer=ChatAnswer,
        event=ChatChunk,
        statuses=[409],
    ),
    Endpoint(
        "/v1/chat/completions/input_tokens",
        other_routes.count_chat_tokens,
        methods=["POST"],
        body=ChatRequest,
        answer=TokenCount,
        statuses=[409],
    ),
    Endpoint(
        "/v1/completions",
        completions,
        methods=["POST"],
        body=CompletionRequest,
        answer=CompletionAnswer,
        event=CompletionChunk,
    ),
    Endpoint(
        "/v1/responses", responses, methods=["POST"], body=ResponsesRequest, answer=ResponseAnswer, event=ResponseEvent
    ),
    Endpoint(
        "/v1/responses/input_tokens", count_response_tokens, methods=["POST"], body=ResponsesRequest, answer=TokenCount
    ),
    Endpoint(
        "/v1/messages", messages, methods=["POST"], body=MessagesRequest, answer=MessageAnswer, event=MessageEvent
    ),
    Endpoint(
        "/v1/messages/count_tokens", count_message_tokens, methods=["POST"], body=CountRequest, answer=MessageTokenCount
    ),
    Endpoint(
        "/v1/sessions",
        session_routes.create,
        methods=["POST"],
        body=session_routes.NewSession,
        answer=SessionAnswer,
        statuses=[409],
    ),
    Endpoint("/v1/sessions", session_routes.list_all, methods=["GET"], answer=SessionList),
    Endpoint("/v1/sessions/{id}", session_routes.retrieve, methods=["GET"], answer=SessionWithMessages),
    Endpoint("/v1/sessions/{id}", session_routes.delete, methods=["DELETE"], answer=SessionDeleted),
    Endpoint(
        "/v1/sessions/{id}/fork",
        session_routes.fork,
        methods=["POST"],
        body=session_routes.Lifetime,
        answer=SessionAnswer,
        statuses=[409],
    ),
    Endpoint(
        "/v1/sessions/{id}/rewind",
        session_routes.rewind,
        methods=["POST"],
        body=session_routes.Rewind,
        answer=SessionAnswer,
        statuses=[409],
    ),
    Endpoint(
        "/v1/sessions/{id}/pin",
        session_routes.pin,
        methods=["POST"],
        body=session_routes.Lifetime,
        answer=SessionAnswer,
        statuses=[409],
    ),
    Endpoint("/v1/sessions/{id}/unpin", session_routes.unpin, methods=["POST"], answer=SessionAnswer),
    Endpoint(
        "/v1/sessions/{id}/save",
        saved_routes.save,
        methods=["POST"],
        body=saved_routes.SaveSession,
        answer=SavedSessionAnswer,
        statuses=[409],
    ),
    Endpoint("/v1/saved_sessions", saved_routes.list_saved, methods=["GET"], answer=SavedSessionList, statuses=[409]),
    Endpoint(
        "/v1/saved_sessions/{name}",
        saved_routes.forget,
        methods=["DELETE"],
        answer=SavedSessionDeleted,
        statuses=[400, 404, 409],
    ),
    Endpoint("/v1/cache", cache_routes.show, methods=["GET"], answer=CacheState),
    Endpoint("/v1/cache", cache_routes.clear, methods=["DELETE"], answer=CacheCleared),
    Endpoint("/v1/cache/tree", cache_routes.tree, methods=["GET"], answer=CacheTree, statuses=[400, 404]),
    Endpoint("/v1/cache/match", match_route.match, methods=["POST"], body=match_route.MatchRequest, answer=MatchAnswer),
    Endpoint("/v1/cache/blocks/{id}", live_routes.one_block, methods=["GET"], answer=BlockAnswer),
    Endpoint("/v1/race", race_route.race, methods=["POST"], body=race_route.RaceRequest, answer="text/event-stream"),
    Endpoint(
        "/v1/explain", explain_route.explain, methods=["POST"], body=explain_route.ExplainRequest, answer=ExplainedPage
    ),
    Endpoint("/v1/explain/{id}", explain_route.explained, methods=["GET"], answer="text/html"),
    Endpoint("/v1/explain/{id}/link", explain_route.link, methods=["POST"], answer=ExplainedLink),
    Endpoint("/explained/{secret}", explain_route.opened, methods=["GET"], answer="text/html"),
    Endpoint("/v1/plan", plan_route.plan, methods=["GET"], answer=PlanAnswer),
    Endpoint("/v1/plan/models", plan_route.plan_models, methods=["GET"], answer=PlannableModels),
    Endpoint("/v1/events", live_routes.events, methods=["GET"], answer="text/event-stream"),
    Endpoint("/v1/requests/{id:path}", live_routes.prompt, methods=["GET"], answer=RequestPrompt),
    Endpoint("/v1/requests/{id:path}", live_routes.abort, methods=["DELETE"], answer=RequestAborted),
    Endpoint(
        "/v1/embeddings",
        other_routes.embeddings,
        methods=["POST"],
        body=other_routes.EmbeddingRequest,
        answer=EmbeddingList,
    ),
    Endpoint("/v1/models", other_routes.list_models, methods=["GET"], answer=ModelList),
    Endpoint("/v1/models/{name:path}", other_routes.one_model, methods=["GET"], answer=ModelCard),
    Endpoint("/tokenize", other_routes.tokenize, methods=["POST"], body=other_routes.TokenizeRequest, answer=Tokenized),
    Endpoint(
        "/detokenize",
        other_routes.detokenize,
        methods=["POST"],
        body=other_routes.DetokenizeRequest,
        answer=Detokenized,
    ),
    Endpoint("/tokenizer_info", other_routes.tokenizer_info, methods=["GET"], answer=TokenizerInfo, statuses=[404]),
    Endpoint("/version", other_routes.version, methods=["GET"], answer=Version),
    Endpoint("/health", health, methods=["GET"], statuses=[503], answer=Health),
    Endpoint("/health/decode", decode_health, methods=["GET"], statuses=[503], answer=Health),
    Endpoint("/ready", ready, methods=["GET"], statuses=[503], answer=Health),
    Endpoint("/metrics", metrics, methods=["GET"], answer="text/plain"),
    Endpoint("/", live_routes.page, methods=["GET"], answer="text/html"),
    Endpoint("/page/{name}", live_routes.page_file, methods=["GET"], answer="text/javascript"),
    Endpoint("/openapi.json", openapi, methods=["GET"], answer=dict),
    Endpoint("/docs", docs, methods=["GET"], answer="text/html"),
)
"""What is served. An `Endpoint` says what it takes and gives, and stands in `/openapi.json` and `/docs` by itself."""


def make_app(state: ServerState) -> Gate:
    """The whole application."""
    handlers = {HTTPException: _not_found, ApiError: _api_error, Exception: _own_error}
    app = Starlette(routes=list(ROUTES), exception_handlers=handlers)
    app.router.redirect_slashes = False
    app.state.server = state
    return Gate(app, state, {route.endpoint: plain_path(route.path) for route in ROUTES})


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    body = error.body(is_anthropic=is_anthropic_path(request.scope["path"]))
    return Response(body, error.status, error.headers, media_type="application/json")


async def _own_error(request: Request, error: Exception) -> Response:
    """The gate logs it."""
    return await _api_error(request, own_error())


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
