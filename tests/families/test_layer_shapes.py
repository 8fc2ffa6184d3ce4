"""Layers whose heads differ, and layers that read what others keep: near the reference, the same bits in any chunks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from kvik.config import EngineConfig
from kvik.engine.engine import Engine
from kvik.models.decoder import Decoder
from kvik.models.random_weights import RandomWeights
from kvik.models.spec import DecoderSpec, LayerSpec, RopeSpec
from kvik.models.weights import read_weights
from kvik.ops.base import Ops
from kvik.ops.native import NativeOps
from kvik.ops.program import CapturedStep
from kvik.ops.reference import ReferenceOps
from models import assert_idle, run, tiny_model
from oracle.teacher_forcing import teacher_forced

NARROW, WIDE = (RopeSpec(theta=10_000.0, num_dims=dims, adjacent_pairs=False) for dims in (16, 32))
TOKENS = np.random.default_rng(5).integers(0, 60, 150).tolist()

# As in Gemma 4: wide heads where all is seen, narrow ones in windows, and the last layers have no keys of their own.
SHAPES = DecoderSpec(
    architecture="llama",
    hidden_size=64,
    intermediate_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=60,
    context_length=300,
    layers=(
        LayerSpec(NARROW, window=40),
        LayerSpec(WIDE, num_kv_heads=1, head_dim=32),
        LayerSpec(NARROW, window=40),
        LayerSpec(NARROW),
        LayerSpec(NARROW, window=40, kv_from=2),
        LayerSpec(WIDE, num_kv_heads=1, head_dim=32, kv_from=1),
    ),
    tied_head=True,
    norm_eps=1e-5,
    qk_norm="head",
)


def decoder_on(ops: Ops) -> Decoder:
    assert SHAPES.problem() is None
    return Decoder(SHAPES, read_weights(SHAPES, RandomWeights(SHAPES, ops, {}, "F32", seed=3)), ops, 300)


@pytest.mark.parametrize("kv_dtype", ["f32", "f16", "k=int8,v=f16"])
def test_logits_are_near_the_reference_and_the_same_in_any_chunks(kv_dtype: str) -> None:
    native, reference = (decoder_on(ops) for ops in (NativeOps("int16", threads=2), ReferenceOps("int16")))
    whole = teacher_forced(native, TOKENS, kv_dtype=kv_dtype, chunks=(150,))
    wanted = teacher_forced(reference, TOKENS, kv_dtype=kv_dtype, chunks=(150,))
    assert abs(whole - wanted).max() < (1e-5 if kv_dtype == "f32" else 2e-3) * abs(wanted).max()
    for chunks in ((1,), (37, 1, 64), (149, 1)):
        again = teacher_forced(native, TOKENS, kv_dtype=kv_dtype, chunks=chunks)
        np.testing.assert_array_equal(again.view(np.uint32), whole.view(np.uint32))


def test_fusion_leaves_what_has_no_fused_form() -> None:
    decoder = decoder_on(NativeOps(threads=1))
    step = decoder.capture(decoder.ops.allocate_kv(decoder.spec.kv_spec("f16"), 8))
    assert isinstance(step, CapturedStep)
    own, shared = ["norm_qkv"], ["norm_linear", "norm", "rope"]
    rest = ["attend", "linear", "norm_gated", "linear"]
    names = [call.name for call in step.ops]
    assert names == ["embed", *(own + rest) * 4, *(shared + rest) * 2, "take_rows", "norm_linear"]


def test_an_engine_shares_and_copies_blocks_in_every_group(tmp_path: Path) -> None:
    """Two groups that see all tokens and one that slides: hits, a copy before writing, and memory given back."""
    decoder = decoder_on(NativeOps(threads=2))
    model = dataclasses.replace(tiny_model(tmp_path), decoder=decoder, context=300)
    engine = Engine(model, EngineConfig(token_budget=64))
    assert [group.kind for group in engine.kv_spec.groups] == ["full", "full", "window"]
    prompt = TOKENS[:77]
    wanted = run(engine, prompt)
    again = run(engine, prompt)
    assert again.sequence.costs.num_cached_tokens == 76
    assert again.token_ids == wanted.token_ids
    np.testing.assert_array_equal(again.logits[-8:].view(np.uint32), wanted.logits[-8:].view(np.uint32))
    assert engine.cache.stats.num_copied_blocks > 0
    assert_idle(engine)
