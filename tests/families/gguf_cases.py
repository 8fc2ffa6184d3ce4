"""The families' small checkpoints as far as GGUF files can say what they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from families.cases import CASES
from families.checkpoints import FloatArray, tensor
from kvik.models.hf_parts import hf_parts
from kvik.models.hf_spec import read_hf_spec

_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 80}

_CHANGES: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neox": {},
    "gpt_neox-serial": {"hidden_act": "gelu", "attention_bias": True, "rope_scaling": None},
    "falcon-7b": {},
    "falcon-40b": {},
    "falcon-11b": {"bias": False, "rope_theta": 10_000.0},
    "llama": {},
    "llama-biases": {},
    "llama-3.2": {},
    "llama-yarn": {"rope_scaling": _YARN},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "qwen2-yarn": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 96},
    "gemma3_text": {"query_pre_attn_scalar": 64, "sliding_window_pattern": 6, "num_hidden_layers": 7},
    # llama.cpp has the last two layers with keys of their own be one with a window and one without.
    "gemma4-e2b": {
        "layer_types": [
            f"{kind}_attention" for kind in ("sliding", "full", "sliding", "full", "sliding", "sliding", "full")
        ]
    },
    "gemma4-26b": {},
    "gemma4-12b": {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
    "phi": {},
    "phi3": {"sliding_window": None},
    "phi3-long": {},
    "phi3-short": {},
    "smollm3": {"no_rope_layers": None, "no_rope_layer_interval": 4, "num_hidden_layers": 5},
    "granite": {},
    "qwen3_moe": {},
    "qwen2_moe": {},
    "olmoe": {"num_key_value_heads": 6},
    "mixtral": {"sliding_window": None},
    "granitemoe": {},
    "granitemoeshared": {"attention_bias": False},
    "gpt_oss": {},
    "gpt_oss-mxfp4": {"layer_types": None},
    "olmo2": {},
    "olmo3": {"num_hidden_layers": 5},
    "starcoder2": {"sliding_window": None},
    "ministral3": {},
    # llama.cpp knows of windows where there are 64 layers, and of heads that make up the hidden size.
    "exaone4": {
        "hidden_size": 80,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 64,
        "num_hidden_layers": 64,
        "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 16,
    },
    "exaone4-full": {"hidden_size": 240},
    "glm4": {},
    "ernie4_5": {},
    "hunyuan_v1_dense": {},
    "seed_oss": {},
    "cohere": {},
    "cohere2": {},
    "apertus": {},
    "arcee": {},
}
"""What no key of a GGUF file tells, or what llama.cpp does not run, is as all of that family have it."""

GGUF_CASES: Mapping[str, Mapping[str, Any]] = {name: {**CASES[name], **changes} for name, changes in _CHANGES.items()}
"""The config.json of each."""


def tensors_of(config: Mapping[str, Any]) -> dict[str, FloatArray]:
    """All tensors of the checkpoint."""
    spec = read_hf_spec(config, Path("config.json"))
    parts = hf_parts(spec, ()).values()
    if "quantization_config" in config:
        parts = hf_parts(spec, {f"{part.stored}_blocks" for part in parts if part.item is not None}).values()
    shapes = {part.stored: part.shape for part in parts}
    shapes |= {part.scales: part.shape[:-1] for part in parts if part.scales is not None}
    return {name: tensor(name, shape) for name, shape in shapes.items()}
