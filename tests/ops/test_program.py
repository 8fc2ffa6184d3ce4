"""Captured steps: the bits of eager ops, each op near the reference's, and figures that add up."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from kvik import _native
from kvik.cache import BLOCK_SIZE, KVCacheSpec
from kvik.config import ActivationDType
from kvik.models.loader import LoadedModel, load_model
from kvik.models.spec import RopeSpec
from kvik.ops.base import (
    PLAIN,
    Array,
    AttentionRule,
    Batch,
    IntArray,
    LayerKV,
    Linear,
    Nonlinearity,
    Norm,
    Ops,
    QKVWeights,
    RopeTable,
)
from kvik.ops.capture import capture
from kvik.ops.native import NativeOps
from kvik.ops.program import CapturedStep, native_linear, native_norm
from kvik.ops.reference import ReferenceOps
from models import tiny_model
from ops.arrangement import FloatArray, random_weights
from ops.digest import digest
from ops.test_bits import same_bits

Q4_1, Q8_0, F16 = GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0, GGMLQuantizationType.F16
pytestmark = pytest.mark.sanitize

ACTIVATIONS: tuple[ActivationDType, ...] = ("int8", "int16")


def batch_of(lengths: list[tuple[int, int]], rng: np.random.Generator, *, vocab_size: int, num_blocks: int) -> Batch:
    """Sequences of which tokens [start, stop) are computed, in blocks of no order; logits of every second token."""
    width = max(-(-stop // BLOCK_SIZE) for _, stop in lengths)
    tables = rng.permutation(num_blocks)[: len(lengths) * width].reshape(len(lengths), width).astype(np.int32)
    positions = np.concatenate([np.arange(start, stop, dtype=np.int32) for start, stop in lengths])
    index = np.repeat(np.arange(len(lengths), dtype=np.int32), [stop - start for start, stop in lengths])
    return Batch.in_blocks(
        token_ids=rng.integers(0, vocab_size, len(positions), dtype=np.int32),
        positions=positions,
        sequence_index=index,
        block_tables=tables,
        logit_rows=np.arange(0, len(positions), 2, dtype=np.int32),
    )


class Layer:
    """Weights of all kinds for one small layer: odd numbers of row blocks, and one matrix of floats."""

    hidden_size, vocab_size, num_blocks, num_kv_heads, head_dim = 96, 50, 24, 2, 24
    activation: Nonlinearity = "silu"
    rule = PLAIN

    def __init__(self, ops: Ops, kv_dtype: str, window: int | None = None) -> None:
        self.rule = dataclasses.replace(self.rule, window=window)
        rng = np.random.default_rng(40)
        width = self.num_kv_heads * self.head_dim
        self.table = random_weights(Q8_0, self.vocab_size, self.hidden_size, rng, std=0.2).load(ops)
        self.qkv = QKVWeights(
            self.linear(ops, rng, Q4_1, 3 * width, 96),
            self.linear(ops, rng, Q8_0, width, 96),
            self.linear(ops, rng, F16, width, 96),
            self.head_dim,
        )
        self.o_proj = self.linear(ops, rng, F16, 96, 3 * width)
        self.gate, self.up = self.linear(ops, rng, Q4_1, 200, 96), self.linear(ops, rng, Q8_0, 200, 96)
        self.down = self.linear(ops, rng, F16, 96, 200)
        self.head = self.linear(ops, rng, Q8_0, 41, 96)
        self.norm: Norm | None = Norm(rng.normal(1, 0.1, 96).astype(np.float32), 1e-5)
        self.rope: RopeTable | None = RopeSpec(10_000.0, 16, adjacent_pairs=False).table(300)
        spec = KVCacheSpec.uniform(1, self.num_kv_heads, self.head_dim, kv_dtype)
        self.kv: LayerKV = ops.allocate_kv(spec, self.num_blocks)[0]

    def linear(self, ops: Ops, rng: np.random.Generator, kind: GGMLQuantizationType, rows: int, columns: int) -> Linear:
        return random_weights(kind, rows, columns, rng, std=0.2).linear(ops)

    def fused(self, ops: Ops, batch: Batch) -> Array:
        x = ops.embed(self.table, batch.token_ids)
        q = ops.norm_qkv(x, self.norm, self.qkv, self.rope, self.kv, batch)
        x = ops.linear(ops.merge_heads(ops.attend(q, self.kv, batch, self.rule)), self.o_proj, residual=x)
        hidden = ops.norm_gated(x, self.norm, self.gate, self.up, self.activation)
        x = ops.linear(hidden, self.down, residual=x)
        return ops.norm_linear(ops.take_rows(x, batch.logit_rows), self.norm, self.head)

    def small(self, ops: Ops, batch: Batch) -> Array:
        """The same in ops that do one thing each."""
        x = ops.embed(self.table, batch.token_ids)
        q, k, *values = ops.project(self.normed(ops, x), self.qkv.linears)
        v = values[0] if values else k
        if self.qkv.value_norm:
            v = ops.norm(v, self.qkv.value_norm)
        if self.qkv.query_norm and self.qkv.key_norm:
            q, k = ops.norm(q, self.qkv.query_norm), ops.norm(k, self.qkv.key_norm)
        q, k, v = (ops.split_heads(out, self.head_dim) for out in (q, k, v))
        if self.rope:
            q, k = (ops.rope(heads, batch.positions, self.rope) for heads in (q, k))
        ops.write_kv(self.kv, k, v, batch.groups[0].slot_mapping)
        x = ops.add(x, ops.linear(ops.merge_heads(ops.attend(q, self.kv, batch, self.rule)), self.o_proj))
        gate, up = ops.project(self.normed(ops, x), (self.gate, self.up))
        x = ops.add(x, ops.linear(ops.activate(gate, self.activation, up), self.down))
        return ops.linear(self.normed(ops, ops.take_rows(x, batch.logit_rows)), self.head)

    def normed(self, ops: Ops, x: Array) -> Array:
        return ops.norm(x, self.norm) if self.norm else x


class LayerOfOtherFamilies(Layer):
    """Biases, scales, layer norms, norms of heads, a soft cap, another activation, a score scale, keys as values."""

    activation = "gelu"
    rule = AttentionRule(scale=0.3, soft_cap=2.0, sinks=np.linspace(-2, 2, 6, dtype=np.float32))

    def __init__(
        self,
        ops: Ops,
        kv_dtype: str,
        *,
        rows_normed: bool = False,
        plain: bool = False,
        values_normed: bool = False,
        keys_as_values: bool = False,
    ) -> None:
        super().__init__(ops, kv_dtype)
        rng = np.random.default_rng(39)
        width = self.num_kv_heads * self.head_dim
        weight, bias = rng.normal(1, 0.1, (2, 96)).astype(np.float32)
        self.norm = None if plain else Norm(weight, 1e-5, bias, "layer")
        self.rope = None if plain else self.rope
        norms = [
            Norm(rng.normal(1, 0.1, size).astype(np.float32), 1e-6)
            for size in ((3 * width, width) if rows_normed else (self.head_dim, self.head_dim))
        ]
        self.qkv = dataclasses.replace(
            self.qkv,
            query_norm=norms[0],
            key_norm=norms[1],
            value_norm=Norm(np.ones(self.head_dim, np.float32), 1e-6) if values_normed else None,
            value=None if keys_as_values else self.qkv.value,
        )

    def linear(self, ops: Ops, rng: np.random.Generator, kind: GGMLQuantizationType, rows: int, columns: int) -> Linear:
        matrix = super().linear(ops, rng, kind, rows, columns).matrix
        return Linear(matrix, rng.normal(0, 0.5, rows).astype(np.float32), float(rng.uniform(0.5, 1.5)))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("kv_dtype", ["f32", "f16", "int8", "k=int8,v=f16"])
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_recorded_and_eager_fused_and_small_ops_give_the_same_bits(
    activations: ActivationDType, kv_dtype: str, threads: int
) -> None:
    ops = NativeOps(activations, threads)
    layer = Layer(ops, kv_dtype)
    rng = np.random.default_rng(41)
    captured = [ops.capture(forward) for forward in (layer.fused, layer.small)]
    # 60 tokens at a time go through a gated MLP: with 61, one is left over.
    for lengths in ([(0, 1)], [(0, 61)], [(0, 130)], [(5, 6), (33, 34), (0, 1)], [(0, 40), (255, 260)], [(2, 2 + 33)]):
        batch = batch_of(lengths, rng, vocab_size=layer.vocab_size, num_blocks=layer.num_blocks)
        ways: list[Callable[[Batch], FloatArray]] = [
            lambda batch: layer.fused(ops, batch),
            lambda batch: layer.small(ops, batch),
            *captured,
        ]
        wanted, *others = [way(batch) for way in ways]
        assert wanted.shape == (len(batch.logit_rows), 41)
        assert np.isfinite(wanted).all()
        for other in others:
            same_bits(wanted, other)


@pytest.mark.parametrize("kv_dtype", ["f32", "f16", "int8", "k=int8,v=f16"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rows_normed": True},
        {"plain": True},
        {"values_normed": True},
        {"values_normed": True, "keys_as_values": True},
        {"plain": True, "keys_as_values": True},
    ],
    ids=str,
)
def test_other_families_have_the_same_bits_too(kv_dtype: str, options: dict[str, bool]) -> None:
    ops = NativeOps("int8", 2)
    layer, judge = LayerOfOtherFamilies(ops, kv_dtype, **options), ReferenceOps()
    expected = LayerOfOtherFamilies(judge, kv_dtype, **options)
    fused, small = ops.capture(layer.fused), ops.capture(layer.small)
    assert isinstance(small, CapturedStep)
    assert "norm_qkv" in [call.name for call in small.ops]
    rng = np.random.default_rng(38)
    for lengths in ([(0, 1)], [(0, 61)], [(0, 70)], [(5, 6), (33, 34), (0, 1)]):
        batch = batch_of(lengths, rng, vocab_size=layer.vocab_size, num_blocks=layer.num_blocks)
        wanted = layer.fused(ops, batch)
        for other in (layer.small(ops, batch), fused(batch), small(batch)):
            same_bits(wanted, other)
        if lengths[0][0] == 0:  # else the cache holds what earlier batches left there
            near = expected.fused(judge, batch)
            assert abs(wanted - near).max() < 0.1 * abs(near).max()


def test_hidden_states_outlive_the_ops_behind_them() -> None:
    """Those between attention and MLP, whose memory later ops would reuse, of any tokens in any order."""
    ops = NativeOps("int8", 2)
    layer = Layer(ops, "f16")
    gated = dataclasses.replace(layer.down, matrix=layer.o_proj.matrix)  # 144 columns: of as many heads

    def forward(ops: Ops, batch: Batch) -> tuple[Array, Array]:
        x = ops.embed(layer.table, batch.token_ids)
        q = ops.norm_qkv(x, layer.norm, layer.qkv, layer.rope, layer.kv, batch)
        attended = ops.merge_heads(ops.attend(q, layer.kv, batch, layer.rule))
        after = ops.linear(attended, layer.o_proj, residual=x)
        for _ in range(3):
            x = ops.linear(attended, gated, residual=after)
            x = ops.linear(attended, gated, residual=x)
        rows = ops.take_rows(x, batch.logit_rows)
        return ops.norm_linear(rows, layer.norm, layer.head), ops.take_rows(after, batch.hidden_rows)

    step, rng = ops.capture(forward), np.random.default_rng(43)
    for lengths, hidden_rows in (([(0, 1)], [0]), ([(0, 61)], [60, 3, 3]), ([(5, 6), (0, 40)], [1]), ([(0, 7)], [])):
        batch = batch_of(lengths, rng, vocab_size=layer.vocab_size, num_blocks=layer.num_blocks)
        batch = dataclasses.replace(batch, hidden_rows=np.array(hidden_rows, np.int32))
        logits, hidden = step.with_hidden(batch)
        wanted_logits, wanted = forward(ops, batch)
        assert hidden.shape == (len(hidden_rows), 96)
        same_bits(logits, wanted_logits)
        same_bits(hidden, wanted)
        same_bits(step(batch), wanted_logits)


def test_a_step_that_wants_no_logits() -> None:
    ops = NativeOps()
    layer = Layer(ops, "f16")
    batch = batch_of([(0, 9)], np.random.default_rng(42), vocab_size=50, num_blocks=24)
    batch = dataclasses.replace(batch, logit_rows=np.zeros(0, np.int32))
    assert ops.capture(layer.fused)(batch).shape == (0, 41)


@pytest.fixture(scope="module", params=ACTIVATIONS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, LoadedModel]:
    """A tiny model on the native backend and on the reference."""
    native = tiny_model(tmp_path_factory.mktemp("replay"), activations=request.param, seed=43, threads=2)
    return native, load_model(native.path, ReferenceOps(request.param))


@pytest.mark.tiny
@pytest.mark.parametrize("kv_dtype", ["f32", "f16", "int8", "k=int8,v=f16"])
def test_each_op_of_a_step_is_near_the_reference(pair: tuple[LoadedModel, LoadedModel], kv_dtype: str) -> None:
    """Step-by-step replay: the reference computes each op from what the native op was given.

    Where an input lies between two quanta, a last bit decides which one it becomes: one step of max|x| / 127 (int8) or
    / 32,384 (int16) in one of hundreds of terms, which the tolerance covers, relative to the largest output.
    """
    native, reference = pair
    spec = native.decoder.spec.kv_spec(kv_dtype)
    caches = [model.decoder.ops.allocate_kv(spec, 24) for model in pair]
    step = native.decoder.capture(caches[0])
    assert isinstance(step, CapturedStep)
    calls, _, _ = capture(lambda ops, batch: reference.decoder.forward(batch, caches[1], ops))
    tolerance = {"int8": 2e-2, "int16": 2e-4}[native.decoder.ops.activations]  # type: ignore[attr-defined]
    rng = np.random.default_rng(44)
    for lengths in ([(0, 40)], [(40, 41), (0, 7)]):
        batch = batch_of(lengths, rng, vocab_size=native.decoder.spec.vocab_size, num_blocks=24)
        for call, replayed in zip(calls, step.replay(batch), strict=True):
            assert call.name == replayed.call.name
            arguments = [
                seen if isinstance(seen, np.ndarray | Batch) else own
                for own, seen in zip(call.arguments, replayed.arguments, strict=True)
            ]
            wanted = getattr(reference.decoder.ops, call.name)(*arguments)
            (result,) = replayed.results
            assert abs(result - wanted).max(initial=0) <= tolerance * abs(wanted).max(initial=1e-6), call.name


def test_a_replay_gives_the_logits_of_a_run(pair: tuple[LoadedModel, LoadedModel]) -> None:
    decoder = pair[0].decoder
    step = decoder.capture(decoder.ops.allocate_kv(decoder.spec.kv_spec("f16"), 24))
    assert isinstance(step, CapturedStep)
    batch = batch_of([(0, 12)], np.random.default_rng(45), vocab_size=decoder.spec.vocab_size, num_blocks=24)
    *_, last = step.replay(batch)
    np.testing.assert_array_equal(last.results[0], step(batch))


def test_the_profile_names_each_op_and_counts_each_weight_once(pair: tuple[LoadedModel, LoadedModel]) -> None:
    decoder = pair[0].decoder
    step = decoder.capture(decoder.ops.allocate_kv(decoder.spec.kv_spec("f16"), 24))
    assert isinstance(step, CapturedStep)
    batch = batch_of([(0, 10)], np.random.default_rng(46), vocab_size=decoder.spec.vocab_size, num_blocks=24)
    profile = step.profile(batch)
    layer = ["norm_qkv", "attend", "linear", "norm_gated", "linear"]
    assert [op.name for op in profile] == ["embed", *layer * decoder.spec.num_layers, "take_rows", "norm_linear"]
    assert [call.name for call in step.ops] == [op.name for op in profile]
    assert all(op.seconds > 0 for op in profile)
    matrices = [op for op in profile if op.name in ("norm_qkv", "linear", "norm_gated", "norm_linear")]
    norms = 4 * decoder.spec.hidden_size * (2 * decoder.spec.num_layers + 1)
    kv_spec, weights = decoder.spec.kv_spec("f16"), decoder.weights
    assert sum(op.bytes for op in matrices) + norms == decoder.step_bytes(kv_spec, 1, 1)
    layers = sum(layer.num_bytes for layer in weights.layers)
    assert decoder.step_bytes(kv_spec, 1, 0) == layers
    assert decoder.step_bytes(kv_spec, 1, 1) == layers + weights.norm.num_bytes + weights.lm_head.num_bytes
    attends = [op for op in profile if op.name == "attend"]
    assert sum(op.bytes for op in attends) == 10 * kv_spec.token_bytes
    width = decoder.spec.num_heads * decoder.spec.head_dim
    assert attends[0].operations == 4 * sum(range(1, 11)) * width


def test_the_callers_rounding_mode_changes_no_bit_and_comes_back() -> None:
    """Rounding upward, set by fesetround as a numerical library might."""
    libm = ctypes.CDLL("libm.so.6")
    upward, wanted = 0x800, digest()
    before = libm.fegetround()
    assert libm.fesetround(upward) == 0
    try:
        ops = NativeOps()
        layer = Layer(ops, "f16")
        batch = batch_of([(0, 9)], np.random.default_rng(47), vocab_size=50, num_blocks=24)
        rounded_up = ops.capture(layer.fused)(batch)
        assert libm.fegetround() == upward
    finally:
        libm.fesetround(before)
    assert digest() == wanted
    np.testing.assert_array_equal(rounded_up, ops.capture(layer.fused)(batch))


@pytest.fixture
def program() -> _native.Program:
    return _native.Program(_native.ThreadPool(1), False)


def test_a_program_refuses_what_does_not_fit(program: _native.Program) -> None:
    ops = NativeOps(threads=1)
    layer = Layer(ops, "f16")
    assert layer.norm is not None
    assert layer.rope is not None
    norm, rope = native_norm(layer.norm), _native.Rope(layer.rope.cos_sin, layer.rope.half)
    scales = _native.PositionScales(np.ones(8, np.float32))
    narrow = _native.Norm(layer.norm.weight[:8].copy(), 1e-5, None, False)
    gate, down, head = map(native_linear, (layer.gate, layer.down, layer.head))
    query, key, value = map(native_linear, layer.qkv.linears)
    assert isinstance(layer.table, _native.PackedWeight)
    x = program.embed(layer.table, "token_ids", 1.0)
    projected = program.norm_linear(x, norm, head)
    refused: list[tuple[str, Callable[[], object]]] = [
        ("no such value", lambda: program.linear(7, gate, None)),
        ("no such value", lambda: program.linear(-1, gate, None)),
        ("another number of columns", lambda: program.linear(x, down, None)),
        ("the residual has another shape", lambda: program.linear(x, gate, x)),
        ("no multiple of the weight's", lambda: program.norm(projected, narrow)),
        ("another width", lambda: program.norm_linear(x, narrow, head)),
        ("a projection is not", lambda: program.project(x, [gate, None])),  # type: ignore[list-item]
        ("gate and up differ", lambda: program.norm_gated(x, norm, gate, head, "silu")),
        ("must be silu", lambda: program.norm_gated(x, norm, gate, gate, "swish")),
        ("x and up differ", lambda: program.activate(x, "relu", projected)),
        ("must be silu", lambda: program.activate(x, "", None)),
        ("must be above 0", lambda: program.soft_cap(x, 0.0)),
        ("takes the batch's positions", lambda: program.scale_by_position(x, "token_ids", scales)),
        ("the soft cap must be 0", lambda: program.attend(x, layer.kv, 1.0, -1.0, None, None)),
        ("query heads must be a multiple", lambda: program.attend(projected, layer.kv, 1.0, 0.0, None, None)),
        ("a sink for each query head", lambda: program.attend(x, layer.kv, 1.0, 0.0, None, np.zeros(3, np.float32))),
        ("k or v has a wrong shape", lambda: program.write_kv(layer.kv, x, x, "slot_mapping")),
        ("the table does not fit", lambda: program.rope(x, "positions", rope, 8)),
        ("it takes the batch's logit_rows", lambda: program.take_rows(x, "hidden_rows")),
        ("no multiple of head_dim", lambda: program.rope(x, "positions", rope, 7)),
        (
            "keys or values do not fit",
            lambda: program.norm_qkv(x, norm, gate, gate, gate, None, None, None, False, rope, layer.kv),
        ),
        (
            "as wide as neither a head nor all heads",
            lambda: program.norm_qkv(x, norm, query, key, value, narrow, None, None, False, None, layer.kv),
        ),
        ("no such value", lambda: program.finish(program.take_rows(x, "logit_rows"), [99])),
    ]
    for message, call in refused:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_step_is_checked_once_before_it_runs(program: _native.Program) -> None:
    ops = NativeOps(threads=1)
    layer = Layer(ops, "f16")
    step = ops.capture(layer.fused)
    good = batch_of([(0, 5), (3, 4)], np.random.default_rng(48), vocab_size=50, num_blocks=24)

    def replaced(name: str, array: IntArray) -> Batch:
        if name in ("slot_mapping", "block_tables"):
            return dataclasses.replace(good, groups=(dataclasses.replace(good.groups[0], **{name: array}),))
        changes: dict[str, Any] = {name: array}
        return dataclasses.replace(good, **changes)

    def array_of(name: str) -> IntArray:
        array: IntArray = getattr(good if hasattr(good, name) else good.groups[0], name)
        return array.copy()

    def changed(name: str, index: int, value: int) -> Batch:
        array = array_of(name)
        array.reshape(-1)[index] = value
        return replaced(name, array)

    for name, limit in (("token_ids", 50), ("positions", 300), ("slot_mapping", 24 * 32), ("logit_rows", 6)):
        for value in (-1, limit, 2**31 - 1):
            with pytest.raises(ValueError, match=r"Program|attend"):
                step(changed(name, 1, value))
    for name, limit in (("sequence_index", 2), ("block_tables", 24)):
        for value in (-1, limit):
            with pytest.raises(ValueError, match="attend"):
                step(changed(name, 0, value))
    for name, limit in (("kv_index", 32), ("kv_bounds", 33)):
        for value in (-1, limit, 2**31 - 1):
            with pytest.raises(ValueError, match="attend"):
                step(changed(name, 1, value))
    for name in ("positions", "kv_index", "kv_bounds", "slot_mapping", "sequence_index"):
        with pytest.raises(ValueError, match="one item a token"):
            step(replaced(name, array_of(name)[:-1]))
    assert np.isfinite(step(good)).all()
    with pytest.raises(ValueError, match="not finished"):
        program.run(
            good.token_ids, good.positions, good.kv_index, good.kv_bounds, good.sequence_index, good.logit_rows,
            [good.groups[0].arrays], np.empty((3, 41), np.float32), 0, 0, False,
        )  # fmt: skip


def test_a_program_keeps_what_it_needs_alive() -> None:
    """Weights, norms, tables and KV arrays that nobody else holds, and memory that others write to meanwhile."""
    ops = NativeOps(threads=2)
    batch = batch_of([(0, 9)], np.random.default_rng(49), vocab_size=50, num_blocks=24)
    step = ops.capture(Layer(ops, "f16").fused)
    wanted = step(batch)
    program, count = step._program, len(step.ops)
    del step
    gc.collect()
    others = [Layer(NativeOps(threads=1), "f16") for _ in range(8)]
    out = np.empty_like(wanted)
    program.run(
        batch.token_ids, batch.positions, batch.kv_index, batch.kv_bounds, batch.sequence_index,
        batch.logit_rows, [batch.groups[0].arrays], out, 0, count, False,
    )  # fmt: skip
    same_bits(out, wanted)
    assert others


def test_eager_ops_treat_what_is_subnormal_as_recorded_ones_do() -> None:
    ops = NativeOps()
    tiny = np.full((1, 8), 1e-40, np.float32)
    assert not ops.add(tiny, tiny).any()


@pytest.mark.parametrize("kv_dtype", ["f32", "f16", "int8", "k=int8,v=f16"])
def test_recorded_windows(kv_dtype: str) -> None:
    """Blocks behind the window belong to nobody: their entries may hold anything."""
    ops = NativeOps(threads=2)
    layer = Layer(ops, kv_dtype, window=40)
    rng = np.random.default_rng(50)
    batch = batch_of([(0, 300)], rng, vocab_size=50, num_blocks=24)
    step = ops.capture(layer.fused)
    same_bits(step(batch), layer.fused(ops, batch))
    later = batch_of([(299, 300)], np.random.default_rng(50), vocab_size=50, num_blocks=24)
    tables = later.groups[0].block_tables.copy()
    tables[:, : (300 - 40) // BLOCK_SIZE] = -1
    same_bits(
        step(dataclasses.replace(later, groups=(dataclasses.replace(later.groups[0], block_tables=tables),))),
        layer.fused(ops, later),
    )
