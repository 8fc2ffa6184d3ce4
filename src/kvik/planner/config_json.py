"""A model's shape from its config.json, which nobody vouches for: every figure is checked before it is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvik.files.config_fields import read_json_object
from kvik.models.config_classes import text_part, with_defaults
from kvik.models.hf_expert_counts import num_chosen, num_experts, token_intermediate_size
from kvik.models.hf_layers import read_layers
from kvik.models.hf_params import count_params
from kvik.planner.shape import ModelShape, shape_of_layers


def read_config(path: Path, name: str) -> ModelShape:
    """The shape that a config.json describes. Raises `ModelError`, which names the field."""
    return shape_of_config(read_json_object(path), path, name)


def shape_of_config(config: Mapping[str, Any], path: Path, name: str) -> ModelShape:
    """The same of a config that was read from `path`."""
    fields = with_defaults(text_part(config, path))
    kept = read_layers(fields)
    params = count_params(fields, kept)
    width = None
    if not isinstance(fields.find("intermediate_size"), list | None):
        dense = fields.count("intermediate_size")
        width = token_intermediate_size(fields, kept.model_type, len(kept.layers), dense)
    experts = num_experts(fields)
    return replace(
        shape_of_layers(kept, name, "config.json", path, params.total if params else None),
        is_mixture=experts > 0,
        num_active_params=params.active if params else None,
        num_experts=experts,
        num_chosen_experts=num_chosen(fields) if experts else 0,
        num_table_params=params.table if params else 0,
        intermediate_size=width,
    )
