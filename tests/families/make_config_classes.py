"""Writes src/kvik/models/config_classes.json: what transformers' config classes take where a config.json is silent.

Run in the oracle's venv: `python -m families.make_config_classes` in tests/.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import kvik.models.config_classes
from kvik.files.config_fields import OTHER_NAMES

FIELDS = {
    # What all have, in one way or another.
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "max_position_embeddings", "tie_word_embeddings"),
    # Which layers remember what.
    *("sliding_window", "use_sliding_window", "max_window_layers", "sliding_window_pattern", "attention_chunk_size"),
    *("global_attn_every_n_layers", "no_rope_layer_interval", "layer_group_size", "attn_layer_indices"),
    *("attn_layer_period", "attn_layer_offset", "full_attn_idxs", "block_types", "num_kv_shared_layers"),
    *("num_layers", "H_cycles", "L_cycles", "multi_query", "new_decoder_architecture", "num_kv_heads"),
    *("swa_head_dim", "swa_num_key_value_heads", "swa_num_attention_heads", "local_attention"),
    *("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "index_head_dim"),
    *("index_n_heads", "indexer_head_dim", "indexer_kv_heads", "indexer_compress_ratio", "attention_k_eq_v"),
    *("global_head_dim", "num_global_key_value_heads"),
    # Experts.
    *("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"),
    *("n_shared_experts", "num_shared_experts", "shared_expert_intermediate_size", "shared_intermediate_size"),
    *("first_k_dense_replace", "decoder_sparse_step", "moe_layer_start_index", "moe_layer_end_index"),
    *("moe_layer_interval", "interleave_moe_layer_step", "intermediate_size_mlp", "expert_layer_period"),
    *("expert_layer_offset", "num_dense_layers", "moe_num_shared_experts"),
    # Linear attention.
    *("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
}  # fmt: skip


def classes() -> dict[str, dict[str, Any]]:
    """Of each model_type of a causal language model: its class's defaults and its own names of fields."""
    made: dict[str, dict[str, Any]] = {}
    for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        cls = CONFIG_MAPPING[name]
        inner = getattr(cls, "sub_configs", {}).get("text_config")
        if getattr(inner, "model_type", None) in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            continue  # a wrapper, of which `wrappers` tells
        made[name] = _class(cls)
        if inner is not None and getattr(inner, "model_type", None):
            made[inner.model_type] = _class(inner)  # a text part that no model of its own has
    return dict(sorted(made.items()))


def _class(cls: type[Any]) -> dict[str, Any]:
    stored = {field.name: field.default for field in dataclasses.fields(cls)}
    own = {
        stored_name: name
        for name, stored_name in cls.attribute_map.items()
        if name in FIELDS and stored_name not in FIELDS
    }
    own |= {one: name for name, others in OTHER_NAMES.items() for one in others if one in stored and name not in stored}
    defaults = {own.get(key, key): value for key, value in stored.items() if own.get(key, key) in FIELDS}
    defaults = {
        key: value
        for key, value in defaults.items()
        if isinstance(value, bool | int | str | list | tuple) or key == "sliding_window"
    }
    entry: dict[str, Any] = {"defaults": dict(sorted(defaults.items()))}
    if own := {one: name for one, name in own.items() if name not in OTHER_NAMES or one not in OTHER_NAMES[name]}:
        entry["names"] = dict(sorted(own.items()))
    if stored.get("is_encoder_decoder") is True:
        entry["encoder_decoder"] = True
    return entry


def wrappers() -> dict[str, str]:
    """From the model_type of a config with a text_config to the one that its class takes where that has none."""
    found = {}
    for name, cls in CONFIG_MAPPING.items():
        inner = getattr(cls, "sub_configs", {}).get("text_config")
        kind = getattr(inner, "model_type", None)
        if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or (kind and name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
            found[name] = kind
    return dict(sorted(found.items()))


def text() -> str:
    """The file, a line for each class."""
    lines = [f" {json.dumps(name)}: {json.dumps(entry)}" for name, entry in classes().items()]
    return f'{{"wrappers": {json.dumps(wrappers())},\n"classes": {{\n{(",").join(lines)}\n}}}}\n'.replace(
        "},  ", "},\n "
    )


if __name__ == "__main__":
    path = Path(kvik.models.config_classes.__file__).with_suffix(".json")
    path.write_text(text(), encoding="utf-8")
