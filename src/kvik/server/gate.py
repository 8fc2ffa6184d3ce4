"""What every request passes before it reaches its route: identity, host, origin, key, size; and its line in the log."""

from __future__ import annotations

import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvik.server.errors import ApiError, is_anthropic_path, own_error
from kvik.server.live.page_files import PAGE_FILES
from kvik.server.settings import is_loopback, parsed_address
from kvik.server.state import ServerState

access = logging.getLogger("kvik.access")
log = logging.getLogger(__name__)

PAGE_PATHS = frozenset({"/", *(f"/page/{name}" for name in PAGE_FILES)})

OPEN_PATHS = PAGE_PATHS | {"/health", "/health/decode", "/ready", "/docs"}
"""Served without a key, and compared exactly: a load balancer has none, nor has a browser that is shown a link."""

LINKED_PATHS = "/explained/"
"""What follows is a secret that opens one page once: a browser that opens it sends no key."""

PATHS_WITHOUT_MODELS = PAGE_PATHS | {"/health", "/health/decode", "/ready", "/version"}
"""Served also while the models are being loaded: the page waits for them."""

LOCALHOST = "localhost"
"""Among the origins: any page of this machine, whatever its port."""

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

MAX_REQUEST_ID = 128
_REQUEST_ID = re.compile(r"[\w.:@/+=-]{1,128}", re.ASCII)
_EXPOSED = "x-request-id, server-timing, x-kvik-ignored, retry-after"


