"""What a backend must do, in the transformer's own terms.

Arrays are the backend's and opaque to callers. T is the number of tokens in a step; a batch is flat, without padding.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from kvik.cache import BLOCK_SIZE, KVCacheSpec
from kvik.cache.spec import attention_multiply_adds
from kvik.experts import ExpertsRead
from kvik.ops.table import (
    Cost,
    KVRead,
    Value,
    elementwise,
    like_first,
    op,
    products,
    rows_of,
)

Array: TypeAlias = Any
LayerKV: TypeAlias = Any
WeightPlace: TypeAlias = Any
IntArray: TypeAlias = npt.NDArray[np.int32]
Vector: TypeAlias = npt.NDArray[np.float32]
Nonlinearity: TypeAlias = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_silu"]
RouterScores: TypeAlias = Literal["softmax", "sigmoid", "logits"]


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
    """Where one group of layers has a step's keys and values."""

    slot_mapping: IntArray  # (T,) block_id * block_size + offset: where each token's go
    block_tables: IntArray  # (sequences, most blocks of any); unused places hold 0

    @property
    def arrays(self) -> tuple[IntArray, IntArray]:
        """Both."""
        return self.slot_mapping, self.block_tables


@dataclass(frozen=True, slots=True)
class Batch:
    """The tokens one step computes, sequence after sequence, as the ops see them.

    A token's place in its sequence is said three times, for three purposes: `positions` is what it is rotated by,
    `kv_index` where its key and value stand among those of the block table, and it sees those from its window's
    beginning, `kv_index + 1 - window`, up to `kv_bounds`. They agree in a text of which nothing was dropped.
    """

    token_ids: IntArray  # (T,)
    positions: IntArray  # (T,) of the rotary or learned embedding
    kv_index: IntArray  # (T,) its own place in its block table
    kv_bounds: IntArray  # (T,) the first place that it does not see any more: above its own
    sequence_index: IntArray  # (T,) row of the block tables
    logit_rows: IntArray  # (R,) tokens whose logits are wanted
    groups: tuple[KVIndex, ...]  # of each group of layers
    hidden_rows: IntArray = field(default_factory=lambda: np.empty(0, np.int32))  # (H,) whose hidden states are wanted

    @classmethod
    def of_text(
        cls,
        token_ids: IntArray,
        positions: IntArray,
        sequence_index: IntArray,
        groups: Sequence[KVIndex],
        logit_rows: IntArray,
        hidden_rows: IntArray | None = None,
    ) -> Batch:
        """Tokens that stand where their positions say, each seeing all before it."""
        hidden_rows = logit_rows[:0] if hidden_rows is None else hidden_rows
        bounds = positions + np.int32(1)
        return cls(token_ids, positions, positions, bounds, sequence_index, logit_rows, tuple(groups), hidden_rows)

    @classmethod
    def in_blocks(
        cls,
        token_ids: IntArray,
        positions: IntArray,
        sequence_index: IntArray,
        block_tables: IntArray,
        logit_rows: IntArray,
        hidden_rows: IntArray | None = None,
        num_groups: int = 1,
    ) -> Batch:
        """The same where blocks have the same numbers in every group."""
        blocks, offsets = np.divmod(positions, np.int32(BLOCK_SIZE))
        slots = (block_tables[sequence_index, blocks] * np.int32(BLOCK_SIZE) + offsets).astype(np.int32)
        groups = [KVIndex(slots, block_tables)] * num_groups
        return cls.of_text(token_ids, positions, sequence_index, groups, logit_rows, hidden_rows)

    @property
    def num_sequences(self) -> int:
        """Rows of the block tables."""
        return len(self.groups[0].block_tables)


@dataclass(frozen=True, slots=True)
class RopeTable:
    """Cosine and sine by position: rotary position embedding (Su et al., 2021)."""

    cos_sin: npt.NDArray[np.float32]  # (positions, pairs, 2)
    half: int  # dimensions (i, i + half) rotate together; 0: (2i, 2i+1)


