"""The weights of a decoder counted from its config.json: those of matrices, which are all but a thousandth.

Source: the modules of transformers 5.23; tests/oracle/test_config_classes.py counts those of every class.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvik.files.config_fields import ConfigFields
from kvik.models.hf_expert_counts import expert_width, num_chosen, num_experts, shared_width, sparse_layers
from kvik.models.hf_layers import KeptLayers

_GATED = (
    *("llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "phi3", "smollm3", "granite", "olmo", "olmo2"),
    *(
        "olmo3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "vaultgemma",
        "cohere",
        "cohere2",
        "cwm",
        "ernie4_5",
        "exaone4",
        "glm",
    ),
    *("glm4", "helium", "hunyuan_v1_dense", "hyperclovax", "seed_oss", "stablelm", "internlm3", "iquestcoder", "youtu"),
    *("minicpm3", "granite_swa", "bitnet"),
)
"""model_types whose MLP has three matrices."""

_TWO = ("arcee", "apertus", "nemotron", "jais2", "nanochat", "starcoder2", "phi", "gpt_neox", "gptj", "codegen")
"""model_types whose MLP has two."""

_EXPERTS = (
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "phimoe", "gpt_oss", "granitemoe", "deepseek_v2"),
    *("granitemoe_swa", "granitemoeshared", "deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa"),
    *("dots1", "ernie4_5_moe", "hunyuan_v1_moe", "minimax_m2", "llama4_text", "solar_open", "exaone_moe", "hy_v3"),
    *("axk1", "mellum", "minimax_m3_vl_text", "cohere2_moe"),
)
"""model_types with experts of three matrices, in all layers or some."""


@dataclass(frozen=True, slots=True)
class Params:
    """Numbers of weights."""

    total: int
    active: int  # that one token is multiplied with, and its row of the embedding's table counted whole
    table: int  # of an embedding table that is only looked up


def count_params(config: ConfigFields, kept: KeptLayers) -> Params | None:
    """All weights, and the active ones; `None` where the family's matrices do not follow from the config."""
    model_type, experts = kept.model_type, num_experts(config)
    if model_type in ("gemma4_text", "gemma4_unified_text"):
        return _of_gemma4(config, kept)
    if model_type not in (*_GATED, *_TWO, *_EXPERTS) or (experts > 0) != (model_type in _EXPERTS):
        return None
    width = config.find("intermediate_size")
    if width is None and model_type in _TWO:
        width = 4 * kept.hidden_size
    if type(width) is not int:
        return None
    table = kept.vocab_size * kept.hidden_size
    tied = config.flag("tie_word_embeddings", False)
    attention = _attention(config, kept)
    dense = (2 if model_type in _TWO else 3) * kept.hidden_size * width
    total = active = attention + (1 if tied else 2) * table
    sparse = sparse_layers(config, model_type, len(kept.layers)) if experts else ()
    for layer in range(len(kept.layers)):
        if layer not in sparse:
            plain = dense
            if model_type == "llama4_text":
                plain = 3 * kept.hidden_size * config.count("intermediate_size_mlp", width)
            total, active = total + plain, active + plain
            continue
        of_one = expert_width(config, width)
        one = 3 * kept.hidden_size * of_one
        router = kept.hidden_size * (experts + (model_type == "qwen2_moe"))  # and the gate of its shared experts
        shared = router + 3 * kept.hidden_size * shared_width(config, model_type, of_one)
        total += shared + experts * one
        active += shared + min(num_chosen(config), experts) * one
    return Params(total, active, 0 if tied else table)


def _of_gemma4(config: ConfigFields, kept: KeptLayers) -> Params:
    """Some layers' MLPs are twice as wide, each has its own embedding of a token, and experts are beside the MLPs."""
    hidden, layers = kept.hidden_size, len(kept.layers)
    num_shared = sum(layer.kv_from is not None for layer in kept.layers)
    num_mlps = layers + (num_shared if config.flag("use_double_wide_mlp", False) else 0)
    active = _attention(config, kept) + kept.vocab_size * hidden
    active += 3 * hidden * config.count("intermediate_size") * num_mlps
    width = layers * gemma4_layer_embedding_size(config)
    table = config.count("vocab_size_per_layer_input", 262_144) * width
    active += table + 3 * hidden * width
    total = active
    if config.flag("enable_moe_block", False):
        experts, one = config.count("num_experts"), 3 * hidden * config.count("moe_intermediate_size")
        total += layers * experts * (hidden + one)
        active += layers * (experts * hidden + min(config.count("top_k_experts"), experts) * one)
    return Params(total, active, table)


def gemma4_layer_embedding_size(config: ConfigFields) -> int:
    """Of a token in each layer of Gemma 4; 0: there is none. The class has a default, and null switches it off."""
    if config.text("model_type") != "gemma4_text":
        return 0
    given = "hidden_size_per_layer_input" in config.fields
    return (config.optional("hidden_size_per_layer_input") or 0) if given else 256


def _attention(config: ConfigFields, kept: KeptLayers) -> int:
    hidden, heads, total = kept.hidden_size, kept.num_heads, 0
    for layer in kept.layers:
        if layer.kind == "latent":
            rank, rotary, width = layer.value_dim, layer.num_rotary, kept.head_dim
            values = config.count("v_head_dim", hidden // heads)
            low = config.optional("q_lora_rank")
            total += hidden * low + low * heads * width if low else hidden * heads * width
            total += hidden * (rank + rotary) + rank * heads * (width - rotary + values) + heads * values * hidden
            if layer.index_dim and low:
                choosers = config.count("index_n_heads")
                total += (low * choosers + hidden) * layer.index_dim + hidden * choosers
        else:
            as_values = kept.model_type.startswith("gemma4") and config.flag("attention_k_eq_v", False)
            value_dim = 0 if as_values and not layer.slides else layer.value_dim
            own = layer.num_kv_heads * (layer.key_dim + value_dim) if layer.kv_from is None else 0
            total += hidden * (2 * heads * layer.key_dim + own)
    return total
