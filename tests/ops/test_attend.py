"""Attention and the cache below it: both backends against attention written out in float64."""

from __future__ import annotations

import dataclasses
from typing import cast

import numpy as np
import pytest

from kvik.cache import KVCacheSpec
from kvik.config import KVDType, parse_kv_dtype
from kvik.ops.base import AttentionRule, Batch, KVIndex, Ops
from kvik.ops.native import NativeOps
from kvik.ops.reference import ReferenceOps
from looped import looped
from ops.arrangement import KV_DTYPES, FloatArray, Heads, History, WideArray, random_history

UNIT = 2.0**-24  # half a unit in the last place of 1.0: what rounding one float32 result may lose

QUERIES_PER_KV = (1, 2, 3, 4, 5, 8)
HEAD_DIMS = (8, 16, 40, 64, 80, 128, 256)
# Both sides of a block's and a segment's edge, one and two segments back.
POSITIONS = (0, 1, 31, 32, 254, 255, 256, 257, 300, 511, 512, 540)

WINDOWS = (1, 31, 32, 33, 255, 256, 257, None)

pytestmark = pytest.mark.sanitize

every_kv_type = looped("dtype", KV_DTYPES)


@pytest.fixture(params=["native", "reference"])
def ops(request: pytest.FixtureRequest) -> Ops:
    return NativeOps(threads=2) if request.param == "native" else ReferenceOps()


def as_stored(x: FloatArray, dtype: KVDType) -> WideArray:
    """Keys or values (..., head_dim) as the cache keeps them; int8 rounds to whole multiples of max|row| / 127."""
    if dtype != "int8":
        return x.astype(np.float16 if dtype == "f16" else np.float32).astype(np.float64)
    largest = abs(x).max(axis=-1, keepdims=True)
    inverse = np.where(largest > 1e-30, np.float32(127) / np.maximum(largest, np.float32(1e-30)), np.float32(0))
    return np.rint(x * inverse).astype(np.float64) * scale_of(x)[..., None]


def scale_of(x: FloatArray) -> WideArray:
    """What one step of an int8 key or value (..., head_dim) stands for."""
    largest = abs(x).max(axis=-1)
    return np.where(largest > 1e-30, largest / np.float32(127), 0).astype(np.float64)


