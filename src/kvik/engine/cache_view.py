"""A snapshot of the KV cache and its hit statistics; `print()` shows a summary."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kvik.cache import BlockTable, CacheStats, MissReason
from kvik.engine.engine import Engine
from kvik.engine.sequence import Sequence
from kvik.errors import InvalidInput
from kvik.units import amount

TEXT_WIDTH = 60
MAX_SHOWN_ROWS = 200


@dataclass(frozen=True, slots=True)
class TreeRow:
    """A run of blocks that some sequences begin or go on with."""

    level: int  # runs above it
    first_token: int
    num_tokens: int
    num_holders: int  # sequences that use its last block now
    block_ids: list[int]
    text: str
    salt: str | None
    num_children: int  # runs that go on from it


@dataclass(frozen=True, slots=True)
class BlockView:
    """One block of one group of layers."""

    block_id: int
    state: Literal["free", "held", "reusable"]
    num_holders: int
    is_sealed: bool  # full and in the prefix tree; one that is not full may be there too, as an end
    first_token: int | None  # where its tokens stand in their sequence, as far as that is known
    token_ids: list[int]  # those that are computed
    salt: str | None
    holders: list[Sequence]  # that use it now
    num_evicted_before: int | None  # reusable blocks that would be evicted before it, where it is one


@dataclass(frozen=True, slots=True)
class PrefixView:
    """How much of a prompt is in the cache."""

    num_cached_tokens: int
    block_ids: list[int]  # that hold them
    miss_reason: MissReason
    expected_ids: list[int]  # tokens that are cached where the prompt goes on otherwise, as far as one block has them


class CacheView:
    """A snapshot of the KV cache and its hit statistics; `print()` shows a summary with the prefix tree."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def num_blocks(self) -> int:
        """Blocks that the cache may use, of 32 tokens each."""
        return self._engine.cache.pool.num_blocks

    @property
    def num_held(self) -> int:
        """Blocks that running sequences, leases or pins hold."""
        return self._engine.cache.pool.num_held

    @property
    def num_reusable(self) -> int:
        """Blocks without a holder that later requests with the same prefix can use."""
        return self._engine.cache.pool.num_reusable

    @property
    def num_free(self) -> int:
        """Blocks without a holder that are not in the prefix tree."""
        return self._engine.cache.pool.num_free

    @property
    def num_bytes(self) -> int:
        """Bytes that all blocks take together: the most memory that the cache uses."""
        cache = self._engine.cache
        return cache.spec.pool_bytes(cache.size)

    @property
    def committed_bytes(self) -> int:
        """Bytes of memory in use now."""
        return self._engine.cache.committed_bytes

    @property
    def stats(self) -> CacheStats:
        """Counts since the engine began: tokens looked up and found, blocks evicted and copied."""
        return self._engine.cache.stats

    def tree(
        self, *, max_level: int | None = None, max_rows: int | None = None, below: int | None = None
    ) -> list[TreeRow]:
        """The prefix tree, depth first: each run of blocks stands below its parent.

        `max_level` leaves out what lies deeper, `max_rows` all rows behind so many. With `below`, a block, it is the
        run of that block and what goes on from there, with levels from there on, and empty where there is none. The
        engine waits while token ids are copied, not while they are turned into text.
        """
        for name, value in (("max_level", max_level), ("max_rows", max_rows)):
            if value is not None and (type(value) is not int or value < 0):
                raise InvalidInput(f"{name} is {value!r}", hint="give a whole number, or None for all")
        engine = self._engine
        decode = engine.model.tokenizer.decode
        with engine.lock:
            tree = engine.cache.tree
            if below is not None and below not in tree:
                return []
            edges = [
                (namespace, edge, engine.cache.pool.ref_count(edge.block_ids[-1]))
                for namespace, edge in tree.edges(max_level, max_rows, below)
            ]
        return [
            TreeRow(
                level=edge.depth,
                first_token=edge.first_token,
                num_tokens=len(edge.tokens) // 4,
                num_holders=num_holders,
                block_ids=edge.block_ids,
                text=decode(np.frombuffer(edge.tokens, np.int32).tolist(), skip_special=False),
                salt=namespace.salt,
                num_children=edge.num_children,
            )
            for namespace, edge, num_holders in edges
        ]

    def last_block_above(self, block_id: int) -> int | None:
        """The last block of the run above the one that a block is in; None where there is none."""
        with self._engine.lock:
            tree = self._engine.cache.tree
            return tree.last_block_above(block_id) if block_id in tree else None

    def block(self, block_id: int, pool_index: int = 0) -> BlockView | None:
        """One block, or a physical block of a group that slides (`Twins.pools`); None where there is none such."""
        cache = self._engine.cache
        with self._engine.lock:
            pools = cache.twins.pools
            if pool_index >= len(pools) or block_id >= pools[pool_index].num_blocks:
                return None
            pool, size = pools[pool_index], cache.spec.block_size

            def place(table: BlockTable) -> int | None:
                """Which of its sequence's blocks a table's block is."""
                held = cache.twins.of_table(table)[pool_index]
                if block_id in held.head:
                    return held.head.index(block_id)
                return held.first + held.block_ids.index(block_id) if block_id in held.block_ids else None

            holders = [(each, at) for each in self._engine.scheduler.running if (at := place(each.table)) is not None]
            salt: str | None = None
            first: int | None = None
            token_ids: list[int] = []
            known = cache.twins.block_of(pool_index, block_id)
            found = None if known is None else cache.tree.tokens_of(known)
            if found is not None:
                namespace, first, tokens = found
                salt, token_ids = namespace.salt, np.frombuffer(tokens, np.int32).tolist()
            elif holders:
                sequence, at = holders[0]
                salt, first = sequence.request.salt, at * size
                token_ids = sequence.token_ids[first : min(first + size, sequence.num_computed_tokens)]
            else:
                for hold in cache.holds:
                    if (at := place(hold.table)) is not None:
                        salt, first = hold.table.namespace.salt, at * size
                        token_ids = np.frombuffer(hold.tokens, np.int32)[first : first + size].tolist()
                        break
            num_holders = pool.ref_count(block_id)
            is_named = pool.is_named(block_id)
            return BlockView(
                block_id=block_id,
                state="held" if num_holders else "reusable" if is_named else "free",
                num_holders=num_holders,
                is_sealed=is_named and len(token_ids) == size,
                first_token=first,
                token_ids=token_ids,
                salt=salt,
                holders=[sequence for sequence, _ in holders],
                num_evicted_before=pool.num_evicted_before(block_id) if is_named and not num_holders else None,
            )

    def match(self, token_ids: SequenceOf[int], salt: str | None = None) -> PrefixView:
        """The prefix of a prompt that is cached now, and why the match ends there; changes nothing."""
        cache = self._engine.cache
        with self._engine.lock:
            found = cache.match(token_ids, salt)
            block_ids, expected = list(found.block_ids), b""
            if found.tail is not None:
                block_id, num_common = found.tail
                block_ids.append(block_id)
                known = cache.tree.tokens_of(block_id)
                assert known is not None, "a match with what is not in the tree"
                expected = known[2][4 * num_common :]
        return PrefixView(
            num_cached_tokens=found.num_cached_tokens,
            block_ids=block_ids,
            miss_reason=found.miss_reason,
            expected_ids=np.frombuffer(expected, np.int32).tolist(),
        )

    def clear(self) -> None:
        """Forget all reusable blocks and return their memory to the system."""
        self._engine.clear_cache()

    def __str__(self) -> str:
        spec, stats = self._engine.kv_spec, self.stats
        lines = [
            f"{self.num_blocks:,} blocks of {spec.block_size} tokens: {self.num_held:,} held, {self.num_reusable:,}"
            f" reusable, {self.num_free:,} free",
            f"{amount(self.committed_bytes)} in use of {amount(self.num_bytes)}; {spec.dtype} keys and"
            f" values, {spec.token_bytes:,} bytes a token",
            f"{stats.num_cached_tokens:,} of {stats.num_queried_tokens:,} prompt tokens found ({stats.hit_rate:.0%});"
            f" {stats.num_evicted_blocks:,} blocks evicted, {stats.num_copied_blocks:,} copied",
        ]
        rows = self.tree(max_rows=MAX_SHOWN_ROWS + 1)
        for row in rows[:MAX_SHOWN_ROWS]:
            text = row.text if len(row.text) <= TEXT_WIDTH else f"{row.text[: TEXT_WIDTH - 2]} …"
            held = f" ×{row.num_holders}" if row.num_holders else ""  # noqa: RUF001
            salt = f" [{row.salt}]" if row.salt is not None else ""
            first, end = f"{row.first_token:,}", f"{row.first_token + row.num_tokens:,}"
            lines.append(f"{'  ' * row.level}{first} … {end}{held}{salt} {text!r}")
        if len(rows) > MAX_SHOWN_ROWS:
            lines.append(f"and more than {MAX_SHOWN_ROWS:,} runs: tree() has all of them")
        return "\n".join(lines)