@dataclass(frozen=True, slots=True)
class PositionScales:
    """What queries are multiplied with, by position."""

    factors: Vector  # (positions,)


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
class XIELU:
    """The numbers of xIELU (Huang and Schlag, 2024): the curves on both sides of 0, the slope there, the last bend."""

    alpha_p: float
    alpha_n: float
    beta: float
    eps: float

    @property
    def num_bytes(self) -> int:
        """Bytes of the four as float32."""
        return 16


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
    """The three projections that attention begins with, and the norms of what they give where there are some.

    Such a norm is over head_dim, each head alone, or over all heads of a token at once: its width tells. It comes
    before RoPE or after. A layer that reads another one's keys and values has neither; one with keys alone takes what
    their projection gives for values.
    """

    query: Linear  # (num_heads * head_dim, hidden_size)
    key: Linear | None  # (num_kv_heads * head_dim, hidden_size)
    value: Linear | None  # (num_kv_heads * head_dim, hidden_size)
    head_dim: int
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    value_norm: Norm | None = None
    norm_after_rope: bool = False

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The projections."""
        return tuple(linear for linear in (self.query, self.key, self.value) if linear is not None)


@dataclass(frozen=True, slots=True)
class AttentionRule:
    """How scores become weights."""

    scale: float | None = None  # of the scores; None: 1 / sqrt(head_dim)
    window: int | None = None  # position p sees max(0, p - window + 1) ... p; None: all before it
    soft_cap: float | None = None  # scores become cap * tanh(score / cap) (Gemma 2)
    sinks: Vector | None = None  # (num_heads,) scores that join the softmax and bring no value (gpt-oss)

    def scale_for(self, head_dim: int) -> float:
        """What scores of heads of this size are multiplied with."""
        return 1.0 / math.sqrt(head_dim) if self.scale is None else self.scale


def slots_of(kv: LayerKV, batch: Batch) -> tuple[IntArray, IntArray | None]:
    """Where a layer's keys and values go, and where they go as well if it keeps codes."""
    recent = None if kv.recent_group is None else batch.groups[kv.recent_group].slot_mapping
    return batch.groups[kv.kv_group].slot_mapping, recent


PLAIN = AttentionRule()
"""All positions before, scores / sqrt(head_dim)."""


@dataclass(frozen=True, slots=True)
class Routing:
    """How a router's logits choose experts for a token, and what each expert's result is multiplied with.

    Scores are the softmax over all logits, or the sigmoid of each, or the logits themselves, in float32. The highest
    ones are chosen, of equal ones the lower ids. Weights are the scores of the chosen; of logits, their softmax over
    the chosen alone (Shazeer et al., 2017). With groups, experts are chosen from the best groups alone, each judged by
    the sum of its highest two scores (DeepSeek-AI, 2024).
    """

    num_chosen: int
    scores: RouterScores = "softmax"
    renormalize: bool = False  # divide the weights by their sum
    min_sum: float = 0.0  # added to that sum
    scale: float = 1.0  # of the weights, at last
    num_groups: int = 1
    num_chosen_groups: int = 1


@dataclass(frozen=True, slots=True)
class Expert:
    """One expert: down(activation(gate(x)) * up(x)), or down(activation(up(x))) without a gate."""

    up: Linear  # (intermediate_size, hidden_size)
    down: Linear  # (hidden_size, intermediate_size)
    gate: Linear | None = None  # (intermediate_size, hidden_size)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The projections, in the order in which they are read."""
        return (self.up, self.down) if self.gate is None else (self.gate, self.up, self.down)


