"""The ops between the matrices: both backends against formulas in float64."""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType

from kvik.models.spec import RopeSpec
from kvik.ops.base import XIELU, Linear, Nonlinearity, Norm, Ops, PositionScales
from kvik.ops.native import NativeOps
from kvik.ops.reference import ReferenceOps
from looped import looped
from ops.arrangement import FloatArray, random_weights
from tiers import TESTED_TYPES

WideArray = npt.NDArray[np.float64]
NONLINEARITIES: tuple[Nonlinearity, ...] = get_args(Nonlinearity)

UNIT = 2.0**-24
TINIEST = 2.0**-126  # the smallest normal number: below it, results lose bits

pytestmark = pytest.mark.sanitize

SHAPES = [(0, 8), (1, 1), (1, 576), (2, 7), (5, 33), (16, 64), (17, 96), (130, 129), (300, 40)]
SIZES = [1.0, 1e4, 1e-20, 0.0]


@pytest.fixture(params=["native", "reference"])
def ops(request: pytest.FixtureRequest) -> Ops:
    return NativeOps(threads=2) if request.param == "native" else ReferenceOps()


def normal(rng: np.random.Generator, *shape: int, size: float = 1.0) -> FloatArray:
    return (rng.normal(0, 1, shape) * size).astype(np.float32)


@looped("kind", TESTED_TYPES, lambda kind: kind.name)
def test_embed_gives_rows_of_the_table(ops: Ops, kind: GGMLQuantizationType) -> None:
    rng = np.random.default_rng(0)
    table = random_weights(kind, 37, 256, rng)
    for num_tokens in (0, 1, 40):
        token_ids = rng.integers(0, 37, num_tokens, dtype=np.int32)
        np.testing.assert_array_equal(ops.to_numpy(ops.embed(table.load(ops), token_ids)), table.values[token_ids])


@looped("kind", TESTED_TYPES, lambda kind: kind.name)
def test_a_mapped_table_has_the_rows_of_a_packed_one(ops: Ops, kind: GGMLQuantizationType) -> None:
    rng = np.random.default_rng(0)
    made = random_weights(kind, 37, 256, rng)
    odd = np.zeros(made.blocks.size + 1, np.uint8)[1:]  # tensors of a file lie at any byte
    odd[:] = made.blocks.reshape(-1)
    table, packed = ops.map_rows(kind.name, odd, 37, 256), made.load(ops)
    assert (table.rows, table.columns, table.num_bytes) == (37, 256, len(odd))
    for num_tokens in (0, 1, 40):
        token_ids = rng.integers(0, 37, num_tokens, dtype=np.int32)
        found, wanted = (ops.to_numpy(ops.embed(one, token_ids, 0.3)) for one in (table, packed))
        np.testing.assert_array_equal(found, wanted)


@looped("size", SIZES)
@looped("shape", SHAPES)
def test_rms_norm(ops: Ops, shape: tuple[int, int], size: float) -> None:
    """The mean square adds n / 8 squares a lane and 8 lanes; then a root, a quotient and two products."""
    rng = np.random.default_rng(shape[1])
    x, weight = normal(rng, *shape, size=size), normal(rng, shape[1])
    for eps in (1e-5, 1e-6, 0.5):
        out = ops.to_numpy(ops.norm(x, Norm(weight, eps)))
        wide = x.astype(np.float64)
        wanted = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + eps) * weight
        assert out.shape == shape
        assert out.dtype == np.float32
        assert (abs(out - wanted) <= (shape[1] / 8 + 16) * UNIT * abs(wanted) + TINIEST).all()