class Gate:
    """The outermost ASGI application.

    Puts `request_id`, `tenant` (the name of the key, or None) and `received_s` into the scope's state.
    """

    def __init__(self, app: ASGIApp, state: ServerState, templates: Mapping[Callable[..., Any], str]) -> None:
        self.app = app
        self.state = state
        self.config = state.config
        self._templates = templates  # the path of each endpoint's route
        self._keys = [(key.encode(), name) for key, name in state.config.api_keys.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send)
        self.state.http.num_open += 1
        try:
            if not await self._is_answered(exchange):
                body = _LimitedBody(exchange.receive, exchange.headers, self.config.max_body_bytes)
                await self.app(scope, body.receive, exchange.send)
        except ApiError as error:
            await exchange.send_error(error)
        except Exception:
            log.exception("%s: a request failed in a way of its own", exchange.request_id)
            await exchange.send_error(own_error())
        finally:
            self.state.http.num_open -= 1
            self._count(exchange)
            if self.config.access_log:
                exchange.write_log()

    def _count(self, exchange: _Exchange) -> None:
        """Labels have few values: whatever a client makes up counts as one."""
        http, method = self.state.http, exchange.scope["method"]
        route = self._templates.get(exchange.scope.get("endpoint", _nowhere), "(none)")
        http.responses[method if method in METHODS else "(other)", route, exchange.status] += 1
        http.num_disconnects += exchange.client_left
        http.num_retries += exchange.headers.get("x-stainless-retry-count", "0") != "0"

    async def _is_answered(self, exchange: _Exchange) -> bool:
        """Check the request; an OPTIONS is answered here."""
        headers, method = exchange.headers, exchange.scope["method"]
        self._check_host(headers)
        origin = headers.get("origin")
        if origin is not None:
            self._check_origin(origin, headers)
            exchange.origin = origin if self._is_cors_origin(origin) else None
        is_preflight = method == "OPTIONS" and origin is not None and "access-control-request-method" in headers
        if is_preflight:
            await exchange.send_empty(
                204,
                {
                    "access-control-allow-methods": "GET, HEAD, POST, DELETE",
                    "access-control-allow-headers": headers.get("access-control-request-headers", "authorization"),
                    "access-control-max-age": "600",
                },
            )
            return True
        if exchange.path not in OPEN_PATHS and not exchange.path.startswith(LINKED_PATHS):
            exchange.scope["state"]["tenant"] = self._tenant(headers)
        if method == "OPTIONS":
            await exchange.send_empty(204, {"allow": "GET, HEAD, POST, DELETE, OPTIONS"})
            return True
        if method not in ("GET", "HEAD"):
            self.state.check_open()
        if exchange.path not in PATHS_WITHOUT_MODELS:
            self.state.check_loaded()
        return False

    def _check_host(self, headers: Headers) -> None:
        """A page of a stranger's can point its own name at this machine, but not an address."""
        host = _host_name(headers.get("host", ""))
        names = {"localhost", self.config.host.lower(), *(name.lower() for name in self.config.allowed_hosts)}
        if parsed_address(host) is None and host.lower() not in names:
            raise ApiError(
                403,
                f"the Host header {host[:100]!r} is not a name of this server (hint: call it by its address, or start"
                " it with --allowed-host)",
                code="host_not_allowed",
            )

    def _check_origin(self, origin: str, headers: Headers) -> None:
        parts = _split(origin)
        if self._is_cors_origin(origin) or (parts is not None and parts.netloc == headers.get("host")):
            return
        raise ApiError(
            403,
            f"pages of {origin[:100]!r} may not call this server (hint: start it with --cors-origin)",
            code="origin_not_allowed",
        )

    def _is_cors_origin(self, origin: str) -> bool:
        if origin == LOCALHOST or origin not in self.config.cors_origins:
            parts = _split(origin) if LOCALHOST in self.config.cors_origins else None
            return parts is not None and parts.hostname is not None and is_loopback(parts.hostname)
        return True

    def _tenant(self, headers: Headers) -> str | None:
        """The name of the key; each one is compared, and in a time that does not depend on where they differ."""
        if not self._keys:
            return None
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = (token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")).encode()
        found = [name for key, name in self._keys if hmac.compare_digest(key, given)]
        if not found:
            raise ApiError(
                401,
                "the API key is missing or wrong (hint: send it as `Authorization: Bearer KEY`)",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return found[0]


class _Exchange:
    """One request and what becomes of it."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.headers = Headers(scope=scope)
        self.path: str = scope["path"]
        self.origin: str | None = None  # of the page that asks, where it may read the answer
        self.status = 0
        self.client_left = False  # before the end of the answer
        self._is_over = False
        self._receive = receive
        self._send = send
        self._started_s = time.perf_counter()
        given = self.headers.get("x-request-id", "")
        self.request_id = given if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        state: dict[str, Any] = scope.setdefault("state", {})
        state |= {"request_id": self.request_id, "tenant": None, "received_s": self._started_s, "write": send}

    async def receive(self) -> Message:
        """Pass a message on, and see whether the client leaves early."""
        message = await self._receive()
        if message["type"] == "http.disconnect" and not self._is_over:
            self.client_left = True
        return message

    async def send(self, message: Message) -> None:
        """Pass an answer on, with the headers that each one has."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.request_id
            headers["x-content-type-options"] = "nosniff"
            if is_anthropic_path(self.path):
                headers["request-id"] = self.request_id
            if self.origin is not None:
                headers["access-control-allow-origin"] = self.origin
                headers["access-control-expose-headers"] = _EXPOSED
                headers.add_vary_header("origin")
        elif not message.get("more_body"):
            self._is_over = True
        await self._send(message)

    async def send_error(self, error: ApiError) -> None:
        """Answer with an error, unless the answer has begun."""
        if self.status:
            return
        body = error.body(is_anthropic=is_anthropic_path(self.path))
        await self._respond(error.status, body, {"content-type": "application/json", **error.headers})

    async def send_empty(self, status: int, headers: dict[str, str]) -> None:
        """Answer without a body."""
        await self._respond(status, b"", headers)

    async def _respond(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        if body:
            headers["content-length"] = str(len(body))
        raw = [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": raw})
        await self.send({"type": "http.response.body", "body": b"" if self.scope["method"] == "HEAD" else body})

    def write_log(self) -> None:
        client = self.scope.get("client")
        access.info(
            "%s %s %d",
            self.scope["method"],
            self.path[:200].encode("unicode_escape").decode(),  # it may hold line ends
            self.status,
            extra={
                "request_id": self.request_id,
                "client": client[0] if client else None,
                "seconds": round(time.perf_counter() - self._started_s, 4),
            },
        )


class _LimitedBody:
    """The body as it comes; too much of it is refused before it is kept."""

    def __init__(self, receive: Receive, headers: Headers, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._num_bytes = 0
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and int(declared[:19]) > limit:
            raise self._error(f"{int(declared[:19]):,} bytes")

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._num_bytes += len(message.get("body", b""))
            if self._num_bytes > self._limit:
                raise self._error(f"more than {self._limit:,} bytes")
        return message

    def _error(self, size: str) -> ApiError:
        # What is left of the body is never read, so that the connection cannot serve another request.
        return ApiError(
            413,
            f"the body has {size}, the server takes {self._limit:,} (hint: send less, or raise --max-body)",
            code="request_too_large",
            headers={"connection": "close"},
        )


def _nowhere() -> None:
    """The endpoint of requests that came to none."""


def _split(origin: str) -> SplitResult | None:
    """The parts of a page's origin; None where it is not one of the web's."""
    try:
        parts = urlsplit(origin)
        return parts if parts.scheme in ("http", "https") and parts.hostname else None
    except ValueError:
        return None


def _host_name(host: str) -> str:
    """Without the port."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() and ":" in host else host
