"""A handle to blocks that are held outside of any running sequence."""

from __future__ import annotations

from typing import Protocol
from weakref import ReferenceType

from kvik.cache import Hold
from kvik.errors import InvalidInput


class LeaseOwner(Protocol):
    """The engine whose blocks are leased."""

    def fork_lease(self, lease: Lease) -> Lease:
        """Another lease of the same blocks."""

    def pin_lease(self, lease: Lease, num_tokens: int | None = None) -> Lease:
        """Another lease, of the full blocks or of so many tokens, which nobody's need takes away."""

    def close_lease(self, lease: Lease) -> None:
        """Give the blocks back."""

    def forget_lease(self, hold: Hold) -> None:
        """The same for finalisers, which may run anywhere, in the middle of a step too."""


class Lease:
    """Holds what was computed of some tokens until `close`, for requests that go on from them.

    The blocks are a path of the prefix tree, and behind it a last one that may be open. When a running sequence finds
    no block, the lease that was made first loses its own, unless it is pinned: `num_tokens` is 0 then, and what is
    needed is computed again. A lease is a context manager, and one that is forgotten gives its blocks back.
    """

    __slots__ = ("_owner", "hold")

    def __init__(self, owner: ReferenceType[LeaseOwner], hold: Hold) -> None:
        self._owner = owner  # weak: blocks do not outlive their engine, and no lease keeps one alive
        self.hold = hold

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values are held."""
        return self.hold.num_tokens

    def fork(self) -> Lease:
        """Another lease of the same blocks, with an end of its own."""
        return self._engine().fork_lease(self)

    def pin(self, num_tokens: int | None = None) -> Lease:
        """Another lease, of the full blocks, or of the first so many tokens, which nobody's need takes away.

        Raises `CacheTooSmall` where a request that waits or runs could no longer be served.
        """
        return self._engine().pin_lease(self, num_tokens)

    def close(self) -> None:
        """Give the blocks back; once more is no error."""
        owner = self._owner()
        if owner is not None:
            owner.close_lease(self)

    def close_later(self) -> None:
        """The same without waiting for a step that is going on: at its end."""
        owner = self._owner()
        if owner is not None:
            owner.forget_lease(self.hold)

    def _engine(self) -> LeaseOwner:
        owner = self._owner()
        if owner is None:
            raise InvalidInput("the engine of the lease is gone", hint="keep the LLM for as long as its leases")
        return owner

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        # A constructor that was interrupted has left no hold behind.
        hold = getattr(self, "hold", None)
        if hold is not None and not hold.is_over:
            self.close_later()
