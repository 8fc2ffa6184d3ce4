"""Pooled KV heads in every family: where a model's heads are alike, the pooled model is the same function."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from families.cases import NUM_TOKENS
from families.gguf_cases import GGUF_CASES, tensors_of
from families.gguf_of import gguf_of
from kvik.errors import InvalidInput
from kvik.files.gguf import dequantize, read_gguf
from kvik.models.gguf_spec import read_spec
from kvik.models.loader import load_model
from kvik.models.pool_heads import pool_kv_heads
from kvik.ops.native import NativeOps
from models import altered
from oracle.teacher_forcing import teacher_forced

TOKENS = [int(token_id) for token_id in np.random.default_rng(11).integers(3, 255, NUM_TOKENS)]

FUSED = ("gpt2", "gpt_bigcode", "gpt_neox", "gpt_neox-serial", "falcon-7b", "falcon-40b", "falcon-11b", "phi3")
"""One matrix for queries, keys and values, or a single KV head, which is looked at first."""


def with_equal_heads(source: Path, target: Path) -> Path:
    """The same model, each of its KV heads the first."""
    file = read_gguf(source)
    spec = read_spec(file)
    repeated = {}
    for name, tensor in file.tensors.items():
        if re.fullmatch(r"blk\.\d+\.attn_(k|v|k_norm)\.(weight|bias)", name):
            values = dequantize(tensor)
            if len(values) == spec.num_kv_heads * spec.head_dim:
                values = np.concatenate([values[: spec.head_dim]] * spec.num_kv_heads)
                repeated[name] = (values, GGMLQuantizationType.F32)
    return altered(source, target, tensors=repeated)


UNLIKE = ("gemma4",)
"""Layers whose heads differ in number or size."""


@pytest.mark.parametrize("name", [name for name in GGUF_CASES if name.startswith(UNLIKE)])
def test_layers_whose_heads_differ_are_refused(name: str, tmp_path: Path) -> None:
    config = GGUF_CASES[name]
    source = gguf_of(tmp_path / "a.gguf", config, tensors_of(config))
    with pytest.raises(InvalidInput, match=r"layers whose heads differ in number or size"):
        pool_kv_heads(source, tmp_path / "pooled.gguf", 1)


@pytest.mark.parametrize("name", [name for name in GGUF_CASES if not name.startswith((*FUSED, *UNLIKE))])
def test_equal_heads_pool_without_loss(name: str, tmp_path: Path) -> None:
    config = GGUF_CASES[name]
    source = with_equal_heads(gguf_of(tmp_path / "a.gguf", config, tensors_of(config)), tmp_path / "b.gguf")
    before = read_spec(read_gguf(source))
    if before.num_kv_heads == 1:
        with pytest.raises(InvalidInput, match="fewest"):
            pool_kv_heads(source, tmp_path / "c.gguf", 1)
        return
    assert pool_kv_heads(source, tmp_path / "c.gguf", 1) == before
    models = [load_model(path, NativeOps("int16", threads=1)) for path in (source, tmp_path / "c.gguf")]
    assert models[1].decoder.spec == dataclasses.replace(before, num_kv_heads=1)
    wanted, found = (teacher_forced(model.decoder, TOKENS, kv_dtype="f32", chunks=(150, 1, 64)) for model in models)
    np.testing.assert_allclose(
        found, wanted, rtol=0, atol=1e-3
    )  # a third of three equal values is not quite that value


@pytest.mark.parametrize("name", [name for name in GGUF_CASES if name.startswith(FUSED)])
def test_fused_projections_are_refused(name: str, tmp_path: Path) -> None:
    config = GGUF_CASES[name]
    source = gguf_of(tmp_path / "a.gguf", config, tensors_of(config))
    with pytest.raises(InvalidInput, match=r"one matrix|fewest"):
        pool_kv_heads(source, tmp_path / "b.gguf", 1)
    assert not (tmp_path / "b.gguf").exists()
