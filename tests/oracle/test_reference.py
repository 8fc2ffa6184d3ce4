"""The reference itself: two readings of the same file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType

from gguf_files import tiny_llama
from oracle.hf_llama import build, load


def assert_same_model(model: Any, other: Any) -> None:
    weights, others = model.state_dict(), other.state_dict()
    assert weights.keys() == others.keys()
    for name in weights:
        assert weights[name].dtype == torch.float32
        assert torch.equal(weights[name], others[name]), name
    assert torch.equal(model.model.rotary_emb.inv_freq, other.model.rotary_emb.inv_freq)
    assert model.config.rms_norm_eps == other.config.rms_norm_eps
    assert model.config._attn_implementation == other.config._attn_implementation == "eager"


def test_both_readings_of_the_default_model_are_equal(default_model_path: Path, hf_model: Any) -> None:
    assert_same_model(hf_model, build(default_model_path))


def test_both_readings_of_an_untied_model_of_many_types_are_equal(tmp_path: Path) -> None:
    kinds = {
        "token_embd": GGMLQuantizationType.Q8_0,
        "attn_q": GGMLQuantizationType.Q4_0,
        "attn_k": GGMLQuantizationType.Q5_1,
        "ffn_down": GGMLQuantizationType.F16,
        "output": GGMLQuantizationType.Q6_K,
    }
    path = tiny_llama(
        tmp_path / "tiny.gguf",
        num_heads=6,
        num_kv_heads=2,
        head_dim=128,
        intermediate_size=256,
        tied=False,
        weight_type=kinds,
        rope_freq_base=500_000.0,
    )
    assert_same_model(load(path), build(path))