@looped("has_bias", [True, False])
@looped("size", SIZES)
@looped("shape", SHAPES)
def test_layer_norm(ops: Ops, shape: tuple[int, int], size: float, has_bias: bool) -> None:
    """The mean is off by n / 8 + 8 units of the largest |x|: so are all differences from it, and their mean square."""
    rng = np.random.default_rng(shape[1] + 7)
    x, weight = normal(rng, *shape, size=size), normal(rng, shape[1])
    bias = normal(rng, shape[1]) if has_bias else None
    out = ops.to_numpy(ops.norm(x, Norm(weight, 1e-5, bias, "layer")))
    wide = x.astype(np.float64)
    centered = wide - wide.mean(axis=1, keepdims=True)
    deviation = np.sqrt((centered**2).mean(axis=1, keepdims=True) + 1e-5)
    wanted = centered / deviation * weight + (0 if bias is None else bias)
    steps = shape[1] / 8 + 16
    relative = steps * UNIT * abs(wide).max(axis=1, keepdims=True) / deviation
    slack = (abs(centered) / deviation + 1) * abs(weight) * (relative + steps * UNIT) + UNIT * abs(wanted)
    assert out.shape == shape
    assert out.dtype == np.float32
    assert (abs(out - wanted) <= slack + TINIEST).all()


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_a_norm_of_heads_is_a_norm_of_each(ops: Ops, kind: Literal["rms", "layer"]) -> None:
    rng = np.random.default_rng(8)
    x, norm = normal(rng, 5, 3 * 24), Norm(normal(rng, 24), 1e-6, None, kind)
    out = ops.to_numpy(ops.norm(x, norm))
    assert out.shape == x.shape
    for head in range(3):
        part = np.ascontiguousarray(x[:, 24 * head : 24 * head + 24])
        np.testing.assert_array_equal(out[:, 24 * head : 24 * head + 24], ops.to_numpy(ops.norm(part, norm)))


@looped("size", [*SIZES, 30.0])
@looped("shape", SHAPES)
def test_silu(ops: Ops, shape: tuple[int, int], size: float) -> None:
    """e**-x is right to a unit or two and an argument's rounding, |x| units; past e**88 the quotient is nearly zero."""
    rng = np.random.default_rng(shape[1] + 1)
    gate, up = normal(rng, *shape, size=size), normal(rng, *shape, size=3.0)
    out = ops.to_numpy(ops.activate(gate, "silu", up))
    wide = gate.astype(np.float64)
    with np.errstate(over="ignore"):
        wanted = wide / (1 + np.exp(-wide)) * up
    assert out.shape == shape
    assert out.dtype == np.float32
    slack = (abs(wide) + 12) * UNIT * abs(wanted) + np.where(wide < -86, abs(wide * up) * 1e-37, 0) + TINIEST
    assert (abs(out - wanted) <= slack).all()


def test_silu_at_the_ends_of_float32(ops: Ops) -> None:
    gate = np.asarray([[3.0e38, -3.0e38, 0.0, -0.0, 100.0, -100.0, 2.0**-149, -1e-40, 1.0]], np.float32)
    out = ops.to_numpy(ops.activate(gate, "silu", np.ones_like(gate)))
    np.testing.assert_allclose(out[0, :2], [3.0e38, 0.0], rtol=1e-6, atol=10)
    np.testing.assert_allclose(out[0, 2:], [0.0, 0.0, 100.0, 0.0, 0.0, 0.0, 0.7310586], rtol=1e-6, atol=1e-34)


def normal_distribution(x: WideArray) -> WideArray:
    return np.asarray([math.erfc(-value / math.sqrt(2)) / 2 for value in x.reshape(-1)]).reshape(x.shape)


@looped("size", [1e-3, 1.0, 5.0, 1e4])
@looped("shape", SHAPES)
def test_gelu_and_relu(ops: Ops, shape: tuple[int, int], size: float) -> None:
    """The polynomial of the normal distribution is right to 7.5e-8, its products to some units; so are tanh's."""
    rng = np.random.default_rng(shape[1] + 2)
    x = normal(rng, *shape, size=size)
    wide = x.astype(np.float64)
    curve = np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3))
    wanted: dict[Nonlinearity, WideArray] = {
        "gelu": wide * normal_distribution(wide),
        "gelu_tanh": wide / 2 * (1 + curve),
        "relu": np.maximum(wide, 0),
        "relu2": np.square(np.maximum(wide, 0)),
    }
    for activation, values in wanted.items():
        out = ops.to_numpy(ops.activate(x, activation))
        assert out.shape == shape
        assert (abs(out - values) <= 4e-7 * np.minimum(abs(wide), 8) + 2 * UNIT * abs(values) + TINIEST).all(), (
            activation
        )


