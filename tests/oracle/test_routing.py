"""How experts are chosen and weighted, against the routers of transformers, in both backends."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kvik.ops.base import Expert, ExpertsWeights, Linear, Ops, Routing
from kvik.ops.native import NativeOps
from kvik.ops.reference import ReferenceOps
from oracle.hf_llama import FloatArray

NUM_EXPERTS, NUM_ROWS, INNER = 16, 200, 4


@dataclass(frozen=True, slots=True)
class Rule:
    """A router's class, its config, and the same in kvik's words."""

    module: str
    name: str
    routing: Routing
    config: dict[str, Any] = field(default_factory=dict)
    bias: str = ""  # the buffer that is added to the scores to choose by, "argument": it is given with the rows


RULES = (
    Rule("qwen3_moe", "Qwen3MoeTopKRouter", Routing(3, renormalize=True), {"norm_topk_prob": True}),
    Rule("qwen2_moe", "Qwen2MoeTopKRouter", Routing(3), {"norm_topk_prob": False}),
    Rule("olmoe", "OlmoeTopKRouter", Routing(16), {"norm_topk_prob": False}),
    Rule("mixtral", "MixtralTopKRouter", Routing(2, renormalize=True)),
    Rule("granitemoe", "GraniteMoeTopKRouter", Routing(5, "logits")),
    Rule("gpt_oss", "GptOssTopKRouter", Routing(4, "logits")),
    Rule(
        "deepseek_v3",
        "DeepseekV3TopkRouter",
        Routing(4, "sigmoid", renormalize=True, min_sum=1e-20, scale=2.5, num_groups=4, num_chosen_groups=2),
        {"norm_topk_prob": True, "routed_scaling_factor": 2.5, "n_group": 4, "topk_group": 2},
        "e_score_correction_bias",
    ),
    Rule(
        "lfm2_moe",
        "Lfm2MoeTopKRouter",
        Routing(3, "sigmoid", renormalize=True, min_sum=1e-6, scale=1.5),
        {"norm_topk_prob": True, "routed_scaling_factor": 1.5, "use_expert_bias": True},
        "argument",
    ),
)


def weights_of(ops: Ops, logits: FloatArray, routing: Routing, bias: FloatArray | None) -> FloatArray:
    """What each row's experts are weighted with, 0 for the others: expert i adds to item i alone, and adds 1."""

    def linear(values: FloatArray) -> Linear:
        rows, columns = values.shape
        return Linear(ops.load_weight("F32", values.reshape(-1).view(np.uint8), rows, columns))

    up = np.zeros((INNER, NUM_EXPERTS), np.float32)
    up[:, 0] = 1
    downs = np.zeros((NUM_EXPERTS, NUM_EXPERTS, INNER), np.float32)
    downs[np.arange(NUM_EXPERTS), np.arange(NUM_EXPERTS), 0] = 1
    experts = tuple(Expert(up=linear(up), down=linear(down)) for down in downs)
    x = np.zeros_like(logits)
    x[:, 0] = 1
    return ops.to_numpy(ops.experts(x, logits, ExpertsWeights(routing, experts, bias), "relu"))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("ops", [NativeOps(threads=1), ReferenceOps()], ids=lambda ops: ops.name)
def test_routers(rule: Rule, ops: Ops) -> None:
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 2, (NUM_ROWS, NUM_EXPERTS)).astype(np.float32)
    bias = rng.normal(0, 0.3, NUM_EXPERTS).astype(np.float32) if rule.bias else None
    counts = {"num_experts": NUM_EXPERTS, "num_local_experts": NUM_EXPERTS, "hidden_size": NUM_EXPERTS}
    config = SimpleNamespace(**counts, num_experts_per_tok=rule.routing.num_chosen, **rule.config)
    module = importlib.import_module(f"transformers.models.{rule.module}.modeling_{rule.module}")
    router = getattr(module, rule.name)(config)
    with torch.no_grad():
        router.weight.copy_(torch.eye(NUM_EXPERTS))  # so that rows are logits
        more = [torch.from_numpy(bias)] if rule.bias == "argument" else []
        if bias is not None and not more:
            getattr(router, rule.bias).copy_(torch.from_numpy(bias))
        _, weights, chosen = router(torch.from_numpy(logits), *more)
        wanted = torch.zeros(NUM_ROWS, NUM_EXPERTS).scatter_(1, chosen, weights).numpy()
    found = weights_of(ops, logits, rule.routing, bias)
    np.testing.assert_array_equal(found > 0, wanted > 0)
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=0)
