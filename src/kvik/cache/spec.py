"""The shape of everything attention must remember, and its price in bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from kvik.config import StoredDType, kv_dtype_name, parse_kv_dtype
from kvik.errors import InvalidInput

BLOCK_SIZE = 32
"""Tokens of a block."""

BLOCKS_PER_SUPERBLOCK = 8
"""Blocks whose keys and values lie together, so arrays grow by this many."""

SEGMENT_SIZE = BLOCK_SIZE * BLOCKS_PER_SUPERBLOCK
"""Tokens whose attention is added up as one."""

_ITEM_BITS: dict[StoredDType, int] = {"f32": 32, "f16": 16, "int8": 8, "k4": 4, "v4": 4}
_SCALE_BYTES: dict[StoredDType, int] = {"f32": 0, "f16": 0, "int8": 4, "k4": 2, "v4": 2}

_CODE_GROUP = 32
"""Items of a k4 or v4 vector that share a scale."""

CODED_HEAD_DIMS = (32, 64, 128, 256, 512)
"""Those that k4 and v4 take: powers of two, for the Hadamard transform, and whole groups of codes."""

MIN_SEQUENCES = 4
"""For which the layers of a window have room, whatever the context."""

MAX_INT8_HEAD_DIM = 512
"""Above it the integer sums of a score could pass 32 bits."""

GroupKind = Literal["full", "window", "chunk", "latent", "state", "recent"]


def whole_superblocks(num_blocks: int) -> int:
    """So many blocks or more: what arrays have that hold them."""
    return -(-num_blocks // BLOCKS_PER_SUPERBLOCK) * BLOCKS_PER_SUPERBLOCK


def attention_multiply_adds(num_heads: int, key_dim: int, value_dim: int) -> int:
    """What it costs that a token attends to another one: query heads with its key, and their weights with its value."""
    return num_heads * (key_dim + value_dim)


@dataclass(frozen=True, slots=True)
class VectorFormat:
    """How a vector is stored, such as the key of a token in one KV head."""

    num_items: int
    dtype: StoredDType
    num_rotary: int = 0  # of these, the last ones, which have a scale of their own (the rotary part of MLA's key)

    @property
    def num_bytes(self) -> int:
        """Bytes of one, with its scale where it has one."""
        num_scales = (self.num_items > self.num_rotary) + (self.num_rotary > 0)
        if self.is_coded:
            num_scales = self.num_items // _CODE_GROUP
        return self.num_items * _ITEM_BITS[self.dtype] // 8 + num_scales * _SCALE_BYTES[self.dtype]

    @property
    def is_coded(self) -> bool:
        """Whether it is kept in codes that only tokens of later segments read."""
        return self.dtype in ("k4", "v4")

    @property
    def as_written(self) -> VectorFormat:
        """What tokens of the same segment read."""
        return replace(self, dtype="f16") if self.is_coded else self

    @property
    def is_storable(self) -> bool:
        """Whether the type takes a vector of this length."""
        if self.is_coded:
            return self.num_items in CODED_HEAD_DIMS and not self.num_rotary
        return self.dtype != "int8" or max(self.num_items - self.num_rotary, self.num_rotary) <= MAX_INT8_HEAD_DIM


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """Layers that remember the same tokens, in the same form.

    full: keys and values of every token. window: of the newest `window`. chunk: of those since the last multiple of
    `window` (Llama 4). latent: of every token one key for all heads, which begins with its value (MLA, DeepSeek-V2).
    state: nothing for a token, but what a recurrence has behind the last one (linear attention, Mamba).
    recent: as they were written, tokens that layers of a full group see so: those since the last multiple of `window`,
    and the first block (`k4` and `v4`, which the full group has).
    """

    kind: GroupKind
    layers: tuple[int, ...]
    num_kv_heads: int
    key: VectorFormat
    value: VectorFormat | None = None  # None: a state has none; of a latent it is not stored
    window: int | None = None  # tokens that a token sees, its own the last; or of a chunk
    index: VectorFormat | None = None  # of a latent: one more key, by which tokens are chosen (DeepSeek-V3.2)

    def __post_init__(self) -> None:
        assert (self.window is not None) == self.slides, f"a group of kind {self.kind} with window {self.window}"
        for vector in (self.key, self.value):
            if vector is not None and vector.is_coded and self.kind == "latent":
                raise InvalidInput(
                    f"the latents of MLA cannot be kept in {vector.dtype}", hint="choose f16 for the keys and values"
                )
            if vector is not None and vector.is_coded and not vector.is_storable:
                raise InvalidInput(
                    f"{vector.dtype} takes a head_dim of {', '.join(map(str, CODED_HEAD_DIMS))}, the model has"
                    f" {vector.num_items}",
                    hint="choose f16 or int8 for the keys and values",
                )
            if vector is not None and not vector.is_storable:
                raise InvalidInput(
                    f"an int8 cache takes a head_dim up to {MAX_INT8_HEAD_DIM}, the model has {vector.num_items}",
                    hint="choose f16 for the keys and values",
                )

    @property
    def keeps_all(self) -> bool:
        """Whether its layers see all tokens."""
        return self.kind in ("full", "latent")

    @property
    def slides(self) -> bool:
        """Whether its layers see only the newest tokens, and so need no others."""
        return self.kind in ("window", "chunk", "recent")

    @property
    def num_first_blocks(self) -> int:
        """Blocks at the beginning that its layers see from everywhere."""
        return 1 if self.kind == "recent" else 0

    @property
    def is_coded(self) -> bool:
        """Whether keys or values are kept in codes, and tokens of the same segment read others."""
        return self.key.is_coded or (self.value is not None and self.value.is_coded)

    @property
    def as_written(self) -> GroupSpec:
        """Of a group that keeps codes: what tokens of the same segment read."""
        value = None if self.value is None else self.value.as_written
        return replace(self, kind="recent", key=self.key.as_written, value=value, window=SEGMENT_SIZE)

    @property
    def num_layers(self) -> int:
        """Layers that keep something here."""
        return len(self.layers)

    @property
    def name(self) -> str:
        """The kind, with the window where there is one."""
        if self.kind == "state" and not self.state_bytes:
            return "no KV"
        return f"{self.kind} {self.window:,}" if self.slides else self.kind

    @property
    def format(self) -> str:
        """Which layers keep what, and how, as one line."""
        vectors = (f"{one.num_items} {one.dtype}, {one.num_rotary} rotary" for one in (self.key, self.value) if one)
        kind = self.kind if self.window is None else f"{self.kind} {self.window}"
        layers = ",".join(map(str, self.layers))
        return f"{kind} of layers {layers}: {self.num_kv_heads} heads of {' and '.join(vectors)}"

    @property
    def vector_bytes(self) -> int:
        """Bytes of one key with its value."""
        is_stored = self.value is not None and self.kind != "latent"
        chooser = 0 if self.index is None else self.index.num_bytes
        return self.key.num_bytes + chooser + (self.value.num_bytes if is_stored and self.value is not None else 0)

    @property
    def token_bytes(self) -> int:
        """Bytes that one remembered token occupies in these layers."""
        return 0 if self.kind == "state" else self.num_layers * self.num_kv_heads * self.vector_bytes

    @property
    def state_bytes(self) -> int:
        """Bytes of one state in these layers; of other kinds 0."""
        return self.num_layers * self.num_kv_heads * self.vector_bytes if self.kind == "state" else 0

    @property
    def problem(self) -> str | None:
        """Why the engine cannot keep this, though it can be planned; `None`: it can."""
        if self.kind in ("chunk", "latent", "state"):
            what = {"chunk": "attention in chunks", "latent": "latent attention (MLA)", "state": "recurrent states"}
            return f"{self.num_layers} layers use {what[self.kind]}"
        assert self.value is not None
        if self.key.num_items != self.value.num_items:
            return f"keys have {self.key.num_items} dimensions, values {self.value.num_items}"
        return f"head_dim {self.key.num_items} is no multiple of 8" if self.key.num_items % 8 else None

    def first_token(self, num_tokens: int) -> int:
        """The first token of a sequence that the one behind `num_tokens` of them still sees."""
        if self.window is None:
            return 0
        if self.kind == "window":
            return max(0, num_tokens + 1 - self.window)
        return num_tokens // self.window * self.window

    def num_tokens(self, context: int) -> int:
        """Tokens of `context` that are remembered at most."""
        if self.kind == "state":
            return 0
        return context if self.window is None else min(context, self.num_first_blocks * BLOCK_SIZE + self.window)

    def with_dtype(self, dtype: str) -> GroupSpec:
        """The same layers with keys and values of other types; see `parse_kv_dtype`."""
        if self.kind == "state":
            return self
        key, value = parse_kv_dtype(dtype)
        if self.slides:  # what it keeps is about as much as is read as it was written
            key, value = ("f16" if one in ("k4", "v4") else one for one in (key, value))
        stored = None if self.value is None else replace(self.value, dtype=key if self.kind == "latent" else value)
        return replace(self, key=replace(self.key, dtype=key), value=stored)


@dataclass(frozen=True, slots=True)
class PoolSize:
    """Blocks of a cache: the logical ones, which tables name, and the physical ones of each group of layers."""

    num_blocks: int
    group_blocks: tuple[int, ...]


@dataclass(frozen=True)
class KVCacheSpec:
    """Keys and values of every layer: the one source of every memory figure."""

    groups: tuple[GroupSpec, ...]
    block_size: int = BLOCK_SIZE
    shared: tuple[tuple[int, int], ...] = ()  # a layer that keeps nothing, and the one whose keys and values it reads

    def __post_init__(self) -> None:
        owners = [layer for group in self.groups if group.kind != "recent" for layer in group.layers]
        assert len(set(owners)) == len(owners), "a layer in two groups"
        for index, group in enumerate(self.groups):
            assert group.kind != "recent" or index in self.recent_of.values(), "what is recent in no other group"
            assert not group.is_coded or index in self.recent_of, "codes alone"
        assert {owner for _, owner in self.shared} <= set(owners), "a layer that reads what no layer keeps"

    @classmethod
    def of_layers(
        cls, layers: Iterable[GroupSpec], block_size: int = BLOCK_SIZE, shared: Sequence[tuple[int, int]] = ()
    ) -> KVCacheSpec:
        """Groups of one layer each, those put together that differ in nothing else; the narrowest windows last."""
        together: dict[GroupSpec, list[int]] = {}
        for one in layers:
            together.setdefault(replace(one, layers=()), []).extend(one.layers)
        groups = [replace(group, layers=tuple(members)) for group, members in together.items()]
        groups.sort(key=lambda group: (not group.keeps_all, group.kind, group.window or 0))
        return cls(tuple(groups), block_size, tuple(shared))

    @classmethod
    def uniform(
        cls,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: str,
        block_size: int = BLOCK_SIZE,
        layer_windows: Sequence[int | None] | None = None,
    ) -> KVCacheSpec:
        """Layers whose heads are alike, some with a window."""
        assert layer_windows is None or len(layer_windows) == num_layers
        vector = VectorFormat(head_dim, "f16")
        windows = layer_windows or (None,) * num_layers
        return cls.of_layers(
            (
                GroupSpec("full" if window is None else "window", (layer,), num_kv_heads, vector, vector, window)
                for layer, window in enumerate(windows)
            ),
            block_size,
        ).with_dtype(dtype)

    def with_dtype(self, dtype: str) -> KVCacheSpec:
        """The same with keys and values of other types; see `parse_kv_dtype`.

        Where they are codes, layers with a window keep f16. Raises `InvalidInput` where all layers have one.
        """
        groups = [group.with_dtype(dtype) for group in self.groups if group.kind != "recent"]
        if {"k4", "v4"} & set(parse_kv_dtype(dtype)) and not any(group.is_coded for group in groups):
            raise InvalidInput(
                f"{dtype} is for layers that see all tokens, the model has none", hint="choose f16 or int8"
            )
        return replace(self, groups=(*groups, *(group.as_written for group in groups if group.is_coded)))

    @cached_property
    def recent_of(self) -> dict[int, int]:
        """Of each group that keeps codes: the group that has what tokens of the same segment read."""
        recent = {group.layers: index for index, group in enumerate(self.groups) if group.kind == "recent"}
        return {
            index: recent[group.layers]
            for index, group in enumerate(self.groups)
            if group.is_coded and group.layers in recent
        }

    @cached_property
    def layer_groups(self) -> tuple[int, ...]:
        """Of each layer: the index of its group, or of the one that it reads from; never of a recent group."""
        kept = [(index, group) for index, group in enumerate(self.groups) if group.kind != "recent"]
        found = {layer: index for index, group in kept for layer in group.layers}
        found |= {layer: found[owner] for layer, owner in self.shared}
        return tuple(found[layer] for layer in sorted(found))

    @property
    def num_layers(self) -> int:
        """All layers that remember something, or read what another one remembers."""
        return len(self.layer_groups)

    @property
    def dtype(self) -> str:
        """Types of the keys and values, as `parse_kv_dtype` takes them."""
        group = next((group for group in self.groups if group.kind != "state"), None)
        if group is None:
            return "f32"
        return kv_dtype_name(group.key.dtype, (group.value or group.key).dtype)

    @cached_property
    def format(self) -> str:
        """All that decides how the bytes of a block lie: caches of the same model and format may exchange blocks."""
        shared = "".join(f"; layer {layer} reads {owner}" for layer, owner in self.shared)
        return f"{self.block_size} tokens; " + "; ".join(group.format for group in self.groups) + shared

    @property
    def problem(self) -> str | None:
        """Why the engine cannot keep this; `None`: it can."""
        return next((problem for group in self.groups if (problem := group.problem) is not None), None)

    @cached_property
    def full_groups(self) -> tuple[int, ...]:
        """Groups that see all tokens."""
        return tuple(index for index, group in enumerate(self.groups) if group.keeps_all)

    @cached_property
    def sliding_groups(self) -> tuple[int, ...]:
        """Groups that see only the newest tokens."""
        return tuple(index for index, group in enumerate(self.groups) if group.slides)

    @property
    def token_bytes(self) -> int:
        """Bytes one token occupies across all layers while no window is full, key and value together.

        What is recent is not counted: it stays as large as it is while a text grows.
        """
        return sum(group.token_bytes for group in self.groups if group.kind != "recent")

    @property
    def written_bytes(self) -> int:
        """Bytes that are written for one token."""
        return sum(group.token_bytes for group in self.groups)

    @cached_property
    def group_block_bytes(self) -> tuple[int, ...]:
        """Bytes of one physical block of each group; of a group of states, of one state."""
        return tuple(group.state_bytes or group.token_bytes * self.block_size for group in self.groups)

    @cached_property
    def block_bytes(self) -> int:
        """Bytes one block occupies across the layers that see all tokens, keys and values together."""
        return sum(self.group_block_bytes[index] for index in self.full_groups)

    def first_block(self, group: int, num_tokens: int) -> int:
        """The first block of a sequence that the token behind `num_tokens` of them sees in a group."""
        return self.groups[group].first_token(num_tokens) // self.block_size

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens of one sequence."""
        return -(-num_tokens // self.block_size)

    def max_group_blocks(self, group: int, num_tokens: int, step_tokens: int) -> int:
        """The most physical blocks that a sequence of so many tokens holds, in steps of `step_tokens` at most."""
        whole, window = self.num_blocks_for(num_tokens), self.groups[group].window
        if window is None:
            return whole
        if self.groups[group].kind == "recent":  # it begins with a block
            newest = -(-(window - 1 + step_tokens) // self.block_size)
            return min(whole, self.groups[group].num_first_blocks + newest)
        return min(whole, (window + step_tokens - 3) // self.block_size + 2)

    def held_bytes(self, num_tokens: int) -> int:
        """Bytes that a sequence of `num_tokens` computed tokens holds between steps."""
        blocks = self.num_blocks_for(num_tokens)

        def held(index: int, group: GroupSpec) -> int:
            if group.kind == "state":
                return 1
            first = self.first_block(index, num_tokens)
            return blocks - first + min(first, group.num_first_blocks)

        return sum(self.group_block_bytes[index] * held(index, group) for index, group in enumerate(self.groups))

    def pool_blocks_for(self, num_tokens: int) -> int:
        """Blocks to allocate so that one sequence of `num_tokens` fits: whole superblocks."""
        return whole_superblocks(self.num_blocks_for(num_tokens))

    def pool_size_for(self, num_blocks: int, num_sequences: int, step_tokens: int) -> PoolSize:
        """So many blocks, and in each group what so many sequences that run at once come to hold of them.

        A group that slides has whole superblocks too. It has a block more for each sequence than a step needs, for one
        that is copied before it is written.
        """

        def group_blocks(index: int, group: GroupSpec, step_tokens: int = step_tokens) -> int:
            if group.kind == "state":
                return num_sequences
            if group.keeps_all:
                return num_blocks
            tokens, shared = num_blocks * self.block_size, 0
            if group.kind == "recent":  # as small as it can be: what a step adds, its sequences share
                step_tokens, shared = 1, self.num_blocks_for(step_tokens)
            each = self.max_group_blocks(index, tokens, step_tokens) + 1
            return min(num_blocks, whole_superblocks(num_sequences * each + shared))

        return PoolSize(num_blocks, tuple(group_blocks(*numbered) for numbered in enumerate(self.groups)))

    def pool_size(
        self, num_blocks: int, *, context: int, step_tokens: int, max_running: int, min_sequences: int = MIN_SEQUENCES
    ) -> PoolSize:
        """The same for as many sequences as whole contexts fit, or `min_sequences`; the windows of more may wait."""
        sequences = min(max_running, max(min_sequences, num_blocks // self.num_blocks_for(context)))
        return self.pool_size_for(num_blocks, sequences, step_tokens)

    def pool_bytes(self, size: PoolSize) -> int:
        """Bytes of a cache of that size."""
        return sum(map(int.__mul__, size.group_blocks, self.group_block_bytes))

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
