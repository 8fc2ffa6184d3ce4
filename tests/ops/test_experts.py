"""Experts: the native backend near the reference, and the same bits for a row whatever its mates chose."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from kvik.config import ActivationDType
from kvik.experts import ExpertsRead
from kvik.ops.base import Expert, ExpertsWeights, Linear, Nonlinearity, Ops, RouterScores, Routing, Vector
from kvik.ops.native import NativeOps
from kvik.ops.reference import ReferenceOps, choose_experts
from looped import looped
from ops.arrangement import FloatArray, random_weights

NUM_EXPERTS, HIDDEN, INNER = 12, 256, 512
KINDS = (Type.Q4_K, Type.Q6_K, Type.Q8_0, Type.MXFP4, Type.F16, Type.F32)
RULES = (
    Routing(4),
    Routing(3, renormalize=True),
    Routing(NUM_EXPERTS, "softmax", scale=2.5),
    Routing(1, "logits"),
    Routing(4, "logits"),
    Routing(4, "sigmoid", renormalize=True, min_sum=1e-6, scale=1.5),
    Routing(3, "sigmoid", renormalize=True, num_groups=4, num_chosen_groups=2),
    Routing(4, "softmax", num_groups=6, num_chosen_groups=3),
)
pytestmark = pytest.mark.sanitize


def made(
    ops: Ops, kind: Type, routing: Routing, *, gated: bool = True, vectors: bool = False, biased: bool = False
) -> ExpertsWeights:
    """The same for any backend."""
    rng = np.random.default_rng(3)

    def linear(rows: int, columns: int) -> Linear:
        matrix = random_weights(kind, rows, columns, rng, std=columns**-0.5).load(ops)
        bias = rng.normal(0, 1, rows).astype(np.float32)
        return Linear(matrix, bias if biased else None, 0.5 if biased else 1.0)

    def expert() -> Expert:
        gate, up, down = linear(INNER, HIDDEN), linear(INNER, HIDDEN), linear(HIDDEN, INNER)
        return Expert(up, down, gate if gated else None)

    experts = tuple(expert() for _ in range(NUM_EXPERTS))
    bias, scales = (rng.normal(1, 0.3, NUM_EXPERTS).astype(np.float32) for _ in range(2))
    return ExpertsWeights(routing, experts, bias if vectors else None, scales if vectors else None)


def rows(count: int, seed: int = 4) -> tuple[FloatArray, FloatArray]:
    rng = np.random.default_rng(seed)
    return rng.normal(0, 1, (count, HIDDEN)).astype(np.float32), rng.normal(0, 2, (count, NUM_EXPERTS)).astype(
        np.float32
    )


@pytest.mark.parametrize("routing", RULES, ids=str)
def test_native_is_near_the_reference(routing: Routing) -> None:
    x, logits = rows(23)
    for options in ({}, {"vectors": True, "biased": True}, {"gated": False}):
        native, reference = NativeOps(threads=2), ReferenceOps()
        activation: Nonlinearity = "silu" if options.get("gated", True) else "relu"
        found = native.experts(x, logits, made(native, Type.Q8_0, routing, **options), activation)
        wanted = reference.experts(x, logits, made(reference, Type.Q8_0, routing, **options), activation)
        # A value near the middle of two levels may be quantised to either when the hidden rows differ in a last bit.
        np.testing.assert_allclose(found, wanted, rtol=0, atol=3e-3 * np.abs(wanted).max())


@looped("kind", KINDS, lambda kind: kind.name)
@pytest.mark.parametrize("activations", ["int8", "int16"])
def test_a_row_does_not_depend_on_the_others(kind: Type, activations: ActivationDType) -> None:
    """Alone, in chunks, among rows that all choose the same experts, on more threads: the same bits."""
    x, logits = rows(140)
    logits[70:100] = logits[0]  # more rows of one expert than are added up at a time
    alone = NativeOps(activations, threads=1)
    weights = made(alone, kind, Routing(3, renormalize=True), vectors=True)
    one_by_one = np.concatenate([alone.experts(x[i : i + 1], logits[i : i + 1], weights, "silu") for i in range(140)])
    assert np.isfinite(one_by_one).all()
    for threads in (1, 2, 3):
        ops = NativeOps(activations, threads=threads)
        for start, stop in ((0, 140), (0, 2), (3, 68), (60, 140), (139, 140)):
            found = ops.experts(x[start:stop], logits[start:stop], weights, "silu")
            np.testing.assert_array_equal(found.view(np.uint32), one_by_one[start:stop].view(np.uint32))


def test_experts_of_several_types_side_by_side() -> None:
    """Files keep some layers' projections in other types than their neighbours."""
    x, logits = rows(9)
    native, reference = NativeOps(threads=2), ReferenceOps()

    def mixed(ops: Ops) -> ExpertsWeights:
        kinds = (made(ops, kind, Routing(6)) for kind in (Type.Q8_0, Type.F32))
        pairs = zip(*(weights.experts for weights in kinds), strict=True)
        return ExpertsWeights(Routing(6), tuple(Expert(plain.up, one.down, one.gate) for one, plain in pairs))

    found, wanted = (ops.experts(x, logits, mixed(ops), "silu") for ops in (native, reference))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=3e-3 * np.abs(wanted).max())


