"""What the routes of one server share."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import cast

from starlette.requests import Request

from kvik.server.errors import ApiError
from kvik.server.served import Models
from kvik.server.settings import ServerConfig


@dataclass(slots=True)
class HttpCounts:
    """What came in over HTTP, and what became of it."""

    num_open: int = 0  # requests that are not answered yet
    num_disconnects: int = 0  # of clients that left before the end of their answer
    num_retries: int = 0  # requests of clients that say they asked before
    responses: Counter[tuple[str, str, int]] = field(default_factory=Counter)  # by method, template of the path, status


@dataclass(slots=True)
class ServerState:
    """Made once for each server."""

    config: ServerConfig
    models: Models
    is_draining: bool = False
    http: HttpCounts = field(default_factory=HttpCounts)
    started_s: float = field(default_factory=time.monotonic)
    secret: str = field(default_factory=lambda: secrets.token_hex(16))

    @classmethod
    def of(cls, request: Request) -> ServerState:
        """That of the server which a request came to."""
        return cast(ServerState, request.app.state.server)

    def check_open(self) -> None:
        """Raise `ApiError` 503 where no new work is taken."""
        if self.is_draining:
            raise ApiError(503, "the server is about to stop (hint: try another, or again later)", code="shutting_down")

    def salt(self, request: Request, given: str | None) -> str | None:
        """What isolates a request's blocks: the key it came with, unless all share, and the salt that it names."""
        tenant = None if self.config.shared_cache else request.scope["state"]["tenant"]
        if tenant is None and given is None:
            return None
        return hashlib.blake2b(repr((self.secret, tenant, given)).encode(), digest_size=16).hexdigest()
