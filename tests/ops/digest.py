"""A bundle of op outputs as one number, to be compared between instruction sets and processes.

Run as a program, it prints the number; with the word products, that of `products`.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator
from typing import get_args

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from gguf_files import FLOAT_TYPES
from kvik.config import ActivationDType, KVDType
from kvik.engine.sampler import make_sampler
from kvik.models.spec import RopeSpec
from kvik.ops.base import (
    XIELU,
    Expert,
    ExpertsWeights,
    Linear,
    Nonlinearity,
    Norm,
    PositionScales,
    RouterScores,
    Routing,
)
from kvik.ops.native import NativeOps
from ops.arrangement import CODED_KV_DTYPES, KV_DTYPES, FloatArray, Heads, random_history, random_weights
from ops.sampling import KINDS, random_logits, random_rows
from ops.sharing import filled, random_sharers
from tiers import TESTED_TYPES

NONLINEARITIES: tuple[Nonlinearity, ...] = get_args(Nonlinearity)
SCORES: tuple[RouterScores, ...] = get_args(RouterScores)


def outputs(threads: int = 2) -> Iterator[FloatArray]:
    """Every op and kernel once or more, sizes that leave a rest at each step, values from tiny to large."""
    rng = np.random.default_rng(20)
    both: tuple[ActivationDType, ...] = ("int8", "int16")
    for activations in both:
        ops = NativeOps(activations, threads=threads)
        for kind in TESTED_TYPES:
            weight = random_weights(kind, 21, 256, rng).load(ops)
            x = (rng.normal(0, 1, (6, 256)) * 10.0 ** rng.integers(-32, 6, (6, 1))).astype(np.float32)
            yield ops.linear(x, Linear(weight))
            yield ops.embed(weight, np.arange(21, dtype=np.int32))
    ops = NativeOps(threads=threads)
    x, y = (rng.normal(0, 10, (11, 45)).astype(np.float32) for _ in range(2))
    yield ops.norm(x, Norm(y[0], 1e-5))
    yield ops.norm(x, Norm(y[0], 1e-5, y[1], "layer"))
    for activation in NONLINEARITIES:
        yield ops.activate(10 * x, activation, y)
        yield ops.activate(x, activation)
    yield ops.soft_cap(10 * x, 30.0)
    yield ops.xielu(x, XIELU(0.8, 1.3, 0.5, -0.2))
    yield ops.gate(x, y)
    yield ops.gate(x, y[:, :1].copy())
    yield from mixtures(threads)
    heads = rng.normal(0, 1, (9, 3, 24)).astype(np.float32)
    positions = rng.integers(0, 50, 9, dtype=np.int32)
    yield ops.scale_by_position(heads, positions, PositionScales(rng.normal(1, 1, 50).astype(np.float32)))
    for adjacent_pairs in (True, False):
        yield ops.rope(heads, positions, RopeSpec(10_000.0, 16, adjacent_pairs=adjacent_pairs).table(50))
    yield ops.rope(heads, positions, RopeSpec(10_000.0, 24, adjacent_pairs=False, num_rotating=5).table(50))
    dtypes: tuple[KVDType, ...] = ("f32", "f16")
    for dtype in dtypes:
        for group, head_dim in ((1, 8), (2, 40), (3, 64), (5, 24)):
            history = random_history(Heads(2 * group, 2, head_dim), [261, 40], rng, sharpness=2.0)
            history.v[1] *= 10.0 ** rng.integers(-8, 4, history.v[1].shape)  # float16 subnormals too
            kv = history.allocate(ops, dtype)
            history.write(ops, kv, history.everything)
            yield history.attend(ops, kv, [(0, 258, 261), (1, 0, 40)])
            yield history.attend(ops, kv, [(0, 260, 261)])
    for dtype in KV_DTYPES:  # a prompt's tile, sizes with a rest of eight, windows
        for group, head_dim, window in ((1, 8, 33), (3, 72, None), (7, 24, 257), (6, 64, None), (4, 136, 200)):
            history = random_history(Heads(2 * group, 2, head_dim), [530, 40], rng, sharpness=2.0)
            history.v[1] *= 10.0 ** rng.integers(-8, 4, history.v[1].shape)
            kv = history.allocate(ops, dtype)
            history.write(ops, kv, history.everything)
            yield history.attend(ops, kv, [(0, 490, 530), (1, 0, 40)], window)
            yield history.attend(ops, kv, [(0, 529, 530)], window)
            sinks = rng.normal(0, 2, 2 * group).astype(np.float32)
            yield history.attend(ops, kv, [(0, 490, 530), (1, 0, 40)], window, sinks)
    for dtype in KV_DTYPES:  # segments that several sequences share
        for group, head_dim in ((1, 8), (3, 64), (8, 40)):
            sharers = random_sharers(Heads(2 * group, 2, head_dim), 9, 4, rng)
            yield sharers.together(ops, filled(ops, sharers.heads, dtype, sharers.num_blocks, rng))
    yield from coded(threads)
    yield from sampled(threads)


def coded(threads: int) -> Iterator[FloatArray]:
    """Attention over codes, of a prompt's tile and of sequences that share segments."""
    rng, ops = np.random.default_rng(26), NativeOps(threads=threads)
    for dtype in CODED_KV_DTYPES:
        for group, head_dim in ((1, 32), (3, 64), (2, 256)):
            heads = Heads(2 * group, 2, head_dim)
            history = random_history(heads, [530, 40], rng, sharpness=2.0)
            history.v[0] *= 10.0 ** rng.integers(-8, 4, history.v[0].shape)
            kv = history.allocate(ops, dtype)
            history.write(ops, kv, history.everything)
            yield history.attend(ops, kv, [(0, 490, 530), (1, 0, 40)])
            sharers = random_sharers(heads, 9, 4, rng)
            yield sharers.together(ops, filled(ops, heads, dtype, sharers.num_blocks, rng))


