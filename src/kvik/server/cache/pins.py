"""What stays in the cache for a time because somebody asked for it, within a share of each model's blocks."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from kvik.cache.radix import common_bytes
from kvik.engine.lease import Lease
from kvik.server.errors import bad_request
from kvik.server.served import ServedModel

MAX_TTL_S = 24 * 3600
MAX_CONSIDERED = 80
"""Newest pins of one namespace that a prompt is compared with."""

_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}

Clock = Callable[[], float]
Kind = Literal["breakpoint", "session"]


def parse_ttl(text: str, param: str) -> float:
    """Seconds of a time such as 90s, 5m, 30m, 1h or 12h. Raises `ApiError`."""
    match = re.fullmatch(r"([0-9]{1,6})([smhd])", text, re.ASCII)
    ttl_s = int(match[1]) * _UNIT_S[match[2]] if match is not None else 0
    if not 1 <= ttl_s <= MAX_TTL_S:
        raise bad_request(f"{param} is {text[:40]!r}, give a time from 1s to 24h, such as 5m, 30m, 1h or 12h", param)
    return float(ttl_s)


@dataclass(slots=True, eq=False, kw_only=True)
class Pin:
    """Tokens that stay in the cache until a time."""

    kind: Kind
    served: ServedModel
    tenant: str | None
    salt: str | None
    tokens: bytes  # as `packed` gives them
    lease: Lease
    ttl_s: float
    expires_s: float

    @property
    def num_tokens(self) -> int:
        """Tokens that are held; 0 when it is over."""
        return self.lease.num_tokens


class PinTooLarge(Exception):
    """It would take more blocks than all pins may."""


class Pins:
    """All pins of a server, the oldest first; threads may share it."""

    def __init__(self, share: float, clock: Clock = time.monotonic) -> None:
        self.share = share
        self.clock = clock
        self._pins: dict[Pin, None] = {}
        self._lock = threading.Lock()
        self._adding = threading.Lock()  # held while blocks are counted, which waits for steps

    def __iter__(self) -> Iterator[Pin]:
        with self._lock:
            pins = list(self._pins)
        return iter(pins)

    def __len__(self) -> int:
        return len(self._pins)

    def limit(self, served: ServedModel) -> int:
        """Blocks of a model that may be pinned."""
        return int(self.share * served.llm.engine.cache.pool.num_blocks)

    def find(self, served: ServedModel, salt: str | None, tokens: bytes) -> Pin | None:
        """The breakpoint that has the most of the tokens; if they begin with all of it, it lives its time once more."""
        candidates = [pin for pin in self if pin.kind == "breakpoint" and pin.served is served and pin.salt == salt][
            -MAX_CONSIDERED:
        ]
        found = [(common_bytes(tokens, 0, pin.tokens), pin) for pin in candidates if pin.num_tokens]
        num_bytes, longest = max(found, key=lambda each: each[0], default=(0, None))
        if longest is None or not num_bytes:
            return None
        if num_bytes == len(longest.tokens):
            self.refresh(longest, longest.ttl_s)
        return longest

    def same(self, served: ServedModel, salt: str | None, tokens: bytes) -> Pin | None:
        """The breakpoint of exactly these tokens."""
        return next(
            (
                pin
                for pin in self
                if pin.kind == "breakpoint" and pin.served is served and pin.salt == salt and pin.tokens == tokens
                if pin.num_tokens
            ),
            None,
        )

    def refresh(self, pin: Pin, ttl_s: float) -> None:
        """Let it live for so long from now on, if it would not anyway."""
        pin.expires_s = max(pin.expires_s, self.clock() + ttl_s)

    def add(
        self,
        lease: Lease,
        num_tokens: int,
        *,
        kind: Kind,
        served: ServedModel,
        tenant: str | None,
        salt: str | None,
        ttl_s: float,
    ) -> Pin:
        """Pin a lease's first tokens; above the share of all pins the oldest goes. It waits for the engine's step.

        Raises `PinTooLarge`, `CacheTooSmall`, `InvalidInput`.
        """
        engine, limit = served.llm.engine, self.limit(served)
        with self._adding:
            if engine.kv_spec.num_blocks_for(num_tokens) > limit:
                raise PinTooLarge
            pinned = lease.pin(num_tokens)
            pin = Pin(
                kind=kind,
                served=served,
                tenant=tenant,
                salt=salt,
                tokens=pinned.hold.tokens,
                lease=pinned,
                ttl_s=ttl_s,
                expires_s=self.clock() + ttl_s,
            )
            with self._lock:
                self._pins[pin] = None
            while _num_pinned(served) > limit:
                # Nobody's pins push out those of others while there are any of their own.
                others = [other for other in self if other.served is served and other is not pin]
                oldest = next((other for other in others if other.tenant == tenant), next(iter(others), None))
                if oldest is None:
                    break
                with self._lock:
                    self._pins.pop(oldest, None)
                oldest.lease.close()
        return pin

    def drop(self, pin: Pin) -> None:
        """Let others have its blocks; once more is no error."""
        with self._lock:
            self._pins.pop(pin, None)
        pin.lease.close_later()

    def sweep(self) -> None:
        """Drop those whose time is over."""
        now_s = self.clock()
        for pin in self:
            if pin.expires_s <= now_s or not pin.num_tokens:
                self.drop(pin)

    def close(self) -> None:
        """Drop all."""
        for pin in self:
            self.drop(pin)


def _num_pinned(served: ServedModel) -> int:
    engine = served.llm.engine
    with engine.lock:
        return engine.cache.num_pinned
