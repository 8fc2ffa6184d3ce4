"""What a backend must do, in the transformer's own terms.

Arrays are the backend's and opaque to callers. T is the number of tokens in a step; a batch is flat, without padding.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from kvik.cache import KVCacheSpec

Array: TypeAlias = Any
LayerKV: TypeAlias = Any
IntArray: TypeAlias = npt.NDArray[np.int32]


class Weight(Protocol):
    """A weight matrix as a backend keeps it: y = x @ weight.T."""

    @property
    def rows(self) -> int:
        """Outputs."""

    @property
    def columns(self) -> int:
        """Inputs."""

    @property
    def num_bytes(self) -> int:
        """Bytes that one pass over the matrix reads."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The tokens one step computes, sequence after sequence, as the ops see them."""

    token_ids: IntArray  # (T,)
    positions: IntArray  # (T,) each in its own sequence
    slot_mapping: IntArray  # (T,) block_id * block_size + offset: where its key and value go
    sequence_index: IntArray  # (T,) row of block_tables
    block_tables: IntArray  # (sequences, most blocks of any); unused places hold 0
    logit_rows: IntArray  # (R,) tokens whose logits are wanted


@dataclass(frozen=True, slots=True)
class RopeTable:
    """Cosine and sine by position: rotary position embedding (Su et al., 2021)."""

    turns: npt.NDArray[np.float32]  # (positions, pairs, 2)
    adjacent_pairs: bool  # dimensions (2i, 2i+1) turn together, else (i, i + pairs)


@dataclass(frozen=True, slots=True)
class Norm:
    """What a norm multiplies with, and what keeps it from dividing by zero."""

    weight: npt.NDArray[np.float32]  # (hidden_size,)
    eps: float


@dataclass(frozen=True, slots=True)
class QKVWeights:
    """The three projections that attention begins with."""

    query: Weight  # (num_heads * head_dim, hidden_size)
    key: Weight  # (num_kv_heads * head_dim, hidden_size)
    value: Weight  # (num_kv_heads * head_dim, hidden_size)
    head_dim: int


Forward: TypeAlias = Callable[["Ops", Batch], Array]
"""A forward pass, written against any ops: logits (R, vocab_size) of a batch."""


class Ops(ABC):
    """About a dozen transformer-shaped operations; one whose default composes others may be fused by a backend."""

    name: str

    @abstractmethod
    def load_weight(self, type_name: str, data: npt.NDArray[np.uint8], rows: int, columns: int) -> Weight:
        """A matrix (rows, columns) from the bytes of a GGUF tensor of that type, without loss."""

    @abstractmethod
    def allocate_kv(self, spec: KVCacheSpec, num_blocks: int) -> Sequence[LayerKV]:
        """Room for the keys and values of `num_blocks` blocks, one entry a layer."""

    @abstractmethod
    def copy_blocks(self, kv_cache: Sequence[LayerKV], copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks in every layer: (source, target) pairs, in order; `kv_cache` is what `allocate_kv` gave.

        A block outside the cache, or one that is its own target, raises ValueError before anything is copied.
        """

    @abstractmethod
    def discard_blocks(self, kv_cache: Sequence[LayerKV], superblocks: Sequence[int]) -> None:
        """Give the memory of superblocks (8 blocks, in every layer) back; what they held is undefined until written.

        `kv_cache` is what `allocate_kv` gave; a superblock outside it raises ValueError.
        """

    @abstractmethod
    def embed(self, table: Weight, token_ids: IntArray) -> Array:
        """Rows of the table: (T, hidden_size)."""

    @abstractmethod
    def rms_norm(self, x: Array, norm: Norm) -> Array:
        """x / sqrt(mean(x**2) + eps) * weight over the last axis of (T, hidden_size) (Zhang and Sennrich, 2019)."""

    @abstractmethod
    def project(self, x: Array, weights: Sequence[Weight]) -> tuple[Array, ...]:
        """x (T, columns) times each weight: (T, rows) each. Quantised weights quantise x once for all."""

    def linear(self, x: Array, weight: Weight, residual: Array | None = None) -> Array:
        """x (T, columns) times one weight, plus the residual where there is one: (T, rows)."""
        product = self.project(x, (weight,))[0]
        return product if residual is None else self.add(residual, product)

    @abstractmethod
    def split_heads(self, x: Array, head_dim: int) -> Array:
        """(T, heads * head_dim) seen as (T, heads, head_dim)."""

    @abstractmethod
    def merge_heads(self, x: Array) -> Array:
        """(T, heads, head_dim) seen as (T, heads * head_dim)."""

    @abstractmethod
    def rope(self, x: Array, positions: IntArray, table: RopeTable) -> Array:
        """Turn pairs of dimensions of x (T, heads, head_dim) by their position's angles."""

    @abstractmethod
    def write_kv(self, kv: LayerKV, k: Array, v: Array, slot_mapping: IntArray) -> None:
        """Store k, v (T, num_kv_heads, head_dim) at their slots, in place.

        int8 has one float32 scale for each token's key and one for its value, by KV head: what is stored is a whole
        multiple, -127 ... 127, of the largest magnitude / 127. NaN or infinity makes all of that key or value NaN.
        """

    @abstractmethod
    def attend(self, q: Array, kv: LayerKV, batch: Batch, window: int | None = None) -> Array:
        """Causal attention of q (T, num_heads, head_dim) over each token's own sequence, scores / sqrt(head_dim).

        With a window, position p sees max(0, p - window + 1) ... p; block table entries before that are not read.
        """

    @abstractmethod
    def silu_multiply(self, gate: Array, up: Array) -> Array:
        """gate * sigmoid(gate) * up, element by element (Shazeer, 2020)."""

    def norm_qkv(self, x: Array, norm: Norm, weights: QKVWeights, rope: RopeTable, kv: LayerKV, batch: Batch) -> Array:
        """Queries of the normed x, turned by position: (T, num_heads, head_dim); keys and values go to their slots."""
        q, k, v = (
            self.split_heads(projected, weights.head_dim)
            for projected in self.project(self.rms_norm(x, norm), (weights.query, weights.key, weights.value))
        )
        self.write_kv(kv, self.rope(k, batch.positions, rope), v, batch.slot_mapping)
        return self.rope(q, batch.positions, rope)

    def norm_gated(self, x: Array, norm: Norm, gate: Weight, up: Weight) -> Array:
        """silu(gate(normed x)) * up(normed x): (T, intermediate_size)."""
        return self.silu_multiply(*self.project(self.rms_norm(x, norm), (gate, up)))

    def norm_linear(self, x: Array, norm: Norm, weight: Weight) -> Array:
        """The normed x times one weight: (T, rows)."""
        return self.linear(self.rms_norm(x, norm), weight)

    @abstractmethod
    def add(self, x: Array, y: Array) -> Array:
        """x + y, the residual."""

    @abstractmethod
    def take_rows(self, x: Array, rows: IntArray) -> Array:
        """x[rows]: (R, hidden_size)."""

    def record(self, forward: Forward) -> Callable[[Batch], Array]:
        """The forward pass as a function of the batch; a backend may note its ops once and replay them."""
        return functools.partial(forward, self)

    @abstractmethod
    def to_numpy(self, x: Array) -> npt.NDArray[np.float32]:
        """The array for the host's eyes, for sampling above all."""
