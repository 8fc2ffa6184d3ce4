"""Names of blocks that sequences are about to seal: others that need them wait, in place of computing the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvik.cache.digest import Digest, chain
from kvik.cache.radix import Match
from kvik.cache.tables import BlockTable, packed


class Claims:
    """Of each block that somebody computes, the table that said so first."""

    def __init__(self) -> None:
        self._claimed: dict[Digest, BlockTable] = {}

    def __contains__(self, digest: Digest | None) -> bool:
        return digest in self._claimed

    def make(self, table: BlockTable, token_ids: Sequence[int], match: Match, block_size: int) -> None:
        """The table will seal all full blocks of its tokens behind the match."""
        first = match.next_digest
        if first is None:
            return
        rest = packed(token_ids[match.num_tokens + block_size :])
        claims = [first, *chain(first, rest, 4 * block_size)]
        for claim in claims:
            self._claimed.setdefault(claim, table)
        table.claims = claims[::-1]

    def keep_next(self, table: BlockTable) -> None:
        """The table has sealed the next of the blocks that it claims."""
        if table.claims:
            self._remove(table, table.claims.pop())

    def withdraw(self, table: BlockTable) -> None:
        """The table will not seal what it said it would."""
        while table.claims:
            self._remove(table, table.claims.pop())

    def check(self, tables: Iterable[BlockTable]) -> None:
        """Prove that all claims are those of these tables, which are all that live."""
        claimed = {claim for table in tables for claim in table.claims if self._claimed.get(claim) is table}
        assert claimed == self._claimed.keys(), "a claim of a table that is gone"

    def _remove(self, table: BlockTable, claim: Digest) -> None:
        if self._claimed.get(claim) is table:
            del self._claimed[claim]
