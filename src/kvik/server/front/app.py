"""The front's application: it chooses replicas for requests, and tells how they are."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from kvik.cache.digest import chain
from kvik.client.http import Address, Connection
from kvik.cluster import Replica, RoutedRequest, Router, Ticket
from kvik.server.errors import RETRY_AFTER_S, ApiError, client_left
from kvik.server.front.job import Job, head, no_replica
from kvik.server.front.processes import Process, told
from kvik.server.settings import ServerConfig
from kvik.server.sse import left
from kvik.server.state import ServerState

ROUTED = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/messages",
        "/v1/responses",
        "/v1/embeddings",
        "/v1/messages/count_tokens",
        "/v1/chat/completions/input_tokens",
        "/v1/responses/input_tokens",
        "/tokenize",
        "/detokenize",
    }
)
"""That need nothing but their body: any replica can answer them."""

SHARED = frozenset({"/v1/models", "/version", "/tokenizer_info", "/openapi.json", "/docs"})
"""That all replicas answer alike."""

PIECE_BYTES, PIECE_TOKENS = 512, 128
"""Of a prompt's text, by which replicas are guessed to hold it."""

_PROMPT_FIELDS = ("model", "tools", "system", "instructions", "messages", "prompt", "input")


class FrontState(ServerState):
    """What the gate asks of a server, for one whose models are elsewhere."""

    def __init__(self, config: ServerConfig, router: Router, processes: Sequence[Process]) -> None:
        super().__init__(config)
        self.router = router
        self.processes = processes

    def check_loaded(self) -> None:
        """Raise `ApiError` 503 where no replica takes requests."""
        if not any(replica.is_open for replica in self.router.replicas):
            raise no_replica()


class Front:
    """The ASGI application behind the gate."""

    def __init__(self, state: FrontState) -> None:
        self._state = state
        self._router = state.router
        self._secret = os.urandom(16)
        self._idle: dict[Address, list[Connection]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        path, method = scope["path"], scope["method"]
        if path in ("/health", "/ready"):
            await self._tell_health(send)
            return
        is_shared = method in ("GET", "HEAD") and (path in SHARED or path.startswith("/v1/models/"))
        if not is_shared and (method != "POST" or path not in ROUTED):
            raise ApiError(
                404,
                f"{path[:100]} is not served by several replicas: it is about one of them (hint: /health has their"
                " addresses)",
                code="not_found",
            )
        body = b"" if is_shared else await _body(receive)
        fields = _fields(body)
        request = self.routed(Headers(scope=scope), fields)
        job = Job(self, scope, send, request, body, is_stream=fields.get("stream") is True)
        working, leaving = asyncio.ensure_future(job.run()), asyncio.ensure_future(left(receive))
        try:
            await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                await working
            elif not job.has_head:
                raise client_left()
        finally:
            leaving.cancel()
            working.cancel()
            await asyncio.wait((working, leaving))

    def choose(self, request: RoutedRequest, tried: Sequence[Replica]) -> tuple[Ticket, Address]:
        """The replica for a request, which is counted there. Raises `ApiError` 503."""
        replica = self._router.choose(request, tried)
        address = next((each.address for each in self._state.processes if each.replica is replica), None)
        if replica is None or address is None:
            raise no_replica()
        return self._router.send(request, replica, time.monotonic()), address

    def connection_to(self, address: Address) -> Connection:
        """One that nobody uses."""
        free = self._idle.get(address)
        return free.pop() if free else Connection(address, timeout_s=None)  # one that hangs is ended

    def give_back(self, connection: Connection) -> None:
        """Keep it for the next request, as long as its replica is there."""
        self._idle.setdefault(connection.address, []).append(connection)
        present = {each.address for each in self._state.processes}
        for address in self._idle.keys() - present:
            for each in self._idle.pop(address):
                each.close()

    def routed(self, headers: Headers, fields: dict[str, Any]) -> RoutedRequest:
        """What routing looks at. Raises `ApiError` for what only one replica could answer."""
        if fields.get("session_id") is not None:
            raise ApiError(
                400,
                "sessions are of one replica (hint: send the messages themselves, or call a replica of /health)",
                code="invalid_value",
                param="session_id",
            )
        keys = () if self._state.config.shared_cache else ("authorization", "x-api-key")
        whose = repr([*map(headers.get, keys), fields.get("cache_salt")])
        root = blake2b(whose.encode(), key=self._secret, digest_size=16).digest()
        text = msgspec.json.encode([fields.get(name) for name in _PROMPT_FIELDS])
        named = fields.get("prompt_cache_key") or headers.get("x-session-id")
        key = None if named is None else blake2b(repr(named).encode(), key=root, digest_size=16).digest()
        num_tokens = len(text) * PIECE_TOKENS // PIECE_BYTES
        return RoutedRequest(chain(root, text, PIECE_BYTES), num_tokens, PIECE_TOKENS, key)

    async def _tell_health(self, send: Send) -> None:
        replicas = [told(process) for process in self._state.processes]
        is_ok = any(each["status"] == "ok" for each in replicas) and not self._state.is_draining
        status = "draining" if self._state.is_draining else "ok" if is_ok else "loading"
        body = msgspec.json.encode({"status": status, "replicas": replicas})
        headers = {"content-type": "application/json", "cache-control": "no-store"}
        if not is_ok:
            headers["retry-after"] = str(RETRY_AFTER_S)
        await send(head(200 if is_ok else 503, headers))
        await send({"type": "http.response.body", "body": body})


def _fields(body: bytes) -> dict[str, Any]:
    """Of a request; what is no JSON, or of other types, is for a replica to refuse."""
    try:
        fields = msgspec.json.decode(body) if body else {}
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return {}
    return fields if isinstance(fields, dict) else {}


async def _body(receive: Receive) -> bytes:
    parts = []
    while (message := await receive())["type"] == "http.request":
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)
    raise client_left()
