"""The limits of this machine and what kvik reaches of them with a model's own shape, all of it measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

from kvik.cache import BLOCK_SIZE, KVCacheSpec
from kvik.config import TOKEN_BUDGET
from kvik.machine import available_threads, processor_name
from kvik.models.decoder import Decoder
from kvik.models.spec import DecoderSpec, LayerSpec, RopeSpec
from kvik.models.weights import read_weights
from kvik.models.work import StepWork, count_work
from kvik.ops.base import Batch, Vector, Weight
from kvik.ops.limits import better_limits, measured_limits
from kvik.ops.native import NativeOps
from kvik.ops.program import MachineLimits
from kvik.planner.fit import Load
from kvik.planner.memory import MLP_WIDTH, weight_memory
from kvik.planner.speed import Roofline
from kvik.planner.weights import FORMATS, WeightFormat, held_bytes

PROBE_BYTES = 1 << 28
"""Weights that the probe has, where the model has so many: more than caches hold. Nor are its keys and values more."""

PROBE_STEPS = 15
PROBE_CHUNKS = 3
MAX_PROBE_USERS = 8
MAX_PROBE_VOCAB = 1 << 16


def roofline_here(load: Load) -> Roofline:
    """The machine's limits, and the part of them that kvik reaches with a model of this shape.

    The part is that of a probe: layers of the model's widths, as many as outgrow the caches, with weights of its format
    that are all 0, compute some steps of decode at the load's context and batch, and a prompt. It takes seconds.
    """
    form = _format_of(load)
    probe = _Probe(load, form)
    decode, prefill = ((batch, probe.seconds(batch)) for batch in (probe.decode_batch(), probe.prefill_batch()))

    def reached(of: tuple[Batch, float], limits: MachineLimits) -> float:
        batch, seconds = of
        work = count_work(probe.decoder, probe.kv_spec, batch)
        return _least_seconds(work, limits, form.quantized) / seconds

    limits = measured_limits()
    if max(reached(prefill, limits), reached(decode, limits)) > 1:  # they were measured while it had other work
        limits = better_limits()
    return Roofline(
        name=f"this machine: {processor_name()}, {available_threads()} threads",
        bytes_per_s=limits.bytes_per_s,
        operations_per_s=limits.integer_operations_per_s if form.quantized else limits.float_operations_per_s,
        attention_operations_per_s=limits.float_operations_per_s,
        read_efficiency=reached(decode, limits),
        compute_efficiency=reached(prefill, limits),
        is_measured=True,
    )


def _least_seconds(work: StepWork, limits: MachineLimits, quantized: bool) -> float:
    on_weights = limits.integer_operations_per_s if quantized else limits.float_operations_per_s
    compute_s = 2 * work.weight_multiply_adds / on_weights
    compute_s += 2 * work.attention_multiply_adds / limits.float_operations_per_s
    return max(work.read_bytes / limits.bytes_per_s, compute_s)


def _format_of(load: Load) -> WeightFormat:
    weights = weight_memory(load.shape, load.weights)
    assert weights is not None
    return FORMATS.get(weights.format, FORMATS["q8_0"])  # what kvik does not hold is read like eight bits


class _Probe:
    """A decoder of a model's widths with nothing in its weights, and a cache that is full."""

    def __init__(self, load: Load, form: WeightFormat) -> None:
        shape = load.shape
        group = max(shape.groups, key=lambda one: one.token_bytes)
        head_dim = min(-(-(shape.head_dim if group.kind in ("latent", "state") else group.key.num_items) // 8) * 8, 256)
        heads = shape.num_kv_heads
        self.ops = NativeOps()
        width = shape.intermediate_size or MLP_WIDTH * shape.hidden_size
        num_layers = self._num_layers(shape.num_layers, shape.hidden_size, width, form)
        token_bytes = KVCacheSpec.uniform(num_layers, heads, head_dim, load.kv_dtype).token_bytes
        self.users = min(load.users, MAX_PROBE_USERS)
        max_tokens = max(BLOCK_SIZE, PROBE_BYTES // token_bytes // self.users)
        self.depth = max(1, min(group.num_tokens(load.context), max_tokens))
        self.blocks = -(-(self.depth + 1) // BLOCK_SIZE)
        self.spec = DecoderSpec(
            architecture="llama",
            layers=(LayerSpec(RopeSpec(theta=10_000.0, num_dims=head_dim, adjacent_pairs=True)),) * num_layers,
            hidden_size=shape.hidden_size,
            intermediate_size=width,
            num_heads=shape.num_heads,
            num_kv_heads=heads,
            head_dim=head_dim,
            vocab_size=min(shape.vocab_size, MAX_PROBE_VOCAB),
            context_length=self.blocks * BLOCK_SIZE,
            norm_eps=1e-5,
            tied_head=True,
        )
        weights = read_weights(self.spec, _EmptyWeights(self.spec, form, self.ops))
        self.decoder = Decoder(self.spec, weights, self.ops, self.blocks * BLOCK_SIZE)
        self.kv_spec = self.spec.kv_spec(load.kv_dtype)
        arrays = self.ops.allocate_kv(self.kv_spec, self.kv_spec.pool_blocks_for(self.users * self.blocks * BLOCK_SIZE))
        self.forward: Callable[[Batch], object] = self.decoder.capture(arrays)
        self.forward(self._batch(np.arange(min(BLOCK_SIZE, self.depth)), 1))
        # Memory that was never written costs nothing to read.
        self.ops.copy_blocks(arrays, [(0, block) for block in range(1, self.users * self.blocks)])

    def seconds(self, batch: Batch) -> float:
        """The median step."""
        self.forward(batch)
        took = []
        for _ in range(PROBE_STEPS if len(batch.token_ids) <= MAX_PROBE_USERS else PROBE_CHUNKS):
            start_s = time.perf_counter()
            self.forward(batch)
            took.append(time.perf_counter() - start_s)
        return statistics.median(took)

    def decode_batch(self) -> Batch:
        """One token for each user behind a full context."""
        return self._batch(np.array([self.depth]), self.users)

    def prefill_batch(self) -> Batch:
        """The middle of one prompt, whose tokens see half of it: what a token of it costs on average."""
        num_tokens = min(TOKEN_BUDGET, self.depth)
        return self._batch((self.depth - num_tokens) // 2 + np.arange(num_tokens), 1)

    def _batch(self, positions: np.ndarray[tuple[int], np.dtype[np.int64]], users: int) -> Batch:
        tables = np.arange(users * self.blocks, dtype=np.int32).reshape(users, self.blocks)
        at = np.tile(positions, users).astype(np.int32)
        owner = np.repeat(np.arange(users, dtype=np.int32), len(positions))
        last = np.arange(1, users + 1, dtype=np.int32) * len(positions) - 1
        return Batch.in_blocks(
            np.zeros(len(at), np.int32), at, owner, tables, last.astype(np.int32), num_groups=len(self.kv_spec.groups)
        )

    def _num_layers(self, max_layers: int, hidden_size: int, width: int, form: WeightFormat) -> int:
        layer_bytes = held_bytes(hidden_size * (4 * hidden_size + 3 * width), form)
        return min(max_layers, max(2, -(-PROBE_BYTES // layer_bytes)))


class _EmptyWeights:
    """Weights of a format that are all 0, and norms that are all 1."""

    def __init__(self, spec: DecoderSpec, form: WeightFormat, ops: NativeOps) -> None:
        self.shapes = spec.tensors()
        self.form = form
        self.ops = ops

    def matrix(self, name: str) -> Weight:
        """Nothing, packed."""
        rows, columns = self.shapes[name]
        form = self.form
        fits = columns % (256 if form.name.endswith("_k") else 32 if form.quantized else 1) == 0
        kind = form.name.upper() if fits else "F16" if columns % 32 else "Q8_0"
        num_bytes = int(rows * columns * FORMATS[kind.lower()].file_bits / 8)
        return self.ops.load_weight(kind, np.zeros(num_bytes, np.uint8), rows, columns)

    def table(self, name: str) -> Weight:
        """The same."""
        return self.matrix(name)

    def vector(self, name: str) -> Vector:
        """Ones."""
        return np.ones(self.shapes[name], np.float32)