@dataclass(frozen=True, slots=True)
class ExpertsWeights:
    """The experts of a layer, by their ids, and how some of them are chosen for a token."""

    routing: Routing
    experts: tuple[Expert, ...]
    choice_bias: Vector | None = None  # (num_experts,) added to the scores to choose by, not to the weights
    scales: Vector | None = None  # (num_experts,) what each expert's weight is multiplied with

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The projections of all experts."""
        return tuple(linear for expert in self.experts for linear in expert.linears)

    @property
    def vector_bytes(self) -> int:
        """Bytes of what is no projection."""
        return sum(vector.nbytes for vector in (self.choice_bias, self.scales) if vector is not None)


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


def _norm_cost(x: Value, norm: Norm) -> Cost:
    return Cost(weight_bytes=norm.num_bytes, row_bytes=8 * x.width, row_operations=4 * x.width)


def _attend_cost(q: Value, kv: LayerKV, batch: Batch, rule: AttentionRule) -> Cost:
    num_heads, head_dim = q.shape
    multiply_adds = attention_multiply_adds(num_heads, head_dim, head_dim)
    weight_bytes = 0 if rule.sinks is None else rule.sinks.nbytes
    return Cost(weight_bytes, kv=KVRead(kv.kv_group, rule.window, kv.token_bytes, multiply_adds))


def _experts_cost(x: Value, logits: Value, weights: ExpertsWeights, activation: Nonlinearity) -> Cost:
    one = products(*weights.experts[0].linears)
    reads = ExpertsRead(len(weights.experts), weights.routing.num_chosen, one.weight_bytes)
    multiply_adds = reads.num_chosen * one.multiply_adds
    return Cost(weight_bytes=weights.vector_bytes, multiply_adds=multiply_adds, experts=reads)


def _query_shape(
    x: Value, norm: Norm | None, weights: QKVWeights, rope: RopeTable | None, kv: LayerKV, batch: Batch
) -> tuple[tuple[int, ...], ...]:
    return ((weights.query.rows // weights.head_dim, weights.head_dim),)


class Ops(ABC):
    """About a dozen transformer-shaped operations; what they mean, `ReferenceOps` says in NumPy.

    A backend runs them one by one (`run`). `linear` and the three `norm_` ones are made of others; a captured step may
    have them as one (`ops/fusion.py`).
    """

    name: str

    def load_weight(self, type_name: str, data: npt.NDArray[np.uint8], rows: int, columns: int) -> Weight:
        """A matrix (rows, columns) from the bytes of a GGUF tensor of that type, without loss."""
        return self.load_rows(type_name, (data,), rows, columns)

    @abstractmethod
    def load_rows(
        self,
        type_name: str,
        parts: Iterable[npt.NDArray[np.uint8]],
        rows: int,
        columns: int,
        place: WeightPlace | None = None,
    ) -> Weight:
        """The same from parts, one held at a time: whole rows, in each part but the last a multiple of 16."""

    def places_together(self, kinds: Sequence[tuple[str, int, int]]) -> Sequence[WeightPlace | None]:
        """Places for matrices of these types, rows and columns that are wanted together, if the backend cares."""
        return [None] * len(kinds)

    @abstractmethod
    def map_rows(self, type_name: str, data: npt.NDArray[np.uint8], rows: int, columns: int) -> Weight:
        """A table for `embed` alone, whose rows are read from the bytes of that GGUF tensor as they are needed."""

    @abstractmethod
    def allocate_kv(self, spec: KVCacheSpec, group_blocks: int | Sequence[int]) -> Sequence[LayerKV]:
        """Room for so many blocks in each group, or in all: one entry a layer, each with its `kv_group`.

        A layer that reads what another one keeps has the other one's entry.
        """

    @abstractmethod
    def copy_blocks(self, kv_cache: Sequence[LayerKV], copies: Sequence[tuple[int, int]], kv_group: int = 0) -> None:
        """Copy whole blocks in every layer of a group: (source, target) pairs, in order, of what `allocate_kv` gave.

        A block outside the cache, or one that is its own target, raises ValueError before anything is copied.
        """

    @abstractmethod
    def discard_blocks(self, kv_cache: Sequence[LayerKV], superblocks: Sequence[int], kv_group: int = 0) -> None:
        """Give the memory of a group's superblocks (8 blocks) back; what they held is undefined until written.

        `kv_cache` is what `allocate_kv` gave; a superblock outside it raises ValueError.
        """

    @abstractmethod
    def read_blocks(self, kv_cache: Sequence[LayerKV], block_ids: Sequence[int], kv_group: int = 0) -> bytes:
        """The bytes of whole blocks in every layer of a KV group, block after block, in the backend's own layout.

        They mean something to `write_blocks` of the same backend, spec and numerics alone. A block outside the cache
        raises ValueError.
        """

    @abstractmethod
    def write_blocks(
        self, kv_cache: Sequence[LayerKV], block_ids: Sequence[int], data: memoryview | bytes, kv_group: int = 0
    ) -> None:
        """Put bytes that `read_blocks` gave into blocks; of another length, or a block outside: ValueError."""

    @abstractmethod
    def run(self, name: str, *arguments: Any) -> Any:
        """One op, by name, with the arguments of its method: an array, or some (`project`), or None (`write_kv`)."""

    @op(
        lambda table, ids, scale: ((table.columns,),),
        lambda table, ids, scale: Cost(row_bytes=table.num_bytes / table.rows),
    )
    def embed(self, table: Weight, token_ids: IntArray, scale: float = 1.0) -> Array:
        """Rows of the table times the scale: (T, hidden_size). Positions are looked up in the same way."""
        return self.run("embed", table, token_ids, scale)

    @op(like_first, _norm_cost)
    def norm(self, x: Array, norm: Norm) -> Array:
        """Each row of x (T, width) normed, or each stretch of a row that is as long as the norm's weight."""
        return self.run("norm", x, norm)

    @op(lambda x, linears: rows_of(*linears), lambda x, linears: products(*linears))
    def project(self, x: Array, linears: Sequence[Linear]) -> tuple[Array, ...]:
        """x (T, columns) times each matrix: (T, rows) each. Quantised weights quantise x once for all."""
        results: tuple[Array, ...] = self.run("project", x, tuple(linears))
        return results

    @abstractmethod
    def split_heads(self, x: Array, head_dim: int) -> Array:
        """(T, heads * head_dim) seen as (T, heads, head_dim)."""

    @abstractmethod
    def merge_heads(self, x: Array) -> Array:
        """(T, heads, head_dim) seen as (T, heads * head_dim)."""

    @op(like_first, elementwise(2, 3))
    def rope(self, x: Array, positions: IntArray, table: RopeTable) -> Array:
        """Rotate pairs of dimensions of x (T, heads, head_dim) by their position's angles."""
        return self.run("rope", x, positions, table)

    @op(like_first, elementwise(2, 1))
    def scale_by_position(self, x: Array, positions: IntArray, scales: PositionScales) -> Array:
        """x (T, heads, head_dim), each token's times the factor of its position."""
        return self.run("scale_by_position", x, positions, scales)

    @op(lambda kv, k, v, *slots: (), lambda kv, k, v, *slots: Cost(row_bytes=8 * (k.width + v.width)))
    def write_kv(
        self, kv: LayerKV, k: Array, v: Array, slot_mapping: IntArray, recent_slots: IntArray | None = None
    ) -> None:
        """Store k, v (T, num_kv_heads, head_dim) at their slots, in place.

        int8 has one float32 scale for each token's key or value, by KV head: what is stored is a whole multiple,
        -127 ... 127, of the largest magnitude / 127. NaN or infinity makes all of that key or value NaN.

        k4 and v4 keep a head's Hadamard transform (Sylvester's, divided by sqrt(head_dim)), as whole multiples, -8 ...
        7, of a float16 scale for 32 items: the one of largest magnitude / -8. It goes to its recent slot too, in
        float16; the other one of key and value goes there as it is kept.
        """
        self.run("write_kv", kv, k, v, slot_mapping, recent_slots)

    @op(like_first, _attend_cost)
    def attend(self, q: Array, kv: LayerKV, batch: Batch, rule: AttentionRule = PLAIN) -> Array:
        """Attention of q (T, num_heads, head_dim) over what each token sees of its own sequence.

        Block table entries before a window are not read. With k4 or v4 a token reads its own segment (256 places)
        and the first block of what is recent, and the other places' codes. Queries are transformed as k4 keys are, and
        what comes of v4 values is transformed back.
        """
        return self.run("attend", q, kv, batch, rule)

    @op(like_first, lambda x, activation, up: elementwise(2 if up is None else 3, 20)(x))
    def activate(self, x: Array, activation: Nonlinearity, up: Array | None = None) -> Array:
        """activation(x), times `up` where there is one (Shazeer, 2020), element by element.

        silu: x * sigmoid(x). gelu: x * Phi(x), the normal distribution's (Hendrycks and Gimpel, 2016); gelu_tanh: their
        approximation x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))). relu: max(x, 0); relu2: its square.
        clamped_silu (gpt-oss): g * sigmoid(1.702 * g) with g = min(x, 7), times 1 + max(-7, min(up, 7)).
        """
        return self.run("activate", x, activation, up)

    @op(like_first, _experts_cost)
    def experts(self, x: Array, logits: Array, weights: ExpertsWeights, activation: Nonlinearity) -> Array:
        """What the chosen experts make of each row of x (T, hidden_size), weighted and added up by ascending id.

        `logits` (T, num_experts) are the router's. A row's result does not depend on the other rows.
        """
        return self.run("experts", x, logits, weights, activation)

    @op(like_first, elementwise(2, 20))
    def gate(self, x: Array, gates: Array) -> Array:
        """x * sigmoid(gates): x (T, width), and gates of the same shape or one for each row, (T, 1)."""
        return self.run("gate", x, gates)

    @op(like_first, lambda x, curve: Cost(curve.num_bytes, row_bytes=8 * x.width, row_operations=20 * x.width))
    def xielu(self, x: Array, curve: XIELU) -> Array:
        """alpha_p * x**2 + beta * x above 0, alpha_n * (expm1(min(x, eps)) - x) + beta * x elsewhere, item by item."""
        return self.run("xielu", x, curve)

    @op(like_first, elementwise(2, 20))
    def soft_cap(self, x: Array, cap: float) -> Array:
        """cap * tanh(x / cap), element by element."""
        return self.run("soft_cap", x, cap)

    @op(like_first, elementwise(3, 1))
    def add(self, x: Array, y: Array, scale: float = 1.0) -> Array:
        """(x + y) * scale, the residual."""
        return self.run("add", x, y, scale)

    @op(like_first, elementwise(2, 0))
    def take_rows(self, x: Array, rows: IntArray) -> Array:
        """x[rows]: (R, hidden_size)."""
        return self.run("take_rows", x, rows)

    @op(lambda x, start, count: ((count,),), lambda x, start, count: Cost(row_bytes=8 * count))
    def take_columns(self, x: Array, start: int, count: int) -> Array:
        """x[:, start : start + count]."""
        return self.run("take_columns", x, start, count)

    # Made of the ones above.

    @op(lambda x, linear, residual: rows_of(linear), lambda x, linear, residual: products(linear))
    def linear(self, x: Array, linear: Linear, residual: Array | None = None) -> Array:
        """x (T, columns) times one matrix, plus the residual where there is one: (T, rows)."""
        product = self.project(x, (linear,))[0]
        return product if residual is None else self.add(residual, product)

    @op(lambda x, norm, linear: rows_of(linear), lambda x, norm, linear: products(linear))
    def norm_linear(self, x: Array, norm: Norm | None, linear: Linear) -> Array:
        """The normed x times one matrix: (T, rows)."""
        return self.linear(x if norm is None else self.norm(x, norm), linear)

    @op(lambda x, norm, gate, up, activation: rows_of(gate), lambda x, norm, gate, up, activation: products(gate, up))
    def norm_gated(self, x: Array, norm: Norm | None, gate: Linear, up: Linear, activation: Nonlinearity) -> Array:
        """activation(gate(normed x)) * up(normed x): (T, intermediate_size)."""
        gated, raised = self.project(x if norm is None else self.norm(x, norm), (gate, up))
        return self.activate(gated, activation, raised)

    @op(_query_shape, lambda x, norm, weights, rope, kv, batch: products(*weights.linears))
    def norm_qkv(
        self, x: Array, norm: Norm | None, weights: QKVWeights, rope: RopeTable | None, kv: LayerKV, batch: Batch
    ) -> Array:
        """Queries of the normed x, rotated by position: (T, num_heads, head_dim); keys and values go to their slots."""
        q, *k_and_v = self.project(x if norm is None else self.norm(x, norm), weights.linears)
        queries = self.heads(q, weights.query_norm, weights, rope, batch)
        if k_and_v:
            keys = self.heads(k_and_v[0], weights.key_norm, weights, rope, batch)
            v = k_and_v[-1] if weights.value_norm is None else self.norm(k_and_v[-1], weights.value_norm)
            values = self.split_heads(v, weights.head_dim)
            self.write_kv(kv, keys, values, *slots_of(kv, batch))
        return queries

    def heads(self, x: Array, norm: Norm | None, weights: QKVWeights, rope: RopeTable | None, batch: Batch) -> Array:
        """Projected queries or keys, normed and rotated: (T, heads, head_dim)."""
        if norm is not None and not weights.norm_after_rope:
            x = self.norm(x, norm)
        heads = self.split_heads(x, weights.head_dim)
        if rope is not None:
            heads = self.rope(heads, batch.positions, rope)
        return self.norm(heads, norm) if norm is not None and weights.norm_after_rope else heads

    def capture(self, forward: Forward) -> Step:
        """The forward pass as a function of the batch; a backend may note its ops once and replay them."""
        return EagerStep(forward, self)

    def row_sampler(self) -> RowSampler | None:
        """The backend's sampling, which gives the bits of the reference in NumPy; None: it has none."""
        return None

    @abstractmethod
    def to_numpy(self, x: Array) -> npt.NDArray[np.float32]:
        """The array for the host's eyes, for sampling above all."""
