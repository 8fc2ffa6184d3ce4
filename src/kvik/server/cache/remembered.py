"""What finished answers were asked for, so that later ones can be compared with them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MESSAGE_BYTES = 128
"""Of a role and a digest."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What an answer was asked for, as far as it decides what the cache can give."""

    model: str
    salt: str | None
    tokens: bytes  # of the prompt
    facts: Mapping[str, bytes]  # digests of fields by their names
    messages: Sequence[tuple[str, bytes]]  # role and digest of each

    @property
    def num_bytes(self) -> int:
        """About how much memory it takes."""
        return len(self.tokens) + MESSAGE_BYTES * len(self.messages)


class ResponseMemory:
    """What finished answers were asked for, by their ids: for each tenant the newest, so many with so many tokens."""

    def __init__(self, max_entries: int, max_tokens: int) -> None:
        self._max_entries = max_entries
        self._max_bytes = 4 * max_tokens
        self._of_tenant: dict[str | None, OrderedDict[str, Asked]] = {}
        self._num_bytes: dict[str | None, int] = {}
        self._lock = threading.Lock()

    def note(self, tenant: str | None, response_id: str, asked: Asked) -> None:
        """Remember one; the one that was used longest ago may go for it."""
        if asked.num_bytes > self._max_bytes:
            return
        with self._lock:
            entries = self._of_tenant.setdefault(tenant, OrderedDict())
            entries[response_id] = asked
            num_bytes = self._num_bytes.get(tenant, 0) + asked.num_bytes
            while len(entries) > self._max_entries or num_bytes > self._max_bytes:
                num_bytes -= entries.popitem(last=False)[1].num_bytes
            self._num_bytes[tenant] = num_bytes

    def find(self, tenant: str | None, response_id: str) -> Asked | None:
        """That of the tenant's answer with this id."""
        with self._lock:
            entries = self._of_tenant.get(tenant, OrderedDict())
            if response_id in entries:
                entries.move_to_end(response_id)
            return entries.get(response_id)
