"""Sequences that share blocks read them once: the same bits as each alone, and really once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import get_args

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from kvik.cache import BLOCKS_PER_SUPERBLOCK
from kvik.config import KVDType
from kvik.ops.base import Array, AttentionRule, Batch, IntArray, LayerKV, Ops
from kvik.ops.native import NativeOps
from kvik.ops.program import CapturedStep
from kvik.ops.reference import ReferenceOps
from looped import looped
from ops.arrangement import Chunk, FloatArray, Heads, random_weights
from ops.sharing import SEGMENT, Sharers, batch_of, filled, random_sharers
from ops.test_bits import same_bits
from tiers import run_seed

pytestmark = pytest.mark.sanitize

SEED = run_seed("sharing")
QUERIES_PER_KV = (1, 3, 8, 40)
WINDOWS = (None, None, 1, 200, SEGMENT, 700)
Plan = tuple[int, int, int]
"""Units, those of them that are shared, chunks."""


@looped("dtype", get_args(KVDType))
@pytest.mark.parametrize("seed", [*range(12), *range(SEED, SEED + 4)])
def test_any_sharing_gives_the_bits_of_each_token_alone(seed: int, dtype: KVDType) -> None:
    rng = np.random.default_rng(seed)
    print(f"default_rng({seed})")  # noqa: T201
    num_kv_heads, queries_per_kv = int(rng.integers(1, 4)), int(rng.choice(QUERIES_PER_KV))
    heads = Heads(queries_per_kv * num_kv_heads, num_kv_heads, 8 * int(rng.integers(1, 10)))
    sharers = random_sharers(heads, int(rng.integers(2, 14)), int(rng.choice([1, 4, 40])), rng)
    if seed % 2:
        sharers = dataclasses.replace(sharers, sinks=rng.normal(0, 2, heads.num_heads).astype(np.float32))
    window = WINDOWS[int(rng.integers(len(WINDOWS)))]
    alone = NativeOps(threads=1)
    kv = filled(alone, heads, dtype, sharers.num_blocks, rng)
    wanted = sharers.one_by_one(alone, kv, window)
    assert np.isfinite(wanted).all()
    for threads in (1, 2, 3):
        same_bits(sharers.together(NativeOps(threads=threads), kv, window), wanted)


def test_the_reference_agrees() -> None:
    rng = np.random.default_rng(70)
    heads = Heads(6, 2, 16)
    sharers = random_sharers(heads, 5, 3, rng)
    outs = []
    for ops in (NativeOps(threads=2), ReferenceOps()):
        kv = filled(ops, heads, "f32", sharers.num_blocks, np.random.default_rng(71))
        outs.append(sharers.together(ops, kv))
    np.testing.assert_allclose(outs[0], outs[1], rtol=1e-4, atol=1e-5)


class Captured:
    """A program of nothing but attention, layer after layer over the same queries."""

    def __init__(self, heads: Heads, windows: Sequence[int | None] = (None,), threads: int = 1) -> None:
        self.ops = NativeOps(threads=threads)
        rng = np.random.default_rng(72)
        width = heads.num_heads * heads.head_dim
        table = random_weights(GGMLQuantizationType.F32, 64, width, rng).load(self.ops)
        self.kv: LayerKV = filled(self.ops, heads, "f16", 64, rng)

        def forward(ops: Ops, batch: Batch) -> Array:
            x = q = ops.split_heads(ops.embed(table, batch.token_ids), heads.head_dim)
            for window in windows:
                x = ops.attend(q, self.kv, batch, AttentionRule(window=window))
            return ops.take_rows(ops.merge_heads(x), batch.logit_rows)

        self.forward = forward
        self.step: CapturedStep = self.ops.capture(forward)

    def run(self, tables: IntArray, chunks: Sequence[Chunk]) -> tuple[FloatArray, list[Plan]]:
        out = self.step(batch_of(tables, chunks))
        return out, self.step.attend_plans


def tables_of(*rows: str) -> IntArray:
    """A letter a segment: which eight blocks it has."""
    blocks = np.arange(BLOCKS_PER_SUPERBLOCK, dtype=np.int32)
    return np.asarray(
        [np.concatenate([(ord(letter) - ord("a")) * BLOCKS_PER_SUPERBLOCK + blocks for letter in row]) for row in rows]
    )


HEADS = Heads(6, 2, 16)
TABLES = tables_of("abcd", "abce", "abfg", "ahcd")


def decode(*lengths: int) -> list[Chunk]:
    return [(sequence, length - 1, length) for sequence, length in enumerate(lengths)]


@pytest.mark.tiny
def test_neighbours_share_where_their_blocks_are_the_same() -> None:
    """Of four segments each, all four sequences share the first, three the second, two the third: 16 - 3 - 2 - 1."""
    out, plans = Captured(HEADS).run(TABLES, decode(900, 1000, 800, 1024))
    assert plans == [(2 * 10, 2 * 3, 1)]
    assert np.isfinite(out).all()


def test_what_only_some_tokens_see_whole_is_not_shared() -> None:
    """A segment's last position is 255: a token there sees all of it, the one before does not."""
    captured = Captured(HEADS)
    same = tables_of("abc", "abc")
    for lengths, shared in (((256, 300), 1), ((255, 300), 0), ((300, 255), 0), ((513, 511), 1), ((512, 512), 2)):
        assert captured.run(same, decode(*lengths))[1][0][1] == 2 * shared
    assert captured.run(same, [(0, 255, 258), (1, 255, 258)])[1][0][1] == 2 * 1  # 256 and 257 of one, 255 of the other


