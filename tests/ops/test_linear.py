"""Weights times activations: both backends against the integer arithmetic that the formats and the spec define."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from gguf_files import FLOAT_TYPES, WEIGHT_TYPES
from kvik.config import ActivationDType
from kvik.ops.base import Linear, Ops
from kvik.ops.native import NativeOps
from kvik.ops.reference import ReferenceOps, quantize_activations
from looped import looped
from ops.arrangement import FloatArray, Matrix, WideArray, random_weights
from tiers import TESTED_TYPES

UNIT = 2.0**-24
LEVELS: dict[ActivationDType, float] = {"int8": 127.0, "int16": 32384.0}

pytestmark = pytest.mark.sanitize

every_type = looped("kind", TESTED_TYPES, lambda kind: kind.name)


@pytest.fixture(params=["int8", "int16"])
def activations(request: pytest.FixtureRequest) -> ActivationDType:
    name: ActivationDType = request.param
    return name


@pytest.fixture(params=["native", "reference"])
def ops(request: pytest.FixtureRequest, activations: ActivationDType) -> Ops:
    return NativeOps(activations, threads=2) if request.param == "native" else ReferenceOps(activations)


def quantized(x: FloatArray, levels: float) -> tuple[WideArray, WideArray]:
    """x as whole multiples of max|group| / levels, in float64, and the value of one such quantum where it is in doubt.

    The number of quanta is rounded; float32 may find it on the other side of a half when it lies within a few units of
    one, by its own size.
    """
    groups = x.astype(np.float64).reshape(len(x), x.shape[1] // 32, 32)
    largest = abs(groups).max(axis=-1, keepdims=True)
    scale = np.where(largest > 1e-30, largest / levels, 0)
    quanta = np.divide(groups, scale, out=np.zeros_like(groups), where=scale > 0)
    near_half = abs(abs(quanta - np.trunc(quanta)) - 0.5) <= 6 * UNIT * abs(quanta)
    return (np.rint(quanta) * scale).reshape(x.shape), np.where(near_half, scale, 0).reshape(x.shape)


def expected(x: FloatArray, weight: Matrix, levels: float) -> tuple[WideArray, WideArray]:
    """x @ weight.T in float64 with the activations that the kernels see, and the error allowed.

    A fused multiply-add is off by half a unit of the sum it leaves. Float formats make one for each column. Quantised
    ones make two for each group of 16 or 32 columns, whose integers are exact: scale times dot product, and minimum
    (at most three times the largest weight of the group) times the sum of the activations; the factors are rounded too.
    """
    w = weight.values.astype(np.float64)
    seen, doubt = quantized(x, levels) if weight.quantized else (x.astype(np.float64), np.zeros(x.shape))
    step = 16 if weight.quantized else 1
    groups = seen.reshape(len(x), x.shape[1] // step, step)
    parts = w.reshape(len(w), -1, step)
    terms = np.einsum("tgk,rgk->trg", groups, parts, optimize=True)
    rounded = 2 * abs(terms.cumsum(axis=2)).sum(axis=2)
    if weight.quantized:
        minima = 3 * abs(groups.sum(axis=2)) @ abs(parts).max(axis=2).T
        rounded += 3 * abs(terms).sum(axis=2) + 6 * minima + abs(seen) @ abs(w).T
    smallest = 2.0**-126 * (x.shape[1] + 2 + abs(w).sum(axis=1))  # what is subnormal counts as zero
    bound: WideArray = UNIT * rounded + doubt @ abs(w).T + smallest
    return seen @ w.T, bound


def check(ops: Ops, x: FloatArray, weights: list[Matrix], levels: float) -> None:
    outs = ops.project(x, [weight.linear(ops) for weight in weights])
    assert len(outs) == len(weights)
    for out, weight in zip(outs, weights, strict=True):
        y = ops.to_numpy(out)
        wanted, bound = expected(x, weight, levels)
        assert y.shape == wanted.shape
        assert y.dtype == np.float32
        assert (abs(y - wanted) <= bound).all()


@every_type
@pytest.mark.parametrize("rows", [1, 8, 9, 33])
def test_odd_numbers_of_rows_and_tokens(
    ops: Ops, activations: ActivationDType, kind: GGMLQuantizationType, rows: int
) -> None:
    rng = np.random.default_rng(rows)
    weight = random_weights(kind, rows, 256 * int(rng.integers(1, 4)), rng)
    for num_tokens in (1, 2, 3, 4, 5, 7, 66):
        x = rng.normal(0, 1, (num_tokens, weight.values.shape[1])).astype(np.float32)
        check(ops, x, [weight], LEVELS[activations])


@every_type
def test_no_rows_where_no_logits_are_wanted(ops: Ops, kind: GGMLQuantizationType) -> None:
    """A step that ends inside a prompt asks for none."""
    weight = random_weights(kind, 9, 256, np.random.default_rng(11)).linear(ops)
    assert ops.linear(np.zeros((0, 256), np.float32), weight).shape == (0, 9)


@every_type
def test_few_columns(ops: Ops, activations: ActivationDType, kind: GGMLQuantizationType) -> None:
    rng = np.random.default_rng(0)
    for columns in (1, 7, 33) if kind in FLOAT_TYPES else (GGML_QUANT_SIZES[kind][0],):
        weight = random_weights(kind, 17, columns, rng)
        check(ops, rng.normal(0, 1, (5, columns)).astype(np.float32), [weight], LEVELS[activations])


@every_type
def test_several_hundred_rows_and_tokens(ops: Ops, activations: ActivationDType, kind: GGMLQuantizationType) -> None:
    rng = np.random.default_rng(1)
    weight = random_weights(kind, 301, 256, rng, std=0.05)
    check(ops, rng.normal(0, 3, (67, 256)).astype(np.float32), [weight], LEVELS[activations])


@every_type
@pytest.mark.parametrize("size", [1e4, 1e-20])
def test_values_large_and_tiny(ops: Ops, activations: ActivationDType, kind: GGMLQuantizationType, size: float) -> None:
    rng = np.random.default_rng(2)
    weight = random_weights(kind, 20, 256, rng)
    check(ops, rng.normal(0, size, (5, 256)).astype(np.float32), [weight], LEVELS[activations])


@every_type
def test_one_outlier_in_each_group_hides_the_others(
    ops: Ops, activations: ActivationDType, kind: GGMLQuantizationType
) -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(0, 1, (6, 512)).astype(np.float32)
    outliers = np.arange(0, 512, 32) + rng.integers(0, 32, 16)
    x[:, outliers] = rng.choice([-1e4, 1e4], (6, 16))
    check(ops, x, [random_weights(kind, 20, 512, rng)], LEVELS[activations])


@every_type
def test_zeros_and_what_is_too_small_for_a_scale(
    ops: Ops, activations: ActivationDType, kind: GGMLQuantizationType
) -> None:
    """Rows of zeros, groups of zeros among others, and groups below 1e-30, which quantised weights see as zeros."""
    rng = np.random.default_rng(4)
    weight = random_weights(kind, 20, 256, rng)
    x = rng.normal(0, 1, (5, 256)).astype(np.float32)
    x[0] = 0
    x[1, 32:96] = 0
    x[2] *= 1e-38
    x[3, 64:128] *= 1e-38
    check(ops, x, [weight], LEVELS[activations])
    if weight.quantized:
        y = ops.to_numpy(ops.linear(x, weight.linear(ops)))
        assert not y[[0, 2]].any()


@pytest.mark.tiny
def test_whole_numbers_of_quanta_are_exact(ops: Ops, activations: ActivationDType) -> None:
    """Activations that quantise without loss and a scale of 1: the result is an integer below 2**24, so no rounding."""
    rng = np.random.default_rng(5)
    levels = int(LEVELS[activations])
    quants = rng.integers(-127, 128, (9, 256), dtype=np.int8)
    quants[0] = -128  # the code that has no positive twin
    blocks = np.zeros((9, 8, 34), np.uint8)
    blocks[:, :, :2] = np.asarray([1.0], np.float16).view(np.uint8)
    blocks[:, :, 2:] = quants.reshape(9, 8, 32).view(np.uint8)
    x = rng.integers(-40, 41, (5, 256)).astype(np.float32)
    x[:, ::32] = levels * rng.choice([-1, 1], (5, 8))
    weight = ops.load_weight("Q8_0", blocks.reshape(-1), 9, 256)
    wanted = x.astype(np.int64) @ quants.astype(np.int64).T
    # With int8 activations the sums stay far below 2**24; int16 ones may round in their last bits.
    np.testing.assert_allclose(ops.linear(x, Linear(weight)), wanted, rtol=0, atol=0 if activations == "int8" else 4)


@every_type
def test_int16_activations_are_close_to_none_at_all(kind: GGMLQuantizationType) -> None:
    """The promise of the int16 setting: within 1/32384 of the largest activation of each group."""
    rng = np.random.default_rng(6)
    weight = random_weights(kind, 40, 512, rng)
    x = rng.normal(0, 1, (7, 512)).astype(np.float32)
    ops = NativeOps("int16", threads=1)
    plain = x.astype(np.float64) @ weight.values.astype(np.float64).T
    half_quantum = 0.51 * abs(x).max() / 32384
    error = abs(ops.linear(x, weight.linear(ops)) - plain)
    assert error.max() <= half_quantum * abs(weight.values).sum(axis=1).max() + 1e-4 * weight.quantized
    assert error.mean() < 1e-3


def test_reference_quantises_as_stated(activations: ActivationDType) -> None:
    rng = np.random.default_rng(7)
    x = rng.normal(0, 1, (50, 96)).astype(np.float32)
    wanted, doubt = quantized(x, LEVELS[activations])
    seen = quantize_activations(x, activations)
    assert (abs(seen - wanted) <= doubt + 2 * UNIT * abs(wanted)).all()
    assert np.count_nonzero(doubt) < 0.05 * x.size


@pytest.mark.parametrize("seed", range(4))
def test_several_weights_at_once_give_what_each_gives_alone(ops: Ops, seed: int) -> None:
    """Mixed types and heights, as one layer's q, k and v may be."""
    rng = np.random.default_rng(seed)
    kinds = [WEIGHT_TYPES[index] for index in rng.integers(0, len(WEIGHT_TYPES), 4)]
    weights = [random_weights(kind, int(rng.integers(1, 60)), 256, rng) for kind in kinds]
    x = rng.normal(0, 1, (int(rng.integers(1, 20)), 256)).astype(np.float32)
    loaded = [weight.linear(ops) for weight in weights]
    together = ops.project(x, loaded)
    for weight, out in zip(loaded, together, strict=True):
        np.testing.assert_array_equal(out, ops.linear(x, weight))
    assert ops.project(x, []) == ()


@every_type
def test_a_weight_says_its_shape(ops: Ops, kind: GGMLQuantizationType) -> None:
    weight = random_weights(kind, 9, 256, np.random.default_rng(9)).load(ops)
    assert (weight.rows, weight.columns) == (9, 256)
    assert weight.num_bytes > 0


def test_the_bound_sees_one_wrong_scale() -> None:
    """The judge judged: one of 16 groups of one row scaled by 1.005, or one token taken for its neighbour, is found."""
    rng = np.random.default_rng(10)
    for kind in WEIGHT_TYPES:
        weight = random_weights(kind, 16, 512, rng)
        x = rng.normal(0, 1, (8, 512)).astype(np.float32)
        wanted, bound = expected(x, weight, 127.0)
        wrong = weight.values.astype(np.float64)
        wrong[3, 64:96] *= 1.005
        seen = quantized(x, 127.0)[0] if weight.quantized else x
        assert (abs(seen @ wrong.T - wanted) > bound)[:, 3].sum() >= 6, kind.name
        assert (abs(np.roll(wanted, 1, axis=0) - wanted) > bound).mean() > 0.99
