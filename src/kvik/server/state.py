"""What the routes of one server share."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock
from typing import cast

from starlette.requests import Request

from kvik.server.cache.kept import Kept
from kvik.server.errors import ApiError
from kvik.server.live.hub import Live
from kvik.server.served import Models
from kvik.server.settings import ServerConfig
from kvik.server.watch.kv_events import KVEventFeed

MAX_SALTS = 1 << 14
"""Salts whose tenants are remembered."""


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
    models: Models = field(default_factory=Models)  # none until they are loaded
    is_draining: bool = False
    http: HttpCounts = field(default_factory=HttpCounts)
    started_s: float = field(default_factory=time.monotonic)
    secret: str = field(default_factory=lambda: secrets.token_hex(16))
    clock: Callable[[], float] = time.monotonic  # by which what is kept for a time has had it
    events: KVEventFeed | None = None  # what routers hear of blocks
    kept: Kept = field(init=False)
    live: Live = field(init=False)
    _salts_lock: Lock = field(default_factory=Lock)
    _tenant_of: OrderedDict[str, str | None] = field(default_factory=OrderedDict)  # of salts

    def __post_init__(self) -> None:
        self.kept = Kept(self.config, self.clock)
        self.live = Live(lambda: self.models, self.owns, self.clock)

    @classmethod
    def of(cls, request: Request) -> ServerState:
        """That of the server which a request came to."""
        return cast(ServerState, request.app.state.server)

    @property
    def is_loading(self) -> bool:
        """Whether the models are not there yet: a server has at least one."""
        return len(self.models) == 0

    def check_loaded(self) -> None:
        """Raise `ApiError` 503 where the models are not there yet."""
        if self.is_loading:
            raise ApiError(503, "the models are being loaded (hint: /ready tells when)", code="model_loading")

    def check_open(self) -> None:
        """Raise `ApiError` 503 where no new work is taken."""
        if self.is_draining:
            raise ApiError(503, "the server is about to stop (hint: try another, or again later)", code="shutting_down")

    def salt(self, request: Request, given: str | None) -> str | None:
        """What isolates a request's blocks: the key it came with, unless all share, and the salt that it names."""
        tenant = None if self.config.shared_cache else request.scope["state"]["tenant"]
        if tenant is None and given is None:
            return None
        salt = hashlib.blake2b(repr((self.secret, tenant, given)).encode(), digest_size=16).hexdigest()
        if not self.config.shared_cache:
            with self._salts_lock:
                self._tenant_of[salt] = tenant
                self._tenant_of.move_to_end(salt)
                if len(self._tenant_of) > MAX_SALTS:
                    self._tenant_of.popitem(last=False)
        return salt

    @property
    def is_operator_alone(self) -> bool:
        """Whether all requests are the operator's: there is one key, or none and nobody but this machine."""
        return len(self.config.api_keys) == 1 or (not self.config.api_keys and self.config.is_local)

    def may_read(self, request: Request, salt: str | None) -> bool:
        """Whether the caller may see the text of what is cached under a salt: it is his own, and not hidden."""
        return not self.config.redact and self.owns(tenant_of(request), salt)

    def owns(self, tenant: str | None, salt: str | None) -> bool:
        """Whether what is cached under a salt is the tenant's own."""
        if self.is_operator_alone:
            return True
        return salt is not None and self._tenant_of.get(salt, "") == tenant is not None


def tenant_of(request: Request) -> str | None:
    """The name of the key that a request came with."""
    return cast("str | None", request.scope["state"]["tenant"])
