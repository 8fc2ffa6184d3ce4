"""Experts that a config.json has, their width and their layers: what decides memory and speed, of any class.

Source: the configuration and modeling classes of transformers 5.23.
"""

from __future__ import annotations

import reprlib
from collections.abc import Collection

from kvik.files.config_fields import ConfigFields

COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Names of the number of experts."""

_ONE_DENSE = ("glm4_moe_lite", "axk1", "hy_v3")
"""Classes whose first layer is dense where the config does not say how many are."""


def num_experts(config: ConfigFields) -> int:
    """Experts of a layer that has some; 0: a model without, as one with a single one is to the planner."""
    found = stated_experts(config)
    return found if found > 1 else 0


def stated_experts(config: ConfigFields) -> int:
    """The number that the config has of them; 0: none."""
    found = next((number for key in COUNTS if (number := config.optional(key))), 0)
    if not found and (inner := config.object("ffn_config")) is not None:
        found = inner.optional("moe_num_experts") or 0
    return found


def num_chosen(config: ConfigFields) -> int:
    """Experts that a token goes through."""
    keys = ("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "top_k_experts")
    return next((number for key in keys if (number := config.optional(key))), 2)


def expert_width(config: ConfigFields, width: int) -> int:
    """The intermediate size of one expert, where that of an MLP is `width`."""
    found = config.find("moe_intermediate_size")
    if isinstance(found, list):
        found = found[0] if found and type(found[0]) is int else None
        return width if found is None else ConfigFields({"0": found}, config.path).count("0")
    return width if found is None else config.count("moe_intermediate_size")


def shared_width(config: ConfigFields, model_type: str, of_one: int) -> int:
    """The intermediate size of what every token goes through beside its experts; 0: nothing."""
    if model_type == "llama4_text":
        return of_one
    if model_type == "gemma4_text":
        return config.count("intermediate_size")
    for key in ("shared_expert_intermediate_size", "shared_intermediate_size"):
        if own := config.optional(key):
            return own
    keys = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
    return next((number for key in keys if (number := config.optional(key))), 0) * of_one


def sparse_layers(config: ConfigFields, model_type: str, num_layers: int) -> Collection[int]:
    """Layers that have experts; the others have one MLP."""
    types = config.list("mlp_layer_types", num_layers, (str,))
    if types is not None:
        return {index for index, one in enumerate(types) if one == "sparse"}
    if model_type == "llama4_text":
        step = config.count("interleave_moe_layer_step", 1)
        return _indices(config, "moe_layers", range(step - 1, num_layers, step))
    if model_type == "ernie4_5_moe":
        bounds = [config.fields.get(f"moe_layer_{end}_index", other) for end, other in (("start", 1), ("end", -1))]
        if any(type(one) is not int for one in bounds):
            raise config.error(f"moe_layer_start_index and moe_layer_end_index are {reprlib.repr(bounds)}, not indices")
        start, last = bounds[0], num_layers - 1 if bounds[1] == -1 else bounds[1]
        every = config.count("moe_layer_interval", 1)
        return {index for index in range(num_layers) if (index + 1) % every == 0 and start <= index <= last}
    only_dense = _indices(config, "mlp_only_layers", ())
    step = config.count("decoder_sparse_step", 1)
    first = config.optional("first_k_dense_replace") or (1 if model_type in _ONE_DENSE else 0)
    return {index for index in range(first, num_layers) if index not in only_dense and (index + 1) % step == 0}


def token_intermediate_size(config: ConfigFields, model_type: str, num_layers: int, width: int) -> int:
    """Items between up and down that a token has in the layer where it has most, where an MLP is so wide."""
    if not num_experts(config):
        return width
    of_one = expert_width(config, width)
    sparse = num_chosen(config) * of_one + shared_width(config, model_type, of_one)
    return max(sparse, width if len(sparse_layers(config, model_type, num_layers)) < num_layers else 0)


def _indices(config: ConfigFields, key: str, default: Collection[int]) -> Collection[int]:
    found = config.find(key)
    if found is None:
        return default
    if not isinstance(found, list) or any(type(one) is not int for one in found):
        raise config.error(f"{key} is {reprlib.repr(found)}; it must be a list of layers' indices")
    return set(found)
