"""Mixtures of experts: each way in which files keep them, what their weights come to, and which experts are chosen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from families.cases import CASES
from families.checkpoints import FloatArray
from families.gguf_cases import GGUF_CASES, tensors_of
from families.gguf_of import gguf_of
from families.goldens import golden_of
from families.published import PUBLISHED
from kvik.cli.model_facts import fact_lines, model_facts
from kvik.cli.plan_view import plan_lines
from kvik.errors import ModelError
from kvik.files.config_fields import ConfigFields
from kvik.files.gguf import read_gguf
from kvik.models.config_classes import with_defaults
from kvik.models.decoder import Decoder
from kvik.models.gguf_spec import read_spec
from kvik.models.hf_layers import read_layers
from kvik.models.hf_params import count_params
from kvik.models.hf_spec import read_hf_spec
from kvik.models.loader import load_model
from kvik.models.random_weights import RandomWeights
from kvik.models.weights import read_weights
from kvik.ops.base import Routing
from kvik.ops.native import NativeOps
from kvik.ops.reference import ReferenceOps, choose_experts
from kvik.planner.plan import plan
from kvik.planner.sources import find_shape
from models import beside_the_file
from oracle.teacher_forcing import teacher_forced

PATH = Path("config.json")
TOKENS = [int(token_id) for token_id in np.random.default_rng(8).integers(3, 255, 40)]
MIXTURES = tuple(name for name in CASES if read_hf_spec(CASES[name], PATH).experts is not None)

Stored = dict[str, FloatArray]


def one_tensor_each(tensors: Stored) -> Stored:
    """As files of early 2024."""
    found: Stored = {}
    for name, values in tensors.items():
        if "_exps." in name:
            found |= {name.replace("_exps.", f".{index}."): one for index, one in enumerate(values)}
        else:
            found[name] = values
    return found


def gates_with_ups(tensors: Stored) -> Stored:
    found = {name: values for name, values in tensors.items() if "_gate_exps" not in name and "_up_exps" not in name}
    for name, gates in tensors.items():
        if "_gate_exps" in name:
            ups = tensors[name.replace("_gate_", "_up_")]
            found[name.replace("_gate_", "_gate_up_")] = np.concatenate((gates, ups), axis=1)
    return found


def one_row_as_a_vector(tensors: Stored) -> Stored:
    return {name: values[0] if "_gate_inp_shexp" in name else values for name, values in tensors.items()}


WITHOUT_WIDTHS = {"expert_feed_forward_length": None, "expert_shared_feed_forward_length": None}


@pytest.mark.parametrize("name", ["qwen2_moe", "mixtral"])
@pytest.mark.parametrize(
    ("stored", "extra"),
    [
        (one_tensor_each, {}),
        (one_tensor_each, WITHOUT_WIDTHS),
        (gates_with_ups, {}),
        (one_row_as_a_vector, WITHOUT_WIDTHS),
    ],
    ids=["each", "each-without-widths", "fused", "vector-without-widths"],
)
def test_however_a_gguf_file_keeps_them(
    name: str, stored: Callable[[Stored], Stored], extra: Mapping[str, Any], tmp_path: Path
) -> None:
    config = GGUF_CASES[name]
    tensors = tensors_of(config)
    usual = load_model(gguf_of(tmp_path / "usual.gguf", config, tensors), NativeOps("int16", threads=1))
    other = load_model(
        gguf_of(tmp_path / "other.gguf", config, tensors, extra, stored=stored), NativeOps("int16", threads=1)
    )
    assert other.decoder.spec == usual.decoder.spec
    found, wanted = (teacher_forced(model.decoder, TOKENS) for model in (other, usual))
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("extra", "routing"),
    [
        ({}, Routing(2)),
        ({"expert_weights_norm": True, "expert_weights_scale": 2.5}, Routing(2, renormalize=True, scale=2.5)),
        ({"expert_weights_scale": 0.0, "expert_gating_func": 2}, Routing(2, "sigmoid")),
        (
            {"expert_gating_func": 3, "expert_group_count": 3, "expert_group_used_count": 2},
            Routing(2, "logits", num_groups=3, num_chosen_groups=2),
        ),
    ],
)
def test_keys_say_how_experts_are_chosen(extra: dict[str, Any], routing: Routing, tmp_path: Path) -> None:
    config = GGUF_CASES["qwen2_moe"]
    experts = read_spec(read_gguf(gguf_of(tmp_path / "m.gguf", config, tensors_of(config), extra))).experts
    assert experts is not None
    assert experts.routing == routing


@pytest.mark.parametrize(
    ("name", "extra", "said"),
    [
        ("qwen2_moe", {"expert_gating_func": 4}, "qwen2moe.expert_gating_func 4, which kvik does not run"),
        ("qwen2_moe", {"expert_used_count": 10}, "10 of 9 experts cannot be chosen"),
        ("qwen2_moe", {"expert_count": 1 << 20}, "expert_count"),
        ("qwen3", {"expert_count": 8}, "a mixture of experts .qwen3.expert_count., which kvik does not run"),
        ("llama", {"expert_count": 8, "expert_used_count": 2}, "8 experts, and no layer with a tensor 'ffn_gate_inp"),
    ],
)
def test_what_kvik_lacks_is_refused_by_name(name: str, extra: dict[str, Any], said: str, tmp_path: Path) -> None:
    config = GGUF_CASES[name]
    file = read_gguf(gguf_of(tmp_path / "m.gguf", config, tensors_of(config), extra))
    with pytest.raises(ModelError, match=said):
        read_spec(file)


@pytest.mark.parametrize(
    "name", [*MIXTURES, *(name for name, (config, _) in PUBLISHED.items() if "num_experts_per_tok" in config)]
)
def test_all_and_active_weights_follow_from_the_config(name: str) -> None:
    """Those that the planner counts are those of the decoder's matrices."""
    config = CASES[name] if name in CASES else PUBLISHED[name][0]
    spec = read_hf_spec(config, PATH)
    assert spec.experts is not None
    fields = with_defaults(ConfigFields(config, PATH))
    params = count_params(fields, read_layers(fields))
    assert params is not None
    sizes = {tensor: math.prod(shape) for tensor, shape in spec.tensors().items() if len(shape) == 2}
    of_experts = sum(size for tensor, size in sizes.items() if "_exps." in tensor)
    left_out = 1 - spec.experts.routing.num_chosen / spec.experts.num_experts
    assert params.total == sum(sizes.values())
    assert params.active == round(sum(sizes.values()) - of_experts * left_out)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_folder_is_planned_as_it_is_held(name: str, tmp_path: Path) -> None:
    folder = golden_of(name).write_folder(tmp_path)
    shape, decoder = find_shape(str(folder)), load_model(folder, NativeOps(threads=1)).decoder
    tensors, experts = shape.tensors, decoder.spec.experts
    assert tensors is not None
    assert tensors.experts is not None
    assert experts is not None
    assert (shape.is_mixture, shape.runs) == (True, True)
    assert (shape.num_experts, shape.num_chosen_experts) == (experts.num_experts, experts.routing.num_chosen)
    spec = decoder.spec.kv_spec("f16")
    beside = beside_the_file(decoder)
    assert tensors.step_bytes == decoder.step_bytes(spec, 1, 1) - beside
    looked_up = 0 if decoder.spec.tied_head else decoder.weights.embedding.num_bytes
    assert tensors.held_bytes == looked_up + decoder.step_bytes(spec, 1 << 20, 1) - beside
    config = find_shape(str(folder / "config.json"))
    assert (config.num_params, config.num_active_params) == (shape.num_params, shape.num_active_params)
    assert config.intermediate_size == shape.intermediate_size


