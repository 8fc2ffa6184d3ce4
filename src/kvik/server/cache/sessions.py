"""Conversations that the server keeps: their messages, and a lease of what was computed of them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from kvik.engine.lease import Lease
from kvik.server.cache.pins import Clock, Pin, Pins
from kvik.server.errors import ApiError
from kvik.server.served import ServedModel

MIN_BYTES = 64 << 10
BYTES_PER_TOKEN = 16
"""Most bytes of a session's messages and tools, for each token of the model's context."""


@dataclass(slots=True, eq=False, kw_only=True)
class Session:
    """One conversation; whoever changes it is on the event loop."""

    id: str
    served: ServedModel
    tenant: str | None
    salt: str | None
    ttl_s: float
    tools: Sequence[Any] | None = None  # as the request that made it had them
    parent: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)  # none is ever changed in place
    lease: Lease | None = None
    pin: Pin | None = None
    num_turns: int = 0
    is_busy: bool = False
    is_closed: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    used_s: float = 0.0

    @property
    def num_cached_tokens(self) -> int:
        """Tokens that its lease holds now."""
        return 0 if self.lease is None else self.lease.num_tokens

    @property
    def held(self) -> Lease | None:
        """What a turn goes on from."""
        if self.pin is not None and not self.num_cached_tokens:
            return self.pin.lease
        return self.lease

    def check_size(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Raise `ApiError` for more than could ever be a prompt."""
        limit = max(MIN_BYTES, BYTES_PER_TOKEN * self.served.llm.model.context)
        num_bytes = len(msgspec.json.encode([*messages, self.tools or []]))
        if num_bytes > limit:
            raise ApiError(
                400,
                f"messages and tools of a session would have {num_bytes:,} bytes, {limit:,} may (hint: rewind it, or"
                " begin another)",
                code="context_length_exceeded",
                param="messages",
            )


class Sessions:
    """All sessions of a server; those of one tenant are nobody else's."""

    def __init__(self, pins: Pins, max_sessions: int, clock: Clock = time.monotonic) -> None:
        self.clock = clock
        self.pins = pins
        self._max_sessions = max_sessions
        self._sessions: dict[str, Session] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def of(self, tenant: str | None) -> Iterator[Session]:
        """Those of a tenant, the oldest first."""
        self.sweep()
        return iter([session for session in self._sessions.values() if session.tenant == tenant])

    def get(self, tenant: str | None, session_id: str) -> Session:
        """The tenant's session of this id. Raises `ApiError` 404."""
        self.sweep()
        session = self._sessions.get(session_id)
        if session is None or session.tenant != tenant:
            raise ApiError(
                404,
                f"there is no session {session_id[:100]!r} (hint: it may have had its time, or the server began anew;"
                " POST /v1/sessions makes one)",
                code="session_not_found",
                param="session_id",
            )
        return session

    def get_idle(self, tenant: str | None, session_id: str) -> Session:
        """The same where no turn is being written. Raises `ApiError` 404, 409."""
        session = self.get(tenant, session_id)
        if session.is_busy:
            raise ApiError(
                409,
                f"a turn of session {session_id} is being written (hint: wait until it is whole, or fork before)",
                code="session_busy",
                param="session_id",
            )
        return session

    def add(self, session: Session) -> None:
        """Keep a new one. Raises `ApiError` 429 where the tenant has too many."""
        num_sessions = sum(1 for _ in self.of(session.tenant))
        if num_sessions >= self._max_sessions:
            raise ApiError(
                429,
                f"there are {num_sessions:,} sessions, {self._max_sessions:,} may be (hint: DELETE some)",
                code="too_many_sessions",
            )
        self._sessions[session.id] = session
        self.touch(session)

    def touch(self, session: Session) -> None:
        """It is in use: its time begins anew."""
        session.used_s = self.clock()

    def unpin(self, session: Session) -> None:
        """Let others have its blocks."""
        pin, session.pin = session.pin, None
        if pin is not None:
            self.pins.drop(pin)

    def close(self, session: Session | None = None) -> None:
        """End one session, or all, and give back what they hold."""
        for each in [*self._sessions.values()] if session is None else [session]:
            self._sessions.pop(each.id, None)
            each.is_closed = True
            self.unpin(each)
            lease, each.lease = each.lease, None
            if lease is not None:
                lease.close_later()

    def sweep(self) -> None:
        """End those that nobody has used for their time."""
        now_s = self.clock()
        for session in [*self._sessions.values()]:
            if not session.is_busy and now_s - session.used_s >= session.ttl_s:
                self.close(session)
