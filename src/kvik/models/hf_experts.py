"""The experts of a config.json that kvik runs: those that hf_expert_counts.py counts, and how some are chosen.

Source: the configuration and modeling classes of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from kvik.files.config_fields import ConfigFields
from kvik.models.hf_expert_counts import (
    COUNTS,
    expert_width,
    num_chosen,
    shared_width,
    sparse_layers,
    stated_experts,
)
from kvik.models.spec import ExpertsSpec
from kvik.ops.base import Routing


def _softmax(config: ConfigFields, chosen: int) -> dict[str, Any]:
    return {"routing": Routing(chosen, renormalize=config.flag("norm_topk_prob", False))}


def _qwen2_moe(config: ConfigFields, chosen: int) -> dict[str, Any]:
    return _softmax(config, chosen) | {"shared_gate": True}


def _mixtral(config: ConfigFields, chosen: int) -> dict[str, Any]:
    return {"routing": Routing(chosen, renormalize=True)}


def _granite(config: ConfigFields, chosen: int) -> dict[str, Any]:
    return {"routing": Routing(chosen, "logits")}


def _gpt_oss(config: ConfigFields, chosen: int) -> dict[str, Any]:
    return {"routing": Routing(chosen, "logits"), "router_bias": True, "bias": True}


def _gemma4(config: ConfigFields, chosen: int) -> dict[str, Any]:
    return {"routing": Routing(chosen, renormalize=True), "scales": True, "own_norms": True}


EXPERTS: Mapping[str, Callable[[ConfigFields, int], dict[str, Any]]] = {
    "qwen3_moe": _softmax,
    "qwen2_moe": _qwen2_moe,
    "olmoe": _softmax,
    "mixtral": _mixtral,
    "granitemoe": _granite,
    "granitemoeshared": _granite,
    "gpt_oss": _gpt_oss,
    "gemma4_text": _gemma4,
}
"""By model_type: fields of `ExpertsSpec`, besides those that all families have, of a config whose tokens choose so many
experts."""


def refuse_experts(config: ConfigFields, model_type: str) -> None:
    """Raise `ModelError` for experts in a family that kvik runs without; a dense Hunyuan says that it has one."""
    if model_type in EXPERTS:
        return
    for key in COUNTS:
        if (config.optional(key) or 0) > 1:
            raise config.error(f"{key} is {config.optional(key)}: a mixture of experts, which kvik does not run yet")


def read_experts(
    config: ConfigFields, model_type: str, num_layers: int, width: int
) -> tuple[ExpertsSpec | None, Collection[int]]:
    """The experts of a decoder whose MLPs are so wide, and the layers that have them. Raises `ModelError`."""
    if model_type not in EXPERTS or (model_type == "gemma4_text" and not config.flag("enable_moe_block", False)):
        return None, ()
    number = stated_experts(config)
    if not number:
        raise config.error("has no number of experts")
    sparse = sparse_layers(config, model_type, num_layers)
    if not sparse:
        return None, ()
    of_one = expert_width(config, width)
    experts = ExpertsSpec(
        num_experts=number,
        intermediate_size=of_one,
        shared_size=shared_width(config, model_type, of_one),
        **EXPERTS[model_type](config, num_chosen(config)),
    )
    return experts, sparse
