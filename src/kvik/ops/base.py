"""What a backend must do, in the transformer's own terms.

Arrays are the backend's and opaque to callers. T is the number of tokens in a step; a batch is flat, without padding.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from kvik.cache import KVCacheSpec

Array: TypeAlias = Any
LayerKV: TypeAlias = Any
IntArray: TypeAlias = npt.NDArray[np.int32]
Vector: TypeAlias = npt.NDArray[np.float32]
Nonlinearity: TypeAlias = Literal["silu", "gelu", "gelu_tanh", "relu"]


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
class KVIndex:
    """Where one KV group, of layers that keep the same tokens, has a step's keys and values."""

    slot_mapping: IntArray  # (T,) block_id * block_size + offset: where each token's go
    block_tables: IntArray  # (sequences, most blocks of any); unused places hold 0


@dataclass(frozen=True, slots=True)
class Batch:
    """The tokens one step computes, sequence after sequence, as the ops see them.

    Slots and tables are those of layers that see all tokens; `windows` has those of each KV group with a window.
    """

    token_ids: IntArray  # (T,)
    positions: IntArray  # (T,) each in its own sequence
    slot_mapping: IntArray  # (T,) block_id * block_size + offset: where its key and value go
    sequence_index: IntArray  # (T,) row of block_tables
    block_tables: IntArray  # (sequences, most blocks of any); unused places hold 0
    logit_rows: IntArray  # (R,) tokens whose logits are wanted
    windows: tuple[KVIndex, ...] = ()
    hidden_rows: IntArray = field(default_factory=lambda: np.empty(0, np.int32))  # (H,) whose hidden states are wanted

    def places(self, kv_group: int) -> KVIndex:
        """Those of a KV group: 0, or 1 and the index of a window."""
        return self.windows[kv_group - 1] if kv_group else KVIndex(self.slot_mapping, self.block_tables)

    def with_windows(self, count: int) -> Batch:
        """The same where so many KV groups with a window have blocks of the same numbers as the others."""
        return replace(self, windows=(KVIndex(self.slot_mapping, self.block_tables),) * count)


@dataclass(frozen=True, slots=True)
class RopeTable:
    """Cosine and sine by position: rotary position embedding (Su et al., 2021)."""

    cos_sin: npt.NDArray[np.float32]  # (positions, pairs, 2)
    adjacent_pairs: bool  # dimensions (2i, 2i+1) rotate together, else (i, i + pairs)


@dataclass(frozen=True, slots=True)
class Norm:
    """What a norm multiplies with and adds, and what keeps it from dividing by zero.

    "rms": x / sqrt(mean(x**2) + eps) * weight (Zhang and Sennrich, 2019). "layer": the same of x - mean(x), plus the
    bias where there is one (Ba et al., 2016).
    """

    weight: Vector  # (width,)
    eps: float
    bias: Vector | None = None  # (width,), of a layer norm
    kind: Literal["rms", "layer"] = "rms"

    @property
    def num_bytes(self) -> int:
        """Bytes of its vectors."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)


@dataclass(frozen=True, slots=True)
class Linear:
    """A projection: (x @ matrix.T + bias) * scale."""

    matrix: Weight
    bias: Vector | None = None  # (rows,)
    scale: float = 1.0

    @property
    def rows(self) -> int:
        """Outputs."""
        return self.matrix.rows

    @property
    def num_bytes(self) -> int:
        """Bytes that one pass reads."""
        return self.matrix.num_bytes + (0 if self.bias is None else self.bias.nbytes)


@dataclass(frozen=True, slots=True)
class QKVWeights:
    """The three projections that attention begins with, and the norms of queries and keys where there are some.

    Such a norm is over head_dim, each head alone, or over all heads of a token at once: its width tells.
    """

    query: Linear  # (num_heads * head_dim, hidden_size)
    key: Linear  # (num_kv_heads * head_dim, hidden_size)
    value: Linear  # (num_kv_heads * head_dim, hidden_size)
    head_dim: int
    query_norm: Norm | None = None
    key_norm: Norm | None = None

    @property
    def linears(self) -> tuple[Linear, Linear, Linear]:
        """The projections."""
        return self.query, self.key, self.value


@dataclass(frozen=True, slots=True)
class AttentionRule:
    """How scores become weights."""

    scale: float | None = None  # of the scores; None: 1 / sqrt(head_dim)
    window: int | None = None  # position p sees max(0, p - window + 1) ... p; None: all before it
    soft_cap: float | None = None  # scores become cap * tanh(score / cap) (Gemma 2)

    def scale_for(self, head_dim: int) -> float:
        """What scores of heads of this size are multiplied with."""
        return 1.0 / math.sqrt(head_dim) if self.scale is None else self.scale


PLAIN = AttentionRule()
"""All positions before, scores / sqrt(head_dim)."""


class RowSampler(Protocol):
    """A backend's own sampling over many rows in one call; `engine/sampler_native.py` packs what it reads."""

    def argmax(self, logits: Vector, rows: IntArray, out: IntArray, /) -> None:
        """The first of the highest logits of some rows of (R, vocab_size); -1 where a row is not finite."""

    def sample(
        self,
        logits: Vector,
        rows: npt.NDArray[np.uint8],  # (rows, bytes of one)
        ids: IntArray,
        biases: Vector,
        masks: npt.NDArray[np.uint8],
        chosen: IntArray,
        totals: npt.NDArray[np.int64],
        top_ids: IntArray,
        top_logits: Vector,
        highest_and_own: Vector,
        /,
    ) -> None:
        """Tokens and what their logprobs are computed from, into the last five arrays."""