def expected(
    history: History,
    dtype: str,
    sequence: int,
    position: int,
    window: int | None = None,
    sinks: FloatArray | None = None,
) -> tuple[WideArray, WideArray]:
    """One token's attention (num_heads, head_dim) in float64, and how far float32 arithmetic may be from it.

    A score adds head_dim products and is scaled: it is off by at most (head_dim + 4) units of the sum of |q k|. That
    and the rounding of the exponent and of e**x move a weight by the relative `slack`. A value adds position + 1 terms.
    With int8 a query is rounded to 32,639 steps of its largest dimension, and a segment's weights times scales to as
    many steps of their largest: each is off by at most half a step.
    """
    group = history.heads.num_heads // history.heads.num_kv_heads
    seen = np.arange(0 if window is None else max(0, position - window + 1), position + 1)
    k, v = (arrays[sequence][seen] for arrays in (history.k, history.v))
    key_dtype, value_dtype = (cast(KVDType, one) for one in parse_kv_dtype(dtype))
    stored = as_stored(k, key_dtype), as_stored(v, value_dtype)
    keys, values = (x.repeat(group, axis=1) for x in stored)  # (tokens seen, num_heads, head_dim)
    q = history.q[sequence][position].astype(np.float64)
    scale = 1 / np.sqrt(history.heads.head_dim)
    scores = np.einsum("hd,thd->ht", q, keys) * scale
    score_error = (history.heads.head_dim + 4) * UNIT * np.einsum("hd,thd->ht", abs(q), abs(keys)) * scale
    half_step = 0.5 / 32639 * 1.001
    if key_dtype == "int8":
        score_error += half_step * abs(q).max(axis=1)[:, None] * abs(keys).sum(axis=2).T * scale
    if sinks is not None:  # a token more, whose score is exact and whose value is nothing
        scores, score_error = np.column_stack([scores, sinks]), np.column_stack([score_error, 0 * sinks])
        values = np.concatenate([values, np.zeros_like(values[:1])])
    below_top = scores.max(axis=1, keepdims=True) - scores
    weights = np.exp(-below_top)
    weights /= weights.sum(axis=1, keepdims=True)
    out = np.einsum("ht,thd->hd", weights, values)
    slack = score_error + score_error.max(axis=1, keepdims=True) + (below_top + 8) * UNIT
    bound = np.einsum("ht,thd->hd", weights * slack, abs(values - out))
    bound += (position + 32) * UNIT * np.einsum("ht,thd->hd", weights, abs(values))
    if value_dtype == "int8":
        weights, values = weights[:, : len(seen)], values[: len(seen)]
        scales = scale_of(v).repeat(group, axis=1)  # (tokens seen, num_heads)
        steps = abs(values) / np.maximum(scales, 1e-300)[..., None]
        for segment in np.unique(seen // 256):
            inside = seen // 256 == segment
            largest = (weights[:, inside] * scales[inside].T).max(axis=1)
            bound += half_step * largest[:, None] * steps[inside].sum(axis=0) * (1 + 2 * slack.max())
    return out, bound


def check(
    ops: Ops,
    history: History,
    dtype: str,
    tokens: list[tuple[int, int]],
    window: int | None = None,
    sinks: FloatArray | None = None,
) -> None:
    """Attend at (sequence, position) pairs, all in one batch, and compare each."""
    kv = history.allocate(ops, dtype)
    history.write(ops, kv, history.everything)
    chunks = [(sequence, position, position + 1) for sequence, position in tokens]
    outs = history.attend(ops, kv, chunks, window, sinks)
    for out, (sequence, position) in zip(outs, tokens, strict=True):
        wanted, bound = expected(history, dtype, sequence, position, window, sinks)
        assert (abs(out - wanted) <= bound).all(), f"sequence {sequence}, position {position}"
        # The bound is of use only where it is far below the values themselves.
        assert bound.max() < 0.02 * abs(wanted).max()


@every_kv_type
@looped("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("queries_per_kv", QUERIES_PER_KV)
def test_every_queries_per_kv_and_head_dim(ops: Ops, queries_per_kv: int, head_dim: int, dtype: str) -> None:
    rng = np.random.default_rng(1000 * queries_per_kv + head_dim)
    num_kv_heads = int(rng.integers(1, 4))
    history = random_history(Heads(queries_per_kv * num_kv_heads, num_kv_heads, head_dim), [45, 300], rng)
    check(ops, history, dtype, [(1, 299), (0, 44), (1, 256), (0, 0), (1, 255)])


@pytest.mark.tiny
@every_kv_type
@looped("sharpness", [0.0, 1.0, 30.0])
def test_positions_on_both_sides_of_every_edge(ops: Ops, sharpness: float, dtype: str) -> None:
    """Weights that are all equal, ordinary ones, and ones where few tokens take all."""
    rng = np.random.default_rng(7)
    history = random_history(Heads(6, 2, 16), [541, 541, 33], rng, sharpness=sharpness)
    tokens = [(int(rng.integers(0, 2)), position) for position in POSITIONS]
    check(ops, history, dtype, [*tokens, (2, 32)])


@looped("value_std", [1e4, 1e-20])
def test_values_large_and_tiny(ops: Ops, value_std: float) -> None:
    rng = np.random.default_rng(8)
    history = random_history(Heads(3, 1, 24), [270], rng, value_std=value_std)
    check(ops, history, "f32", [(0, 0), (0, 31), (0, 269)])


def test_one_key_far_above_the_rest_takes_everything(ops: Ops) -> None:
    """Scores in the thousands, whose powers of e float32 cannot hold."""
    rng = np.random.default_rng(9)
    history = random_history(Heads(2, 1, 16), [300], rng)
    winner = 17
    history.q[0][299] = 100 * history.k[0][winner]
    history.k[0][winner] *= 100
    kv = history.allocate(ops, "f32")
    history.write(ops, kv, history.everything)
    out = history.attend(ops, kv, [(0, 299, 300)])[0]
    np.testing.assert_allclose(out, history.v[0][winner].repeat(2, axis=0), rtol=1e-6)


@looped("dtype", ["f32", "f16"])
def test_the_first_token_sees_its_own_value_as_stored(ops: Ops, dtype: str) -> None:
    """A softmax over one token is 1, so this reads the cache: float16 rounds to the nearest even, like NumPy's."""
    rng = np.random.default_rng(10)
    history = random_history(Heads(2, 2, 64), [1], rng)
    history.v[0][0] = np.concatenate(
        [
            rng.normal(0, 10.0 ** rng.integers(-9, 5, 64)),
            (1 + np.arange(32) * 2.0**-12) * rng.choice([-1, 1], 32),  # ties between two float16 numbers
            np.arange(-16, 16) * 2.0**-25,  # subnormal, ties as well
        ]
    ).reshape(2, 64)
    kv = history.allocate(ops, dtype)
    history.write(ops, kv, history.everything)
    stored = np.float16 if dtype == "f16" else np.float32
    with np.errstate(over="ignore"):
        wanted = history.v[0].astype(stored).astype(np.float32)
    np.testing.assert_array_equal(history.attend(ops, kv, history.everything), wanted)


def test_a_slot_written_again_holds_the_new_token(ops: Ops) -> None:
    history = random_history(Heads(2, 1, 8), [40], np.random.default_rng(11))
    kv = history.allocate(ops, "f32")
    history.write(ops, kv, history.everything)
    history.k[0][35] += 1
    history.v[0][35] -= 1
    history.write(ops, kv, [(0, 35, 36)])
    wanted, bound = expected(history, "f32", 0, 39)
    assert (abs(history.attend(ops, kv, [(0, 39, 40)])[0] - wanted) <= bound).all()


def test_what_lies_in_slots_that_a_token_may_not_see_is_nothing_to_it(ops: Ops) -> None:
    """Later positions of its own blocks and blocks of others hold infinities and NaNs left by someone else."""
    history = random_history(Heads(4, 2, 40), [300], np.random.default_rng(12))
    kv = history.allocate(ops, "f32")
    every_slot = np.arange(history.num_blocks * 32, dtype=np.int32)
    shape = (len(every_slot), 2, 40)
    for garbage in (np.nan, np.inf):
        ops.write_kv(kv, np.full(shape, garbage, np.float32), np.full(shape, garbage, np.float32), every_slot)
    for start, stop in ((0, 50), (50, 259)):
        history.write(ops, kv, [(0, start, stop)])
        wanted, bound = expected(history, "f32", 0, stop - 1)
        assert (abs(history.attend(ops, kv, [(0, stop - 1, stop)])[0] - wanted) <= bound).all()


def test_no_tokens_at_all(ops: Ops) -> None:
    kv = ops.allocate_kv(KVCacheSpec.uniform(1, 2, 16, "f16"), 8)[0]
    none = np.zeros(0, np.int32)
    empty = np.zeros((0, 2, 16), np.float32)
    ops.write_kv(kv, empty, empty, none)
    batch = Batch.in_blocks(none, none, none, np.zeros((1, 1), np.int32), none)
    assert ops.attend(np.zeros((0, 6, 16), np.float32), kv, batch).shape == (0, 6, 16)


def test_layers_do_not_share_memory(ops: Ops) -> None:
    history = random_history(Heads(1, 1, 8), [5], np.random.default_rng(13))
    layers = ops.allocate_kv(KVCacheSpec.uniform(3, 1, 8, "f32"), history.num_blocks)
    assert len(layers) == 3
    history.write(ops, layers[1], history.everything)
    before = history.attend(ops, layers[1], history.everything)
    history.v[0][:] = 9.0
    for other in (layers[0], layers[2]):
        history.write(ops, other, history.everything)
    np.testing.assert_array_equal(history.attend(ops, layers[1], history.everything), before)


@every_kv_type
@looped("window", WINDOWS)
def test_a_window_of_any_size(ops: Ops, window: int | None, dtype: str) -> None:
    """At every edge; the positions in a row are one tile, whose queries see different first and last tokens."""
    history = random_history(Heads(3, 1, 24), [541, 541], np.random.default_rng(14), sharpness=2.0)
    in_a_row = [(1, position) for position in (*range(250, 261), *range(505, 541))]
    check(ops, history, dtype, [*((0, position) for position in POSITIONS), *in_a_row], window)


@every_kv_type
@looped("window", WINDOWS)
def test_a_sink_takes_its_share_and_gives_nothing(ops: Ops, window: int | None, dtype: str) -> None:
    """Of sinks below all scores, among them and above: the last takes nearly all, the first nothing that shows."""
    history = random_history(Heads(6, 2, 24), [541, 541], np.random.default_rng(22), sharpness=2.0)
    in_a_row = [(1, position) for position in (*range(250, 261), *range(505, 541))]
    sinks = np.asarray([-50, 0, 3, 1.5, -1, 8], np.float32)
    check(ops, history, dtype, [*((0, position) for position in POSITIONS), *in_a_row], window, sinks)


def test_a_sink_far_above_all_scores_leaves_nothing_and_one_far_below_changes_nothing(ops: Ops) -> None:
    history = random_history(Heads(2, 1, 16), [300], np.random.default_rng(23))
    kv = history.allocate(ops, "f32")
    history.write(ops, kv, history.everything)
    plain = history.attend(ops, kv, [(0, 250, 300)])
    out = history.attend(ops, kv, [(0, 250, 300)], sinks=np.asarray([1e4, -1e4], np.float32))
    assert abs(out[:, 0]).max() < 1e-30
    np.testing.assert_allclose(out[:, 1], plain[:, 1], rtol=0, atol=2e-7)


@pytest.mark.parametrize("seeds", [range(8), pytest.param(range(8, 40), marks=pytest.mark.full)], ids=str)
def test_shapes_by_chance(ops: Ops, seeds: range) -> None:
    for seed in seeds:
        check_shape_by_chance(ops, seed)


def check_shape_by_chance(ops: Ops, seed: int) -> None:
    """Groups that fill no register evenly, head sizes with a rest of eight, a prompt's chunk beside single tokens."""
    rng = np.random.default_rng(seed)
    queries_per_kv = int(rng.choice([*range(1, 13), 71, 128]))
    num_kv_heads = int(rng.integers(1, 4)) if queries_per_kv < 20 else 1
    heads = Heads(queries_per_kv * num_kv_heads, num_kv_heads, 8 * int(rng.integers(1, 33)))
    lengths = [int(rng.integers(1, 40)), int(rng.integers(257, 600))]
    history = random_history(heads, lengths, rng, sharpness=float(rng.choice([0.5, 2.0])))
    dtype, window = KV_DTYPES[seed % len(KV_DTYPES)], WINDOWS[int(rng.integers(len(WINDOWS)))]
    kv = history.allocate(ops, dtype)
    history.write(ops, kv, history.everything)
    start = int(rng.integers(0, lengths[1]))
    chunks = [(0, lengths[0] - 1, lengths[0]), (1, start, min(start + 70, lengths[1]))]
    outs = history.attend(ops, kv, chunks, window)
    tokens = [(sequence, position) for sequence, first, last in chunks for position in range(first, last)]
    for index in {0, 1, len(tokens) - 1, *rng.integers(0, len(tokens), 4).tolist()}:
        sequence, position = tokens[index]
        wanted, bound = expected(history, dtype, sequence, position, window)
        assert (abs(outs[index] - wanted) <= bound).all(), f"{heads}, {dtype}, window {window}, {tokens[index]}"


@every_kv_type
def test_what_lies_behind_a_window_is_neither_read_nor_asked_for(ops: Ops, dtype: str) -> None:
    """The blocks went to someone else: their places in the table hold no block, the first visible one's rest NaN."""
    history = random_history(Heads(3, 1, 16), [600], np.random.default_rng(15))
    window = 40
    kv = history.allocate(ops, dtype)
    nothing = np.full((history.num_blocks * 32, 1, 16), np.nan, np.float32)
    ops.write_kv(kv, nothing, nothing, np.arange(history.num_blocks * 32, dtype=np.int32))
    history.write(ops, kv, [(0, 500, 600)])
    wanted = [expected(history, dtype, 0, position, window) for position in (550, 551, 599)]
    history.block_tables[0, : (550 - window + 1) // 32] = -1
    for start, stop, (value, bound) in ((550, 551, wanted[0]), (551, 552, wanted[1]), (570, 600, wanted[2])):
        out = history.attend(ops, kv, [(0, start, stop)], window)[-1]
        assert (abs(out - value) <= bound).all()


def stored_value(ops: Ops, v: FloatArray) -> FloatArray:
    """A value (head_dim,) as an int8 cache gives it back: a softmax over one token is 1."""
    history = random_history(Heads(1, 1, len(v)), [1], np.random.default_rng(16))
    history.v[0][0, 0] = v
    kv = history.allocate(ops, "int8")
    history.write(ops, kv, history.everything)
    found: FloatArray = history.attend(ops, kv, history.everything)[0, 0]
    return found


def test_an_int8_value_is_a_whole_multiple_of_its_scale(ops: Ops) -> None:
    """One segment's weight is rounded too, but its largest is 32,639 steps of itself: only float32 rounding is left."""
    v = np.random.default_rng(17).normal(0, 1, 64).astype(np.float32)
    v[5] = 12.7
    np.testing.assert_allclose(stored_value(ops, v), np.rint(v * np.float32(127) / v[5]) * 0.1, rtol=1e-6)


@looped("size", [0.0, -0.0, 1e-45, 1e-38, 1e-31])
def test_what_is_too_small_for_a_scale_is_zero(ops: Ops, size: float) -> None:
    assert (stored_value(ops, np.full(24, size, np.float32)) == 0).all()


def test_a_huge_outlier_leaves_nothing_of_the_rest(ops: Ops) -> None:
    v = np.ones(24, np.float32)
    v[7] = -3e38
    found = stored_value(ops, v)
    np.testing.assert_allclose(found[7], -3e38, rtol=1e-6)
    assert (np.delete(found, 7) == 0).all()


@every_kv_type
@looped("bad", [np.nan, np.inf, -np.inf])
@looped("where", ["q", "k", "v"])
def test_what_is_no_number_does_not_vanish(ops: Ops, where: str, bad: float, dtype: str) -> None:
    """In a token of an earlier segment: its head's output is no number either, where the score is not minus infinity.

    The token before it sees nothing of it.
    """
    history = random_history(Heads(2, 2, 16), [300], np.random.default_rng(18))
    position = 299 if where == "q" else 200
    {"q": history.q, "k": history.k, "v": history.v}[where][0][position, 1, 3] = bad
    if where == "k":
        history.q[0][:, 1, 3] = abs(history.q[0][:, 1, 3]) * np.sign(bad if np.isinf(bad) else 1)
    kv = history.allocate(ops, dtype)
    with np.errstate(invalid="ignore"):
        history.write(ops, kv, history.everything)
        outs = history.attend(ops, kv, [(0, 150, 300)])
        assert np.isfinite(outs[: 199 - 150]).all()
        assert np.isfinite(outs[:, 0]).all()
        assert not np.isfinite(outs[-1, 1]).all()


@pytest.mark.parametrize("window", [None, 70])
def test_a_token_sees_up_to_its_bound_wherever_it_stands(window: int | None) -> None:
    """The tokens of an image see each other; where blocks were dropped, places are fewer than positions."""
    history = random_history(Heads(4, 2, 24), [300, 520], np.random.default_rng(16))
    chunks = [(0, 90, 130), (1, 250, 300), (1, 500, 503)]
    q, text = np.concatenate([history.q[row][start:stop] for row, start, stop in chunks]), history.batch(chunks)
    bounds = np.concatenate([np.full(stop - start, stop, np.int32) for _, start, stop in chunks])
    batch = dataclasses.replace(text, positions=text.positions + np.int32(1000), kv_bounds=bounds)
    outs = []
    for ops in (NativeOps(threads=2), ReferenceOps()):
        kv = history.allocate(ops, "f32")
        history.write(ops, kv, history.everything)
        outs.append(ops.to_numpy(ops.attend(q, kv, batch, AttentionRule(window=window))))
        one_by_one = [
            ops.to_numpy(ops.attend(q[at : at + 1], kv, only(batch, at), AttentionRule(window=window)))
            for at in range(len(q))
        ]
        np.testing.assert_array_equal(np.concatenate(one_by_one).view(np.uint32), outs[-1].view(np.uint32))
    np.testing.assert_allclose(outs[0], outs[1], rtol=0, atol=2e-6)


def only(batch: Batch, at: int) -> Batch:
    """One token of a batch."""
    one = slice(at, at + 1)
    return dataclasses.replace(
        batch,
        token_ids=batch.token_ids[one],
        positions=batch.positions[one],
        kv_index=batch.kv_index[one],
        kv_bounds=batch.kv_bounds[one],
        sequence_index=batch.sequence_index[one],
        groups=tuple(KVIndex(group.slot_mapping[one], group.block_tables) for group in batch.groups),
    )