@looped("size", [1e-6, 1e-3, 1.0, 30.0])
@looped("shape", SHAPES)
def test_xielu(ops: Ops, shape: tuple[int, int], size: float) -> None:
    """Near 0 the exponential less 1 must not lose what its terms have in common."""
    x = normal(np.random.default_rng(shape[1] + 3), *shape, size=size)
    wide = x.astype(np.float64)
    for alpha_p, alpha_n, beta, eps in ((0.8, 1.3, 0.5, -1e-6), (0.3, 0.9, -0.4, -0.2), (2.0, 0.7, 0.0, 0.3)):
        out = ops.to_numpy(ops.xielu(x, XIELU(alpha_p, alpha_n, beta, eps)))
        sunk = np.expm1(np.minimum(wide, eps))
        curve = np.where(wide > 0, alpha_p * wide**2, alpha_n * (sunk - wide))
        assert out.shape == shape
        slack = alpha_p * wide**2 * (wide > 0) + alpha_n * (abs(sunk) + abs(wide)) + abs(beta * wide)
        assert (abs(out - (curve + beta * wide)) <= 4 * UNIT * slack + TINIEST).all()


def test_xielu_at_the_ends_of_float32(ops: Ops) -> None:
    x = np.asarray([[np.nan, np.inf, -3.0e38, 0.0, -0.0]], np.float32)
    with np.errstate(invalid="ignore"):
        out = ops.to_numpy(ops.xielu(x, XIELU(0.8, 1.1, 0.5, -1e-6)))
    np.testing.assert_allclose(out, [[np.nan, np.inf, 1.8e38, 0.0, 0.0]], rtol=1e-6, atol=2e-6)


def test_scale_by_position(ops: Ops) -> None:
    rng = np.random.default_rng(14)
    x, factors = rng.normal(0, 1, (30, 3, 24)).astype(np.float32), rng.normal(1, 1, 50).astype(np.float32)
    positions = rng.integers(0, 50, 30, dtype=np.int32)
    out = ops.to_numpy(ops.scale_by_position(x, positions, PositionScales(factors)))
    np.testing.assert_array_equal(out, x * factors[positions][:, None, None])


@looped("size", [1e-3, 1.0, 30.0, 1e4])
@looped("shape", SHAPES)
def test_clamped_silu(ops: Ops, shape: tuple[int, int], size: float) -> None:
    """Of gpt-oss: the gate no larger than 7, `up` between -7 and 7 and one more; without `up` the gate's part alone."""
    rng = np.random.default_rng(shape[1] + 4)
    gate, up = normal(rng, *shape, size=size), normal(rng, *shape, size=size)
    wide = np.minimum(gate.astype(np.float64), 7)
    with np.errstate(over="ignore"):
        gated = wide / (1 + np.exp(-1.702 * wide))
    raised = np.clip(up.astype(np.float64), -7, 7) + 1
    slack = (2 * abs(wide) + 14) * UNIT * abs(gated) + np.where(wide < -50, abs(wide) * 1e-37, 0) + TINIEST
    both, alone = ops.to_numpy(ops.activate(gate, "clamped_silu", up)), ops.to_numpy(ops.activate(gate, "clamped_silu"))
    assert both.shape == alone.shape == shape
    assert (abs(alone - gated) <= slack).all()
    assert (abs(both - gated * raised) <= 2 * slack * abs(raised) + abs(gated) * 8 * UNIT + TINIEST).all()


@looped("activation", NONLINEARITIES)
def test_what_is_no_number_in_up_stays_so(ops: Ops, activation: Nonlinearity) -> None:
    up = np.asarray([[np.nan, 1.0, 2.0, 3.0, np.nan, 4.0, 5.0, 6.0, 7.0, np.nan]], np.float32)
    out = ops.to_numpy(ops.activate(np.ones_like(up), activation, up))
    np.testing.assert_array_equal(np.isnan(out), np.isnan(up))


@looped("activation", NONLINEARITIES)
def test_activations_keep_what_is_no_number(ops: Ops, activation: Nonlinearity) -> None:
    x = np.asarray([[np.nan, 1.0, np.nan, 2.0, 3.0, 4.0, 5.0, 6.0, np.nan]], np.float32)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(np.isnan(ops.to_numpy(ops.activate(x, activation))), np.isnan(x))


@looped("cap", [0.5, 30.0, 50.0])
def test_soft_cap(ops: Ops, cap: float) -> None:
    """tanh is 1 less a quotient: off by a unit or two of 1."""
    x = normal(np.random.default_rng(6), 9, 45, size=40.0)
    out = ops.to_numpy(ops.soft_cap(x, cap))
    wanted = cap * np.tanh(x.astype(np.float64) / cap)
    assert out.shape == x.shape
    assert (abs(out - wanted) <= 8 * UNIT * cap).all()


