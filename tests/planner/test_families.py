"""Headers of every family's GGUF files: held bytes are those of the packed weights, layers those of the decoder."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from families.gguf_cases import GGUF_CASES, tensors_of
from families.gguf_of import gguf_of
from kvik import LLM, plan
from kvik.config import KVDType
from kvik.models.loader import load_model
from kvik.ops.native import NativeOps
from kvik.planner.gguf_header import read_header
from models import beside_the_file


@pytest.mark.parametrize("name", GGUF_CASES)
def test_the_header_is_what_is_held(name: str, tmp_path: Path) -> None:
    path = gguf_of(tmp_path / "model.gguf", GGUF_CASES[name], tensors_of(GGUF_CASES[name]))
    shape = read_header(path, name)
    decoder = load_model(path, NativeOps("int8", threads=1)).decoder
    spec, weights, tensors = decoder.spec, decoder.weights, shape.tensors
    assert tensors is not None
    norms = [layer.attn_norm for layer in weights.layers if layer.attn_norm is layer.mlp_norm]
    shared_norms = sum(norm.num_bytes for norm in norms if norm is not None)  # read twice, and held once
    apart = shared_norms + beside_the_file(decoder)
    assert tensors.step_bytes == decoder.step_bytes(spec.kv_spec("f16"), 1, 1) - apart
    positions = 0 if weights.positions is None else weights.positions.num_bytes
    looked_up = positions + (0 if spec.tied_head else weights.embedding.num_bytes)
    every_row = decoder.step_bytes(spec.kv_spec("f16"), 1 << 20, 1)  # all experts are chosen by some
    assert tensors.held_bytes == every_row - apart + looked_up
    assert tensors.format == "f32"
    assert shape.runs
    of_queries = 0 if spec.query_scale is None else 4
    assert shape.rope_token_bytes == sum(8 * rope.num_pairs for rope in spec.ropes) + of_queries
    assert {group.window for group in shape.groups} == {layer.window for layer in spec.layers}
    own = sum(layer.kv_from is None for layer in spec.layers)
    assert sum(group.num_layers for group in shape.groups) == own
    assert len(shape.shared_layers) == spec.num_layers - own
    assert all((group.kind == "full") == (group.window is None) for group in shape.groups)


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "gemma4-e2b", "gemma4-12b", "olmo3", "phi3-long", "gpt2"])
@pytest.mark.parametrize("dtype", get_args(KVDType))
def test_the_cache_has_the_planned_bytes(name: str, dtype: KVDType, tmp_path: Path) -> None:
    """With windows in some layers and without."""
    path = gguf_of(tmp_path / "model.gguf", GGUF_CASES[name], tensors_of(GGUF_CASES[name]))
    planned = plan(str(path), context=300, users=2, kv=dtype)
    llm = LLM(str(path), threads=1, kv_dtype=dtype, kv_memory=planned.kv.num_bytes)
    assert llm.cache.num_bytes == planned.kv.num_bytes
