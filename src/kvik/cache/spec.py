"""The shape of everything attention must remember, and its price in bytes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from kvik.config import KVDType
from kvik.errors import InvalidInput

BLOCK_SIZE = 32
"""Tokens of a block."""

BLOCKS_PER_SUPERBLOCK = 8
"""Blocks whose keys and values lie together, so arrays grow by this many."""

_ITEM_BYTES: dict[KVDType, int] = {"f32": 4, "f16": 2, "int8": 1}
_SCALE_BYTES: dict[KVDType, int] = {"f32": 0, "f16": 0, "int8": 4}  # of each key and each value of a head

MIN_SEQUENCES = 4
"""For which the layers of a window have room, whatever the context."""

MAX_INT8_HEAD_DIM = 512
"""Above it the integer sums of a score could pass 32 bits."""


def vector_bytes(num_items: int, dtype: KVDType) -> int:
    """Bytes of one stored vector, its scale included where it has one."""
    return num_items * _ITEM_BYTES[dtype] + _SCALE_BYTES[dtype]


def whole_superblocks(num_blocks: int) -> int:
    """So many blocks or more: what arrays have that hold them."""
    return -(-num_blocks // BLOCKS_PER_SUPERBLOCK) * BLOCKS_PER_SUPERBLOCK


@dataclass(frozen=True, slots=True)
class WindowSpec:
    """Layers that see the newest `window` tokens, and so need no others."""

    window: int  # tokens that a token sees, its own the last
    num_layers: int
    block_bytes: int  # of one block in all of these layers
    block_size: int

    def first_block(self, num_tokens: int) -> int:
        """The first block of a sequence that the token behind `num_tokens` of them still sees."""
        return max(0, num_tokens + 1 - self.window) // self.block_size

    def num_blocks_for(self, num_tokens: int, step_tokens: int) -> int:
        """The most blocks that a sequence of `num_tokens` tokens holds here, in steps of `step_tokens` at most."""
        whole = -(-num_tokens // self.block_size)
        return min(whole, (self.window + step_tokens - 3) // self.block_size + 2)

    def pool_blocks(self, num_blocks: int, sequences: int, step_tokens: int) -> int:
        """Blocks for so many sequences, beside `num_blocks` blocks of all their tokens: whole superblocks.

        One more than a step needs is for a block that is copied before it is written.
        """
        each = self.num_blocks_for(num_blocks * self.block_size, step_tokens) + 1
        return min(num_blocks, whole_superblocks(sequences * each))


@dataclass(frozen=True, slots=True)
class PoolSize:
    """Blocks of a cache: those that tables name, and for each group of layers with a window its own."""

    num_blocks: int
    window_blocks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class KVCacheSpec:
    """Keys and values of every layer: the one source of every memory figure.

    Layers that see all tokens keep all; those with a window form a group for each width, which keeps its own blocks.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: KVDType
    block_size: int = BLOCK_SIZE
    layer_windows: tuple[int | None, ...] | None = None  # of each layer; None: all see all

    def __post_init__(self) -> None:
        if self.dtype == "int8" and self.head_dim > MAX_INT8_HEAD_DIM:
            raise InvalidInput(
                f"an int8 cache takes a head_dim up to {MAX_INT8_HEAD_DIM}, the model has {self.head_dim}",
                hint="choose f16 for the keys and values",
            )
        assert self.layer_windows is None or len(self.layer_windows) == self.num_layers

    @property
    def windows(self) -> tuple[WindowSpec, ...]:
        """The groups of layers with a window, the narrowest first."""
        widths = Counter(window for window in self.layer_windows or () if window is not None)
        layer_bytes = self._layer_bytes * self.block_size
        return tuple(
            WindowSpec(width, count, count * layer_bytes, self.block_size) for width, count in sorted(widths.items())
        )

    @property
    def groups(self) -> tuple[int, ...]:
        """Of each layer: 0 where it sees all tokens, else 1 and the index of its window group."""
        widths = [window.window for window in self.windows]
        return tuple(
            0 if window is None else 1 + widths.index(window)
            for window in self.layer_windows or (None,) * self.num_layers
        )

    @property
    def num_full_layers(self) -> int:
        """Layers that see all tokens."""
        return self.num_layers - sum(window.num_layers for window in self.windows)

    @property
    def _layer_bytes(self) -> int:
        return 2 * self.num_kv_heads * vector_bytes(self.head_dim, self.dtype)

    @property
    def token_bytes(self) -> int:
        """Bytes one token occupies across all layers while no window is full, key and value together."""
        return self.num_layers * self._layer_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes one block occupies across the layers that see all tokens, keys and values together."""
        return self.num_full_layers * self._layer_bytes * self.block_size

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens of one sequence."""
        return -(-num_tokens // self.block_size)

    def held_bytes(self, num_tokens: int) -> int:
        """Bytes that a sequence of `num_tokens` computed tokens holds between steps."""
        blocks = self.num_blocks_for(num_tokens)
        held = (window.block_bytes * (blocks - window.first_block(num_tokens)) for window in self.windows)
        return blocks * self.block_bytes + sum(held)

    def pool_blocks_for(self, num_tokens: int) -> int:
        """Blocks to allocate so that one sequence of `num_tokens` fits: whole superblocks."""
        return whole_superblocks(self.num_blocks_for(num_tokens))

    def pool_size(self, num_blocks: int, *, context: int, step_tokens: int, max_running: int) -> PoolSize:
        """So many blocks, and in each window group what sequences that run at once come to hold.

        Of these there are as many as whole contexts fit, or `MIN_SEQUENCES`; the windows of more may have to wait.
        """
        sequences = min(max_running, max(MIN_SEQUENCES, num_blocks // self.num_blocks_for(context)))
        return PoolSize(
            num_blocks, tuple(window.pool_blocks(num_blocks, sequences, step_tokens) for window in self.windows)
        )

    def pool_bytes(self, size: PoolSize) -> int:
        """Bytes of a cache of that size."""
        groups = zip(self.windows, size.window_blocks, strict=True)
        return size.num_blocks * self.block_bytes + sum(window.block_bytes * count for window, count in groups)

    def pool_size_within(self, num_bytes: int, *, context: int, step_tokens: int, max_running: int) -> PoolSize:
        """The largest cache, in whole superblocks, that fits into so many bytes."""

        def size(num_superblocks: int) -> PoolSize:
            blocks = num_superblocks * BLOCKS_PER_SUPERBLOCK
            return self.pool_size(blocks, context=context, step_tokens=step_tokens, max_running=max_running)

        # Where no layer sees all, blocks cost nothing once the windows are full: so many that all can run.
        low, high = 0, max_running * self.pool_blocks_for(context) // BLOCKS_PER_SUPERBLOCK
        if self.block_bytes:
            high = num_bytes // (self.block_bytes * BLOCKS_PER_SUPERBLOCK)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.pool_bytes(size(middle)) <= num_bytes else (low, middle - 1)
        return size(low)