def test_embed_with_a_scale(ops: Ops) -> None:
    table = random_weights(GGMLQuantizationType.F16, 37, 24, np.random.default_rng(9))
    rows = ops.to_numpy(ops.embed(table.load(ops), np.asarray([3, 36], np.int32), 3.3))
    np.testing.assert_array_equal(rows, table.values[[3, 36]] * np.float32(3.3))


def test_bias_scale_and_residual_follow_the_product(ops: Ops) -> None:
    rng = np.random.default_rng(10)
    matrix, bias, residual = random_weights(GGMLQuantizationType.F32, 37, 40, rng), normal(rng, 37), normal(rng, 5, 37)
    x = normal(rng, 5, 40)
    loaded = matrix.load(ops)
    product = ops.to_numpy(ops.linear(x, Linear(loaded)))
    out = ops.to_numpy(ops.linear(x, Linear(loaded, bias, 0.22), residual))
    wanted = residual + np.float32(0.22) * (product + bias)
    np.testing.assert_allclose(out, wanted, atol=4e-6)
    np.testing.assert_allclose(ops.to_numpy(ops.linear(x, Linear(loaded, bias))), product + bias, atol=4e-6)


@pytest.mark.parametrize("adjacent_pairs", [True, False])
@pytest.mark.parametrize(("head_dim", "num_dims"), [(2, 2), (8, 8), (64, 64), (40, 20), (80, 6), (256, 256)])
def test_rope(ops: Ops, head_dim: int, num_dims: int, adjacent_pairs: bool) -> None:
    """As a complex number: a pair (a, b) becomes (a + ib) e**(i angle); dimensions past `num_dims` pass unchanged."""
    rng = np.random.default_rng(head_dim)
    table = RopeSpec(theta=10_000.0, num_dims=num_dims, adjacent_pairs=adjacent_pairs).table(600)
    for num_tokens, heads in ((0, 3), (1, 1), (9, 3), (70, 5)):
        x = normal(rng, num_tokens, heads, head_dim)
        positions = rng.integers(0, 600, num_tokens, dtype=np.int32)
        out = ops.to_numpy(ops.rope(x, positions, table))
        angles = positions[:, None] * 10_000.0 ** (-2.0 * np.arange(num_dims // 2) / num_dims)
        rotation = np.exp(1j * angles)[:, None]  # (T, 1, pairs)
        wanted = x.astype(np.float64)
        first = slice(0, num_dims, 2) if adjacent_pairs else slice(0, num_dims // 2)
        second = slice(1, num_dims, 2) if adjacent_pairs else slice(num_dims // 2, num_dims)
        rotated = (x[..., first] + 1j * x[..., second].astype(np.complex128)) * rotation
        wanted[..., first], wanted[..., second] = rotated.real, rotated.imag
        # Cosine and sine are rounded once, two products and their sum once each.
        bound = np.zeros_like(wanted)
        bound[..., first] = bound[..., second] = 3 * UNIT * (abs(x[..., first]) + abs(x[..., second]))
        assert out.shape == x.shape
        assert (abs(out - wanted) <= bound).all()


def test_rope_of_the_first_pairs_alone(ops: Ops) -> None:
    """As fast as they would rotate among all, and half a head apart; all other dimensions pass unchanged."""
    x = normal(np.random.default_rng(12), 5, 3, 40)
    positions = np.asarray([0, 7, 1, 599, 3], np.int32)
    spec = RopeSpec(theta=10_000.0, num_dims=32, adjacent_pairs=False, num_rotating=3)
    assert spec.token_bytes == 3 * 2 * 4
    out = ops.to_numpy(ops.rope(x, positions, spec.table(600)))
    whole = ops.to_numpy(ops.rope(x, positions, RopeSpec(10_000.0, 32, adjacent_pairs=False).table(600)))
    wanted = x.copy()
    wanted[..., [0, 1, 2, 16, 17, 18]] = whole[..., [0, 1, 2, 16, 17, 18]]
    np.testing.assert_array_equal(out, wanted)


def test_rope_leaves_its_input_alone(ops: Ops) -> None:
    x = normal(np.random.default_rng(1), 3, 2, 8)
    before = x.copy()
    ops.rope(x, np.asarray([1, 2, 3], np.int32), RopeSpec(10_000.0, 8, adjacent_pairs=True).table(4))
    np.testing.assert_array_equal(x, before)


def test_rope_table_turns_by_theta_and_factors() -> None:
    plain = RopeSpec(500.0, 4, adjacent_pairs=True).table(10).cos_sin
    assert plain.shape == (10, 2, 2)
    assert plain.dtype == np.float32
    np.testing.assert_array_equal(plain[0], [[1, 0], [1, 0]])
    slower = RopeSpec(500.0, 4, adjacent_pairs=True, factors=2.0).table(10).cos_sin
    np.testing.assert_array_equal(slower[4], plain[2])
    mixed = RopeSpec(500.0, 4, adjacent_pairs=True, factors=(1.0, 4.0)).table(10).cos_sin
    np.testing.assert_array_equal(mixed[8, 0], plain[8, 0])
    np.testing.assert_array_equal(mixed[8, 1], plain[2, 1])
    longer = RopeSpec(500.0, 4, adjacent_pairs=True).table(1000).cos_sin
    np.testing.assert_array_equal(longer[:10], plain)


@looped("size", SIZES)
def test_add(ops: Ops, size: float) -> None:
    rng = np.random.default_rng(2)
    x, y = normal(rng, 9, 33, size=size), normal(rng, 9, 33)
    wanted = (x.astype(np.float64) + y).astype(np.float32)
    np.testing.assert_array_equal(ops.to_numpy(ops.add(x, y)), wanted)


def test_add_with_a_scale(ops: Ops) -> None:
    x, y = normal(np.random.default_rng(2), 2, 9, 33)
    np.testing.assert_array_equal(ops.to_numpy(ops.add(x, y, 0.3)), (x + y) * np.float32(0.3))


@looped("num_tokens", [0, 1, 5])
def test_take_columns(ops: Ops, num_tokens: int) -> None:
    x = normal(np.random.default_rng(3), num_tokens, 33)
    for start, count in ((0, 33), (5, 7), (32, 1)):
        np.testing.assert_array_equal(ops.to_numpy(ops.take_columns(x, start, count)), x[:, start : start + count])


@looped("rows", [[], [4], [0, 4, 2], [3, 3]])
def test_take_rows(ops: Ops, rows: list[int]) -> None:
    x = normal(np.random.default_rng(3), 5, 33)
    taken = ops.to_numpy(ops.take_rows(x, np.asarray(rows, np.int32)))
    assert taken.shape == (len(rows), 33)
    for row, index in zip(taken, rows, strict=True):
        np.testing.assert_array_equal(row, x[index])


@looped("num_tokens", [0, 1, 5])
def test_heads_are_split_and_merged_in_order(ops: Ops, num_tokens: int) -> None:
    x = normal(np.random.default_rng(4), num_tokens, 48)
    heads = ops.split_heads(x, 16)
    assert ops.to_numpy(heads).shape == (num_tokens, 3, 16)
    for head in range(3):
        np.testing.assert_array_equal(ops.to_numpy(heads)[:, head], x[:, 16 * head : 16 * (head + 1)])
    np.testing.assert_array_equal(ops.to_numpy(ops.merge_heads(heads)), x)


def test_results_are_new_arrays(ops: Ops) -> None:
    """An op never writes into what it was given, but for write_kv's cache."""
    rng = np.random.default_rng(5)
    x, y, weight = normal(rng, 4, 32), normal(rng, 4, 32), normal(rng, 32)
    copies = [array.copy() for array in (x, y, weight)]
    matrix = random_weights(GGMLQuantizationType.Q4_1, 32, 32, rng).linear(ops)
    for out in (
        ops.norm(x, Norm(weight, 1e-5)),
        ops.activate(x, "silu", y),
        ops.add(x, y),
        ops.linear(x, matrix),
        ops.soft_cap(x, 5.0),
        ops.xielu(x, XIELU(0.8, 1.3, 0.5, -1e-6)),
    ):
        out[:] = 7
    for array, copy in zip((x, y, weight), copies, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_names_and_threads() -> None:
    assert (NativeOps().name, ReferenceOps().name) == ("native", "reference")
    assert NativeOps(threads=3).num_threads == 3
    assert NativeOps().num_threads >= 1
