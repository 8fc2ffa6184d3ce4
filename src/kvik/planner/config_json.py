"""A model's shape from its config.json, which nobody vouches for: every figure is checked before it is used.

Source: configuration classes of transformers 5 (field names and defaults of each model_type).
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvik.cache import GroupSpec
from kvik.cache.spec import GroupKind
from kvik.files.config_fields import MAX_CONTEXT, ConfigFields, read_json_object
from kvik.planner.shape import ModelShape, group_without_kv, kv_group, latent_group

MAX_PLANNED_LAYERS = 1 << 14
MAX_PLANNED_HEAD_DIM = 1 << 12

_LAYER_TYPES: dict[str, GroupKind] = {
    "full_attention": "full",
    "attention": "full",
    "sliding_attention": "window",
    "chunked_attention": "chunk",
    "linear_attention": "state",
    "mamba": "state",
    "conv": "state",
}
_GATED = ("llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "granite", "olmo2", "gemma", "gemma2", "gemma3_text")
"""model_types of a gated MLP of three matrices, whose weights can be counted from the config alone."""


def read_config(path: Path, name: str) -> ModelShape:
    """The shape that a config.json describes. Raises `ModelError`, which names the field."""
    config = read_json_object(path)
    inner = config.get("text_config")
    if isinstance(inner, dict):  # of a multimodal model
        config = config | inner
    return _Config(config, path).shape(name)


class _Config(ConfigFields):
    """What the fields say of memory."""

    def shape(self, name: str) -> ModelShape:
        num_layers = self.count("num_hidden_layers", maximum=MAX_PLANNED_LAYERS)
        hidden_size = self.count("hidden_size")
        num_heads = self.count("num_attention_heads")
        num_kv_heads = self.kv_heads(num_heads)
        if num_heads % num_kv_heads:
            raise self.error(f"{num_heads} query heads do not divide among {num_kv_heads} KV heads")
        if self.fields.get("head_dim") is None and hidden_size % num_heads:
            raise self.error(f"hidden_size {hidden_size:,} does not divide among {num_heads} heads")
        head_dim = self.count("head_dim", max(1, hidden_size // num_heads), maximum=MAX_PLANNED_HEAD_DIM)
        groups = self.groups(num_layers, num_kv_heads, head_dim)
        if groups[0].kind == "latent":
            head_dim = sum(
                self.count(key, maximum=MAX_PLANNED_HEAD_DIM) for key in ("qk_nope_head_dim", "qk_rope_head_dim")
            )
        is_mixture = any(self.optional(key) for key in ("num_local_experts", "num_experts", "n_routed_experts"))
        shape = ModelShape(
            name=name,
            origin="config.json",
            source=str(self.path),
            num_layers=num_layers,
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            groups=groups,
            max_context=self.count("max_position_embeddings", maximum=MAX_CONTEXT),
            vocab_size=self.count("vocab_size"),
            num_params=None,
            is_mixture=is_mixture,
            intermediate_size=self.optional("intermediate_size"),
        )
        return _with_params(shape, self.fields)

    def kv_heads(self, num_heads: int) -> int:
        """Falcon says it in two other ways."""
        if self.fields.get("multi_query") is True and not self.fields.get("new_decoder_architecture"):
            return 1
        return self.count("num_key_value_heads", self.optional("num_kv_heads") or num_heads, maximum=num_heads)

    def groups(self, num_layers: int, num_kv_heads: int, head_dim: int) -> tuple[GroupSpec, ...]:
        if self.optional("kv_lora_rank"):
            dims = (self.count("kv_lora_rank"), self.count("qk_rope_head_dim", maximum=MAX_PLANNED_HEAD_DIM))
            return (latent_group(num_layers, *dims),)
        kinds = self.kinds(num_layers)
        made: list[GroupSpec] = []
        for kind in sorted(set(kinds), key=("full", "window", "chunk", "state").index):
            number, first = kinds.count(kind), sum(group.num_layers for group in made)
            if kind == "state":
                made.append(group_without_kv(first, number))
                continue
            key = "attention_chunk_size" if kind == "chunk" else "sliding_window"
            window = self.count(key, maximum=MAX_CONTEXT) if kind in ("window", "chunk") else None
            made.append(replace(kv_group(first, number, num_kv_heads, head_dim, window), kind=kind))
        return tuple(made)

    def kinds(self, num_layers: int) -> list[GroupKind]:
        """What each layer remembers."""
        types = self.fields.get("layer_types")
        if types is not None:
            if not isinstance(types, list) or len(types) != num_layers:
                raise self.error(f"layer_types must be a list of {num_layers:,} names")
            for one in types:
                if not isinstance(one, str) or one not in _LAYER_TYPES:
                    raise self.error(f"layer_types has {reprlib.repr(one)} in it, a kind that kvik does not know")
            return [_LAYER_TYPES[one] for one in types]
        window = self.optional("sliding_window")
        if window is None or self.fields.get("use_sliding_window") is False:
            return ["full"] * num_layers
        every = self.optional("sliding_window_pattern")  # Gemma 3: each so-many-th layer sees all
        if every is None:
            every = 2 if self.fields.get("model_type") == "gemma2" else num_layers + 1
        return ["window" if (index + 1) % every else "full" for index in range(num_layers)]


def _with_params(shape: ModelShape, fields: Mapping[str, Any]) -> ModelShape:
    """The shape with its weights counted, where the family's matrices follow from the config."""
    if fields.get("model_type") not in _GATED or shape.is_mixture or shape.intermediate_size is None:
        return shape
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    table = shape.vocab_size * shape.hidden_size
    is_tied = fields.get("tie_word_embeddings", fields["model_type"].startswith("gemma"))
    layers = shape.num_layers * shape.hidden_size * (2 * queries + 2 * keys + 3 * shape.intermediate_size)
    return replace(shape, num_params=layers + (1 if is_tied else 2) * table, num_table_params=0 if is_tied else table)