def test_random_routers_choose_any_expert() -> None:
    """Of equal rows the first would always be chosen, and less be read than is counted."""
    spec = read_hf_spec(CASES["qwen3_moe"] | {"num_experts": 64}, PATH)
    ops = ReferenceOps()
    decoder = Decoder(spec, read_weights(spec, RandomWeights(spec, ops, {}, "F32")), ops, 64)
    layer = decoder.weights.layers[0]
    assert layer.router is not None
    assert layer.experts is not None
    x = np.random.default_rng(1).normal(0, 1, (400, spec.hidden_size)).astype(np.float32)
    chosen = {expert for row in ops.linear(x, layer.router) for expert in choose_experts(row, layer.experts)}
    assert chosen == set(range(64))


def test_what_is_shown_of_a_mixture(tmp_path: Path) -> None:
    path = gguf_of(tmp_path / "m.gguf", GGUF_CASES["qwen3_moe"], tensors_of(GGUF_CASES["qwen3_moe"]))
    lines = fact_lines(model_facts("m", path))
    assert lines[2] == (
        "3 layers, 1,147,194 weights (610,650 of them for a token, 3 of 9 experts), 267 tokens, context 320"
    )
    assert any("0.6107 million active (3 of 9 experts)" in line for line in plan_lines(plan(str(path))))
