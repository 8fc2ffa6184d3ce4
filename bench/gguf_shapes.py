"""What a GGUF file says of a model's shape, and its tensors, from a config.json: as llama.cpp's converter writes them.

Source: the classes of each architecture in llama.cpp's `conversion`, and the tensors that its `src/models` load.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gguf import GGUFWriter, RopeScalingType


@dataclass(frozen=True)
class Family:
    """What no field of a config tells."""

    architecture: str
    qk_norm: Literal["none", "head", "row"] = "none"
    qkv_bias: bool = False
    other_biases: bool = False  # of the attention's output, the router and the experts
    has_sinks: bool = False
    ffn_norm: str = "ffn_norm"  # the name of the norm before the MLP


FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama"),
    "qwen2": Family("qwen2", qkv_bias=True),
    "qwen3": Family("qwen3", "head"),
    "olmoe": Family("olmoe", "row"),
    "qwen3_moe": Family("qwen3moe", "head"),
    "gpt_oss": Family("gpt-oss", qkv_bias=True, other_biases=True, has_sinks=True, ffn_norm="post_attention_norm"),
}
"""By model_type; of other families a file would need keys that are not written here."""


def family_of(config: Mapping[str, Any]) -> Family:
    """Raises `ValueError` for one of which no file is made."""
    name = str(config.get("model_type"))
    if name not in FAMILIES:
        raise ValueError(f"{name}: only the shapes of {', '.join(FAMILIES)} are made")
    return FAMILIES[name]


def num_experts(config: Mapping[str, Any]) -> int:
    """Experts of each layer; 0: it has one MLP."""
    return int(config.get("num_experts", config.get("num_local_experts", 0)))


def expert_size(config: Mapping[str, Any]) -> int:
    """The inner size of one expert."""
    return int(config.get("moe_intermediate_size", config["intermediate_size"]))


def head_dim(config: Mapping[str, Any]) -> int:
    """Dimensions of a head."""
    return int(config.get("head_dim", config["hidden_size"] // config["num_attention_heads"]))


def add_shape(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    """Write the keys of the architecture."""
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_rope_freq_base(float(config["rope_theta"]))
    if scaling := config.get("rope_scaling"):
        if scaling["rope_type"] != "yarn":
            raise ValueError(f"rope_scaling of type {scaling['rope_type']}: only yarn is written")
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(scaling["factor"]))
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    if window := config.get("sliding_window"):
        writer.add_sliding_window(window)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if experts := num_experts(config):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(expert_size(config))


def tensors(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes, the slowest dimension first: (experts, rows, columns) of an expert's matrices."""
    family, hidden, dim = family_of(config), config["hidden_size"], head_dim(config)
    queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    experts, inner = num_experts(config), expert_size(config)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (config["vocab_size"], hidden)}

    def linear(name: str, *shape: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = shape
        if bias:
            shapes[f"{name}.bias"] = shape[:-1]

    for layer in (f"blk.{index}" for index in range(config["num_hidden_layers"])):
        shapes[f"{layer}.attn_norm.weight"] = (hidden,)
        for name, rows in (("attn_q", queries), ("attn_k", keys), ("attn_v", keys)):
            linear(f"{layer}.{name}", rows, hidden, bias=family.qkv_bias)
        if family.qk_norm != "none":
            by_head = family.qk_norm == "head"
            shapes[f"{layer}.attn_q_norm.weight"] = (dim if by_head else queries,)
            shapes[f"{layer}.attn_k_norm.weight"] = (dim if by_head else keys,)
        if family.has_sinks:
            shapes[f"{layer}.attn_sinks.weight"] = (config["num_attention_heads"],)
        linear(f"{layer}.attn_output", hidden, queries, bias=family.other_biases)
        shapes[f"{layer}.{family.ffn_norm}.weight"] = (hidden,)
        of_expert, suffix = ((experts,), "_exps") if experts else ((), "")
        if experts:
            linear(f"{layer}.ffn_gate_inp", experts, hidden, bias=family.other_biases)
        linear(f"{layer}.ffn_gate{suffix}", *of_expert, inner, hidden, bias=family.other_biases)
        linear(f"{layer}.ffn_up{suffix}", *of_expert, inner, hidden, bias=family.other_biases)
        linear(f"{layer}.ffn_down{suffix}", *of_expert, hidden, inner, bias=family.other_biases)
    shapes["output_norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings", False):
        shapes["output.weight"] = (config["vocab_size"], hidden)
    return shapes