def mixtures(threads: int) -> Iterator[FloatArray]:
    """Rows through experts, by all ways to choose them."""
    rng = np.random.default_rng(24)
    ops = NativeOps(threads=threads)
    for kind in (GGMLQuantizationType.Q4_K, GGMLQuantizationType.MXFP4, GGMLQuantizationType.BF16):
        up, gate, down = (
            random_weights(kind, *shape, rng, std=0.1).linear(ops) for shape in ((256, 512), (256, 512), (512, 256))
        )
        experts = tuple(Expert(up, down, gate) for _ in range(8))
        scales = rng.normal(1, 0.2, 8).astype(np.float32)  # what tells one from the other
        x, logits = (rng.normal(0, 1, (37, width)).astype(np.float32) for width in (512, 8))
        for scores in SCORES:
            routing = Routing(3, scores, renormalize=True, num_groups=4, num_chosen_groups=2)
            for count in (1, 2, 37):
                yield ops.experts(x[:count], logits[:count], ExpertsWeights(routing, experts, scales, scales), "silu")


def sampled(threads: int) -> Iterator[FloatArray]:
    """Tokens and logprobs of random rows, as text."""
    sampler, rng = make_sampler(NativeOps(threads=threads)), np.random.default_rng(21)
    for vocab_size in (1, 100, 257, 5003):
        for kind in KINDS:
            logits = random_logits(kind, 5, vocab_size, rng)
            results = sampler.sample(logits, random_rows(logits, 20, rng))
            yield np.frombuffer(repr(results).encode(), np.uint8).astype(np.float32)  # each bit shows in a float's repr


def products(threads: int = 2) -> Iterator[FloatArray]:
    """Quantised weights and few tokens to many: tiles that are full, not full, or begin before their first token.

    Tiles are 6 or 16 tokens, chunks 60; 53 rows are a tile and an odd row block for each of two threads or less.
    """
    rng = np.random.default_rng(22)
    both: tuple[ActivationDType, ...] = ("int8", "int16")
    for activations in both:
        ops = NativeOps(activations, threads=threads)
        for kind in TESTED_TYPES:
            if kind in FLOAT_TYPES:
                continue
            columns = 256 + (96 if GGML_QUANT_SIZES[kind][0] == 32 else 256)
            weight = random_weights(kind, 53, columns, rng).linear(ops)
            x = (rng.normal(0, 1, (131, columns)) * 10.0 ** rng.integers(-20, 6, (131, 1))).astype(np.float32)
            for num_tokens in (1, 2, 3, 4, 5, 15, 16, 17, 31, 60, 61, 66, 131):
                yield ops.linear(x[-num_tokens:], weight)
            yield ops.norm_gated(x, None, weight, weight, "silu")  # 60 tokens at a time, of all rows' panels


def digest(threads: int = 2) -> str:
    return digest_of(outputs(threads))


def digest_of(arrays: Iterable[FloatArray]) -> str:
    total = hashlib.sha256()
    for array in arrays:
        assert np.isfinite(array).all()
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


if __name__ == "__main__":
    print(digest_of(products()) if "products" in sys.argv else digest())  # noqa: T201