Forward: TypeAlias = Callable[["Ops", Batch], Array | tuple[Array, Array]]
"""A forward pass, written against any ops: logits (R, vocab_size) of a batch, or these and its `hidden_rows`."""


class Step(Protocol):
    """A forward pass as a function of the batch."""

    def __call__(self, batch: Batch) -> Array:
        """Logits (R, vocab_size)."""

    def with_hidden(self, batch: Batch) -> tuple[Array, Array]:
        """The same, and hidden states (H, hidden_size) of `hidden_rows`: of a forward pass that gives both."""


class EagerStep:
    """Calls the ops one by one."""

    def __init__(self, forward: Forward, ops: Ops) -> None:
        self._forward = forward
        self._ops = ops

    def __call__(self, batch: Batch) -> Array:
        """Logits; see `Step`."""
        result = self._forward(self._ops, batch)
        return result[0] if isinstance(result, tuple) else result

    def with_hidden(self, batch: Batch) -> tuple[Array, Array]:
        """Both; see `Step`."""
        logits, hidden = self._forward(self._ops, batch)
        return logits, hidden


class Ops(ABC):
    """About a dozen transformer-shaped operations; one whose default composes others may be fused by a backend."""

    name: str

    def load_weight(self, type_name: str, data: npt.NDArray[np.uint8], rows: int, columns: int) -> Weight:
        """A matrix (rows, columns) from the bytes of a GGUF tensor of that type, without loss."""
        return self.load_rows(type_name, (data,), rows, columns)

    @abstractmethod
    def load_rows(self, type_name: str, parts: Iterable[npt.NDArray[np.uint8]], rows: int, columns: int) -> Weight:
        """The same from parts, one held at a time: whole rows, in each part but the last a multiple of 16."""

    @abstractmethod
    def allocate_kv(
        self, spec: KVCacheSpec, num_blocks: int, window_blocks: Sequence[int] | None = None
    ) -> Sequence[LayerKV]:
        """Room for the keys and values of `num_blocks` blocks, one entry a layer, each with its `kv_group`.

        `window_blocks` are those of each KV group with a window; None: as many.
        """

    @abstractmethod
    def copy_blocks(self, kv_cache: Sequence[LayerKV], copies: Sequence[tuple[int, int]], kv_group: int = 0) -> None:
        """Copy whole blocks in every layer of a KV group: (source, target) pairs, in order, of what `allocate_kv` gave.

        A block outside the cache, or one that is its own target, raises ValueError before anything is copied.
        """

    @abstractmethod
    def discard_blocks(self, kv_cache: Sequence[LayerKV], superblocks: Sequence[int], kv_group: int = 0) -> None:
        """Give the memory of a KV group's superblocks (8 blocks) back; what they held is undefined until written.

        `kv_cache` is what `allocate_kv` gave; a superblock outside it raises ValueError.
        """

    @abstractmethod
    def embed(self, table: Weight, token_ids: IntArray, scale: float = 1.0) -> Array:
        """Rows of the table times the scale: (T, hidden_size). Positions are looked up in the same way."""

    @abstractmethod
    def norm(self, x: Array, norm: Norm) -> Array:
        """Each row of x (T, width) normed, or each stretch of a row that is as long as the norm's weight."""

    @abstractmethod
    def project(self, x: Array, linears: Sequence[Linear]) -> tuple[Array, ...]:
        """x (T, columns) times each matrix: (T, rows) each. Quantised weights quantise x once for all."""

    def linear(self, x: Array, linear: Linear, residual: Array | None = None) -> Array:
        """x (T, columns) times one matrix, plus the residual where there is one: (T, rows)."""
        product = self.project(x, (linear,))[0]
        return product if residual is None else self.add(residual, product)

    @abstractmethod
    def split_heads(self, x: Array, head_dim: int) -> Array:
        """(T, heads * head_dim) seen as (T, heads, head_dim)."""

    @abstractmethod
    def merge_heads(self, x: Array) -> Array:
        """(T, heads, head_dim) seen as (T, heads * head_dim)."""

    @abstractmethod
    def rope(self, x: Array, positions: IntArray, table: RopeTable) -> Array:
        """Rotate pairs of dimensions of x (T, heads, head_dim) by their position's angles."""

    @abstractmethod
    def write_kv(self, kv: LayerKV, k: Array, v: Array, slot_mapping: IntArray) -> None:
        """Store k, v (T, num_kv_heads, head_dim) at their slots, in place.

        int8 has one float32 scale for each token's key and one for its value, by KV head: what is stored is a whole
        multiple, -127 ... 127, of the largest magnitude / 127. NaN or infinity makes all of that key or value NaN.
        """

    @abstractmethod
    def attend(self, q: Array, kv: LayerKV, batch: Batch, rule: AttentionRule = PLAIN) -> Array:
        """Causal attention of q (T, num_heads, head_dim) over each token's own sequence.

        Block table entries before a window are not read.
        """

    @abstractmethod
    def activate(self, x: Array, activation: Nonlinearity, up: Array | None = None) -> Array:
        """activation(x), times `up` where there is one (Shazeer, 2020), element by element.

        silu: x * sigmoid(x). gelu: x * Phi(x), the normal distribution's (Hendrycks and Gimpel, 2016); gelu_tanh: their
        approximation x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))). relu: max(x, 0).
        """

    @abstractmethod
    def soft_cap(self, x: Array, cap: float) -> Array:
        """cap * tanh(x / cap), element by element."""

    def norm_qkv(
        self, x: Array, norm: Norm | None, weights: QKVWeights, rope: RopeTable | None, kv: LayerKV, batch: Batch
    ) -> Array:
        """Queries of the normed x, rotated by position: (T, num_heads, head_dim); keys and values go to their slots."""
        q, k, v = self.project(x if norm is None else self.norm(x, norm), weights.linears)
        if weights.query_norm is not None:
            q = self.norm(q, weights.query_norm)
        if weights.key_norm is not None:
            k = self.norm(k, weights.key_norm)
        q, k, v = (self.split_heads(projected, weights.head_dim) for projected in (q, k, v))
        if rope is not None:
            q, k = (self.rope(heads, batch.positions, rope) for heads in (q, k))
        self.write_kv(kv, k, v, batch.places(kv.kv_group).slot_mapping)
        return q

    def norm_gated(self, x: Array, norm: Norm | None, gate: Linear, up: Linear, activation: Nonlinearity) -> Array:
        """activation(gate(normed x)) * up(normed x): (T, intermediate_size)."""
        gated, raised = self.project(x if norm is None else self.norm(x, norm), (gate, up))
        return self.activate(gated, activation, raised)

    def norm_linear(self, x: Array, norm: Norm | None, linear: Linear) -> Array:
        """The normed x times one matrix: (T, rows)."""
        return self.linear(x if norm is None else self.norm(x, norm), linear)

    @abstractmethod
    def add(self, x: Array, y: Array) -> Array:
        """x + y, the residual."""

    @abstractmethod
    def take_rows(self, x: Array, rows: IntArray) -> Array:
        """x[rows]: (R, hidden_size)."""

    def capture(self, forward: Forward) -> Step:
        """The forward pass as a function of the batch; a backend may note its ops once and replay them."""
        return EagerStep(forward, self)

    def row_sampler(self) -> RowSampler | None:
        """The backend's sampling, which gives the bits of the reference in NumPy; None: it has none."""
        return None

    @abstractmethod
    def to_numpy(self, x: Array) -> npt.NDArray[np.float32]:
        """The array for the host's eyes, for sampling above all."""