def test_a_sequence_shares_nothing_with_itself() -> None:
    """A chunk over the end of a segment is cut there; shared, its parts would need places for all segments before."""
    captured = Captured(HEADS)
    assert captured.run(tables_of("abc"), [(0, 500, 520)])[1] == [(2 * 5, 0, 1)]
    assert captured.run(tables_of("abc", "abc"), [(0, 500, 520), (1, 515, 520)])[1] == [(2 * (5 + 3 - 2), 2 * 2, 1)]


def test_a_window_that_cuts_into_a_segment_keeps_it_from_being_shared() -> None:
    same = tables_of("abc", "abc")
    for window, shared in ((768, 3), (767, 2), (512, 2), (511, 1), (256, 1), (255, 0)):
        assert Captured(HEADS, [window]).run(same, decode(768, 768))[1][0][1] == 2 * shared


@pytest.mark.parametrize("window", [256, 512, 768])
def test_rows_of_a_shared_segment_have_positions_of_their_own(window: int) -> None:
    """Tokens at the very edge of a window, and of a segment: as neighbours at the next position each would see less."""
    rng, alone = np.random.default_rng(73), NativeOps(threads=1)
    chunks = [(0, 767, 768), (1, 767, 768), (2, 511, 512), (3, 256, 257)]
    q = rng.normal(0, 2, (len(chunks), HEADS.num_heads, HEADS.head_dim)).astype(np.float32)
    sharers = Sharers(HEADS, 64, tables_of("abc", "abc", "abc", "abc"), chunks, q)
    kv = filled(alone, HEADS, "f16", 64, rng)
    same_bits(sharers.together(alone, kv, window), sharers.one_by_one(alone, kv, window))


@looped("place", range(BLOCKS_PER_SUPERBLOCK))
def test_one_other_block_makes_another_segment(place: int) -> None:
    captured = Captured(HEADS)
    same = tables_of("a", "a")
    other = same.copy()
    other[1, place] = 40
    both = [(0, 255, 256), (1, 255, 256)]
    (shared, [(_, num_shared, _)]), (apart, [(_, none, _)]) = captured.run(same, both), captured.run(other, both)
    assert (num_shared, none) == (2, 0)
    same_bits(shared[0], apart[0])
    assert (shared[1] != apart[1]).any()


def test_a_unit_has_no_more_than_96_rows() -> None:
    """Forty sequences of three query heads: 32 together, then 8. Chunks of twenty tokens: no two together."""
    same = np.repeat(tables_of("ab"), 40, axis=0)
    captured = Captured(Heads(3, 1, 16))
    assert captured.run(same, decode(*[300] * 40))[1] == [(2 + 40, 2, 1)]
    chunks = [(sequence, 270, 290) for sequence in range(3)]
    assert captured.run(same, chunks)[1] == [(6, 0, 1)]
    chunks = [(sequence, 270, 280) for sequence in range(6)]
    assert captured.run(same, chunks)[1] == [(2 + 6, 2, 1)]


def test_the_cost_counts_what_is_shared_once() -> None:
    captured = Captured(HEADS)
    token_bytes = 2 * 2 * HEADS.num_kv_heads * HEADS.head_dim
    lengths = (900, 1000, 800, 1024)
    batch = batch_of(TABLES, decode(*lengths))
    attend = next(op for op in captured.step.profile(batch) if op.name == "attend")
    assert attend.bytes == (sum(lengths) - 6 * SEGMENT) * token_bytes
    assert attend.operations == 4 * sum(lengths) * HEADS.num_heads * HEADS.head_dim


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_layers_of_one_shape_have_one_plan_for_each_step(threads: int) -> None:
    """Its counts of unfinished units start again with each layer; a step's other tokens make another plan."""
    windows = (None, 300, None, 300, None)
    captured = Captured(HEADS, windows, threads)
    for lengths in ((900, 1000, 800, 1024), (300, 301, 302, 303), (900, 20, 800, 1)):
        for _ in range(2):
            out, plans = captured.run(TABLES, decode(*lengths))
            assert len(plans) == 2
            same_bits(out, captured.forward(captured.ops, batch_of(TABLES, decode(*lengths))))


def test_threads_are_not_left_without_work() -> None:
    """Two sequences of one segment and one KV head: two units for two threads, rather than one."""
    heads, same = Heads(3, 1, 16), tables_of("a", "a")
    assert Captured(heads, threads=1).run(same, decode(256, 256))[1] == [(1, 1, 1)]
    assert Captured(heads, threads=2).run(same, decode(256, 256))[1][0][:2] == (2, 0)


def test_nothing_is_shared_with_a_sequence_in_between() -> None:
    tables = tables_of("ab", "cd", "ab")
    assert Captured(HEADS).run(tables, decode(400, 400, 400))[1] == [(12, 0, 1)]
