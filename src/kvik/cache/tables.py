"""What names blocks: tables of sequences, holds, and matches with them; and what is counted of blocks."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvik.cache.digest import Digest
from kvik.cache.radix import Match, MissReason, Namespace, common_bytes


class BlockCopy(NamedTuple):
    """Keys and values to be copied before a step writes: a block that others keep as it is, and the writer's own."""

    source: int
    target: int
    group: int = 0  # of layers, whose physical blocks they are


@dataclass(slots=True, eq=False)
class TwinTable:
    """The twins that one sequence holds in a group that slides: of its blocks from `first` on, without a gap.

    Where the group's layers see the first blocks from everywhere, `head` has the twins of those that lie before.
    """

    first: int = 0
    block_ids: list[int] = field(default_factory=list)
    head: list[int] = field(default_factory=list)

    @property
    def all_ids(self) -> list[int]:
        """All twins, in the order of their blocks."""
        return self.head + self.block_ids

    def padded(self, length: int) -> list[int]:
        """A block table of that length; what lies before the window or is not there holds 0."""
        before = self.head + [0] * (self.first - len(self.head))
        return before + self.block_ids + [0] * (length - self.first - len(self.block_ids))


@dataclass(slots=True, eq=False, weakref_slot=True)
class BlockTable:
    """The blocks of one sequence, in the order of its tokens. It holds each of them once."""

    namespace: Namespace
    block_ids: list[int] = field(default_factory=list)
    num_sealed: int = 0  # blocks at the beginning that are full and in the prefix tree
    claims: list[Digest] = field(default_factory=list)  # names of the blocks it is about to seal, the next one last
    twins: dict[int, TwinTable] = field(default_factory=dict)  # by group; a full one has the blocks' own numbers


@dataclass(slots=True, eq=False)
class Hold:
    """Blocks that are held outside of any sequence, for whoever goes on from their tokens.

    They are a path of the prefix tree, and behind it a last block that may be open. One that is not pinned is taken
    back when blocks are short: then it has no tokens any more.
    """

    table: BlockTable
    tokens: bytes  # an int32 each; those whose keys and values the blocks have
    is_pinned: bool = False
    is_over: bool = False  # let go or taken back

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values are held."""
        return len(self.tokens) // 4


@dataclass(frozen=True, slots=True)
class HeldMatch(Match):
    """A match with what a hold has."""

    hold: Hold


def held_match(hold: Hold, tokens: bytes, block_size: int) -> HeldMatch | None:
    """What a hold has of the tokens; None: nothing."""
    num_common = common_bytes(tokens, 0, hold.tokens) // 4
    if not num_common:
        return None
    num_whole, num_more = divmod(num_common, block_size)
    num_tokens = num_whole * block_size
    tail = (hold.table.block_ids[num_whole], num_more) if num_more else None
    if 4 * num_common == len(tokens):
        reason = MissReason.ALL
    elif num_common < hold.num_tokens:
        reason = MissReason.DIFFERS
    else:
        reason = MissReason.SHORT if len(tokens) // 4 - num_tokens < block_size else MissReason.UNSEEN
    return HeldMatch(hold.table.namespace, hold.table.block_ids[:num_whole], reason, num_tokens, tail, None, hold)


@dataclass(slots=True)
class BlockEvents:
    """What happened to blocks, in order, for those who watch."""

    taken: list[int] = field(default_factory=list)
    sealed: list[int] = field(default_factory=list)
    evicted: list[int] = field(default_factory=list)
    copied: list[BlockCopy] = field(default_factory=list)
    sealed_digests: list[Digest | None] = field(default_factory=list)  # of each of `sealed`
    evicted_digests: list[Digest | None] = field(default_factory=list)  # of each of `evicted`; None: it was open


@dataclass(slots=True)
class CacheStats:
    """What the prefix cache was asked and what it gave, since the engine began."""

    num_queries: int = 0
    num_queried_tokens: int = 0
    num_cached_tokens: int = 0  # of those, found
    num_evicted_blocks: int = 0
    num_copied_blocks: int = 0

    def note(self, num_asked: int, num_found: int) -> None:
        """One more query, for so many tokens."""
        self.num_queries += 1
        self.num_queried_tokens += num_asked
        self.num_cached_tokens += num_found

    @property
    def hit_rate(self) -> float:
        """Share of the tokens asked for that were found."""
        return self.num_cached_tokens / self.num_queried_tokens if self.num_queried_tokens else 0.0


def packed(token_ids: Sequence[int]) -> bytes:
    """Tokens as the prefix tree compares them: an int32 each."""
    return array("i", token_ids).tobytes()