@pytest.mark.parametrize("scores", get_args(RouterScores))
def test_of_equal_scores_the_lower_ids_are_chosen(scores: RouterScores) -> None:
    x, logits = rows(2)
    logits[:] = [0, 5, 5, 5, 1, 5, 0, 0, 0, 0, 0, 0]
    routing = Routing(3, scores)
    for ops in (NativeOps(threads=1), ReferenceOps()):
        weights = made(ops, Type.F32, routing)
        assert sorted(choose_experts(logits[0], weights)) == [1, 2, 3]
        left = replace(
            weights, experts=tuple(e if i in (1, 2, 3) else silent(e) for i, e in enumerate(weights.experts))
        )
        np.testing.assert_array_equal(ops.experts(x, logits, weights, "silu"), ops.experts(x, logits, left, "silu"))


def silent(expert: Expert) -> Expert:
    return replace(expert, down=replace(expert.down, scale=0.0))


@pytest.mark.parametrize("kind", ["nan", "inf", "-inf"])
def test_logits_that_are_no_numbers_harm_their_row_alone(kind: str) -> None:
    x, logits = rows(5)
    ops = NativeOps(threads=2)
    for routing in RULES:
        weights = made(ops, Type.Q4_K, routing, vectors=True)
        fine = ops.experts(x, logits, weights, "silu")
        harmed = logits.copy()
        harmed[2] = float(kind)
        np.testing.assert_array_equal(ops.experts(x, harmed, weights, "silu")[[0, 1, 3, 4]], fine[[0, 1, 3, 4]])


def test_no_rows() -> None:
    x, logits = rows(0)
    ops = NativeOps(threads=2)
    assert ops.experts(x, logits, made(ops, Type.Q8_0, Routing(2)), "silu").shape == (0, HIDDEN)


@pytest.mark.parametrize("width", [1, 45])
def test_gate(width: int) -> None:
    rng = np.random.default_rng(5)
    x, gates = (rng.normal(0, 3, (7, columns)).astype(np.float32) for columns in (45, width))
    wanted = x / (1 + np.exp(-gates.astype(np.float64)))
    for ops in (NativeOps(threads=2), ReferenceOps()):
        np.testing.assert_allclose(ops.to_numpy(ops.gate(x, gates)), wanted, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("routing", RULES[:4], ids=str)
def test_what_is_read_is_what_was_chosen(routing: Routing) -> None:
    """For one row exactly; for many that choose at random, on average."""
    read = ExpertsRead(NUM_EXPERTS, routing.num_chosen, 1000)
    assert read.bytes_for(1) == pytest.approx(1000 * routing.num_chosen)
    weights = made(ReferenceOps(), Type.F32, routing)
    counts = [len(set().union(*(choose_experts(row, weights) for row in rows(6, seed)[1]))) for seed in range(100, 400)]
    assert read.bytes_for(6) == pytest.approx(1000 * np.mean(counts), rel=0.03)


def vector(size: int) -> Vector:
    return np.ones(size, np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"routing": Routing(0)}, "no more can be chosen"),
        ({"routing": Routing(13)}, "no more can be chosen"),
        ({"routing": Routing(2, num_groups=5)}, "groups must be equal"),
        ({"routing": Routing(2, num_groups=12, num_chosen_groups=2)}, "groups must be equal"),
        ({"routing": Routing(5, num_groups=3, num_chosen_groups=1)}, "too few groups"),
        ({"routing": Routing(2, "best")}, "scores are"),  # type: ignore[arg-type]
        ({"choice_bias": vector(11)}, "one item an expert"),
        ({"scales": vector(13)}, "one item an expert"),
        ({"experts": ()}, "1 ... 1024 experts"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    ops = NativeOps(threads=1)
    x, logits = rows(2)
    weights = made(ops, Type.F16, Routing(2))
    with pytest.raises(ValueError, match=message):
        ops.experts(x, logits, replace(weights, **changes), "silu")


def test_shapes_that_do_not_fit_are_refused() -> None:
    ops = NativeOps(threads=1)
    x, logits = rows(2)
    weights = made(ops, Type.F16, Routing(2))
    first, *others = weights.experts
    for expert in (
        replace(first, gate=None),
        replace(first, up=first.down),
        replace(first, down=first.up),
        replace(first, gate=first.down),
    ):
        with pytest.raises(ValueError, match="Experts: "):
            ops.experts(x, logits, replace(weights, experts=(expert, *others)), "silu")
    with pytest.raises(ValueError, match="another number of columns"):
        ops.experts(x[:, :128].copy(), logits, weights, "silu")
    with pytest.raises(ValueError, match="another shape"):
        ops.experts(x, logits[:, :6].copy(), weights, "silu")
