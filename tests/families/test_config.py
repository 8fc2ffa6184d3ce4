"""config.json, which nobody vouches for: published ones, options that kvik lacks, and nonsense."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from families.cases import CASES, CONTEXT
from families.goldens import golden_of
from families.published import PUBLISHED
from kvik.errors import ModelError
from kvik.files.config_fields import read_json_object
from kvik.models.hf_families import FAMILIES
from kvik.models.hf_parts import hf_parts, is_unused
from kvik.models.hf_spec import read_hf_spec
from kvik.models.spec import DecoderSpec, QueryScale
from kvik.ops.base import Routing

PATH = Path("folder/config.json")


def changed(name: str, **changes: Any) -> dict[str, Any]:
    return CASES[name] | changes


def mixture(model_type: str, **changes: Any) -> dict[str, Any]:
    return changed("llama", model_type=model_type) | {"num_local_experts": 8} | changes


def test_which_layers_are_sparse() -> None:
    for changes, sparse in (
        ({}, [True, True, True, True]),
        ({"mlp_only_layers": [0, 2]}, [False, True, False, True]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": None}, [False, True, False, True]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, [False, False, False, True]),
    ):
        spec = read_hf_spec(mixture("qwen2_moe", num_hidden_layers=4, **changes), PATH)
        assert [layer.sparse for layer in spec.layers] == sparse
    dense = read_hf_spec(mixture("qwen2_moe", mlp_only_layers=[0, 1, 2]), PATH)
    assert dense.experts is None
    assert not any(layer.sparse for layer in dense.layers)


def test_how_experts_are_chosen() -> None:
    for model_type, changes, routing in (
        ("qwen3_moe", {"num_experts_per_tok": 3}, Routing(3)),
        ("qwen3_moe", {"num_experts_per_tok": 3, "norm_topk_prob": True}, Routing(3, renormalize=True)),
        ("olmoe", {}, Routing(8)),
        ("mixtral", {"norm_topk_prob": False}, Routing(2, renormalize=True)),
        ("granitemoe", {}, Routing(2, "logits")),
    ):
        experts = read_hf_spec(mixture(model_type, **changes), PATH).experts
        assert experts is not None
        assert (experts.routing, experts.shared_size, experts.shared_gate) == (routing, 0, False)
    experts = read_hf_spec(mixture("qwen2_moe", moe_intermediate_size=24), PATH).experts
    assert experts is not None
    assert (experts.intermediate_size, experts.shared_size, experts.shared_gate) == (24, 5632, True)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_as_many_parameters_as_they_say(name: str) -> None:
    config, num_params = PUBLISHED[name]
    assert sum(math.prod(shape) for shape in read_hf_spec(config, PATH).tensors().values()) == num_params


def test_what_the_mixed_models_mix() -> None:
    """Layer by layer, where families differ from layer to layer."""
    smollm = read_hf_spec(PUBLISHED["HuggingFaceTB/SmolLM3-3B"][0], PATH)
    assert [layer.rope is None for layer in smollm.layers] == [False, False, False, True] * 9
    gemma = read_hf_spec(PUBLISHED["google/gemma-3-4b-it"][0], PATH)
    assert [layer.window for layer in gemma.layers[:7]] == [1024] * 5 + [None, 1024]
    assert [rope.theta for rope in gemma.ropes] == [10_000.0, 1_000_000.0]
    assert [rope.factors for rope in gemma.ropes] == [1.0, 8.0]
    assert (gemma.num_heads, gemma.num_kv_heads, gemma.context_length) == (8, 4, 131_072)
    gemma2 = read_hf_spec(PUBLISHED["google/gemma-2-2b"][0], PATH)
    assert [layer.window for layer in gemma2.layers[:4]] == [4096, None, 4096, None]
    assert {layer.window for layer in read_hf_spec(PUBLISHED["mistralai/Mistral-7B-v0.1"][0], PATH).layers} == {4096}


def test_what_gemma_4_mixes() -> None:
    """Two shapes of heads, shared keys, wider MLPs of the layers that share; as published and as saved by 5.23."""
    for config in (CASES["gemma4-e2b"], golden_of("gemma4-e2b").config):
        e2b = read_hf_spec(config, PATH)
        assert [e2b.head_dim_of(layer) for layer in e2b.layers] == [16, 16, 24, 16, 16, 16, 24]
        assert [layer.kv_from for layer in e2b.layers] == [None] * 4 + [3, 3, 2]
        assert [e2b.intermediate_size_of(layer) for layer in e2b.layers] == [170] * 4 + [340] * 3
        assert [(rope.num_dims, rope.num_pairs, rope.theta) for rope in e2b.ropes] == [(16, 8, 1e4), (24, 3, 1e6)]
        assert not any(layer.keys_as_values for layer in e2b.layers)
    dense = read_hf_spec(CASES["gemma4-12b"], PATH)
    assert [dense.num_kv_heads_of(layer) for layer in dense.layers] == [3, 3, 3, 1]
    assert [layer.keys_as_values for layer in dense.layers] == [False, False, False, True]
    assert dense.layer_embedding_size == 0
    without = {key: value for key, value in CASES["gemma4-e2b"].items() if key != "hidden_size_per_layer_input"}
    assert read_hf_spec(without, PATH).layer_embedding_size == 256  # the class's own
    long = read_hf_spec(changed("gemma4-e2b", sliding_window=CONTEXT), PATH)
    assert [layer.window for layer in long.layers] == [None] * 7
    assert [layer.rope for layer in long.layers] == [layer.rope for layer in e2b.layers]
    assert [layer.kv_from for layer in long.layers] == [layer.kv_from for layer in e2b.layers]


def test_layers_of_any_family_may_have_other_kv_heads() -> None:
    """As transformers 5.18 and later write it."""
    spec = read_hf_spec(changed("llama", per_layer_config={"1": {"num_key_value_heads": 3}}), PATH)
    assert [spec.num_kv_heads_of(layer) for layer in spec.layers] == [2, 3, 2]


def test_a_window_as_long_as_the_context_is_none() -> None:
    for window, kept in ((CONTEXT - 1, CONTEXT - 1), (CONTEXT, None), (CONTEXT + 1, None), (None, None)):
        spec = read_hf_spec(changed("mistral", sliding_window=window), PATH)
        assert {layer.window for layer in spec.layers} == {kept}


@pytest.mark.parametrize("name", ["su", "yarn"])
def test_longrope_under_its_first_names(name: str) -> None:
    config = changed("phi3-long")
    config["rope_scaling"] = config["rope_scaling"] | {"type": name}
    assert read_hf_spec(config, PATH) == read_hf_spec(CASES["phi3-long"], PATH)


def test_a_part_that_rotates_is_ignored_where_transformers_does() -> None:
    for name, part in (("llama", 1.0), ("qwen3", 1.0), ("gemma", 1.0), ("phi", 0.5), ("phi3", 0.5)):
        spec = read_hf_spec(changed(name, partial_rotary_factor=0.5), PATH)
        assert {rope.num_dims for rope in spec.ropes} == {int(part * spec.head_dim)}, name
    stretched = changed("llama", partial_rotary_factor=0.5, rope_scaling={"type": "linear", "factor": 2.0})
    spec = read_hf_spec(stretched, PATH)
    assert {rope.num_dims for rope in spec.ropes} == {spec.head_dim // 2}


def test_longrope_takes_the_factors_of_its_whole_context() -> None:
    scaling = CASES["phi3-long"]["rope_scaling"]
    for original, key in ((CONTEXT, "short_factor"), (CONTEXT - 1, "long_factor")):
        (rope,) = read_hf_spec(changed("phi3-long", original_max_position_embeddings=original), PATH).ropes
        assert rope.factors == tuple(scaling[key])


def test_classes_of_the_dense_families_say_what_their_configs_do_not() -> None:
    silent = {key: value for key, value in CASES["ministral3"].items() if key != "rope_parameters"}
    ministral = read_hf_spec(silent | {"max_position_embeddings": 262_144}, PATH)
    assert ministral.query_scale == QueryScale(0.1, 16_384)
    (rope,) = ministral.ropes
    assert (rope.theta, rope.magnitude) == (1_000_000.0, 1.0)
    apertus = {key: value for key, value in CASES["apertus"].items() if not key.startswith("rope_")}
    (rope,) = read_hf_spec(apertus, PATH).ropes
    assert rope.theta == 12_000_000.0
    assert isinstance(rope.factors, tuple)
    assert max(rope.factors) == 8.0
    assert [layer.rope is None for layer in read_hf_spec(CASES["cohere2"], PATH).layers] == [*[False] * 3, True, False]
    plain = read_hf_spec(changed("apertus", hidden_act="relu2"), PATH)
    assert (plain.xielu, plain.activation) == (False, "relu2")
    assert read_hf_spec(changed("hunyuan_v1_dense", num_experts=1), PATH).experts is None


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": (changed("llama", model_type="mamba"), r"model_type 'mamba' is not one that kvik runs"),
    "seeing": (changed("llama", model_type="llava", text_config=CASES["llama"]), "model_type 'llava'"),
    "experts": (changed("mistral", num_local_experts=8), r"num_local_experts is 8: a mixture"),
    "experts-2": (changed("qwen2", num_experts=60), r"num_experts is 60: a mixture"),
    "no-experts": (mixture("mixtral", num_local_experts=0), "has no number of experts"),
    "chosen": (mixture("mixtral", num_experts_per_tok=9), "9 of 8 experts cannot be chosen"),
    "many-experts": (mixture("qwen3_moe", num_local_experts=1025), "1,025 experts are more than 1,024"),
    "experts-of-all": (
        mixture("qwen3_moe", num_local_experts=1024, num_hidden_layers=65),
        "66,560 experts in all layers are more than 65,536",
    ),
    "dense-layers": (mixture("qwen3_moe", mlp_only_layers=[0.5]), r"mlp_only_layers is \[0.5\]; it must be a list"),
    "clipped": (mixture("olmoe", clip_qkv=8.0), "clip_qkv is set"),
    "falcon-rw": (changed("falcon-serial", alibi=True), "alibi is true"),
    "falcon-residual": (
        changed("falcon-7b", apply_residual_connection_post_layernorm=True),
        "apply_residual_connection_post_layernorm is true",
    ),
    "opt-350m": (changed("opt", do_layer_norm_before=False), "do_layer_norm_before is false"),
    "opt-350m-projections": (changed("opt", word_embed_proj_dim=100), "word_embed_proj_dim differs"),
    "galactica": (changed("opt", layer_norm_elementwise_affine=False), "layer_norm_elementwise_affine is false"),
    "gpt2-cross": (changed("gpt2", add_cross_attention=True), "add_cross_attention is true"),
    "gpt2-layers": (changed("gpt2", scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is true"),
    "gpt2-scale": (changed("gpt2", scale_attn_weights=False), "scale_attn_weights is false"),
    "phi-norms": (changed("phi", qk_layernorm=True), "qk_layernorm is true"),
    "both-ways": (changed("gemma3_text", use_bidirectional_attention=True), "use_bidirectional_attention is true"),
    "gemma3-cap": (changed("gemma3_text", attn_logit_softcapping=50.0), "attn_logit_softcapping is set"),
    "gemma3n": (changed("gemma3_text", model_type="gemma3n_text"), r"'gemma3n_text' needs AltUp .* and LAuReL"),
    "gemma4-both-ways": (
        changed("gemma4-e2b", use_bidirectional_attention="all"),
        "use_bidirectional_attention is 'all'",
    ),
    "gemma4-experts": (changed("gemma4-12b", num_experts=8), "num_experts is 8: a mixture"),
    "gemma4-table": (changed("gemma4-e2b", vocab_size_per_layer_input=284), "vocab_size_per_layer_input is 284"),
    "gemma4-all-shared": (changed("gemma4-e2b", num_kv_shared_layers=7), "num_kv_shared_layers is 7 of 7 layers"),
    "gemma4-other-kind": (changed("gemma4-e2b", num_kv_shared_layers=5), "there is none before 2"),
    "gemma4-no-rotation": (
        changed(
            "gemma4-12b",
            rope_parameters={
                "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.01},
                "sliding_attention": {"rope_type": "default"},
            },
        ),
        "0 of 12 pairs of dimensions cannot rotate",
    ),
    "strange-layer": (
        changed("llama", per_layer_config={"1": {"skip": ["mlp"]}}),
        "per_layer_config gives layer 1 'skip'",
    ),
    "no-such-layer": (changed("llama", per_layer_config={"3": {}}), "has '3' in it, which is none of its 3 layers"),
    "sizes-of-heads": (
        changed("llama", per_layer_config={"1": {"head_dim": 48}}),
        "heads of several sizes among layers of one kind",
    ),
    "dynamic": (changed("llama", rope_scaling={"type": "dynamic", "factor": 2.0}), "rope_type 'dynamic'"),
    "llama4-layers": (changed("qwen3-windows", layer_types=["chunked_attention"] * 3), "layer_types has 'chunked_"),
    "no-window": (changed("llama", layer_types=["sliding_attention"] * 3), "layer_types asks for sliding_attention"),
    "activation": (changed("llama", hidden_act="xielu"), "hidden_act 'xielu'"),
    "ministral3": (
        CASES["ministral3"]
        | {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 80}},
        "has no llama_4_scaling_beta",
    ),
    "hunyuan-norms": (changed("hunyuan_v1_dense", use_qk_norm=False), "use_qk_norm is false"),
    "hunyuan-shared": (changed("hunyuan_v1_dense", use_cla=True), "use_cla is true"),
    "hunyuan-dynamic": (
        changed("hunyuan_v1_dense", rope_scaling={"type": "dynamic", "factor": 2.0}),
        "rope_type 'dynamic'",
    ),
    "command-r-plus": (changed("cohere", use_qk_norm=True), "use_qk_norm is true"),
    "cohere2-serial": (changed("cohere2", use_parallel_block=False), "use_parallel_block is false"),
    "cohere2-gate": (changed("cohere2", use_gated_activation=False), "use_gated_activation is false"),
    "cohere2-part": (changed("cohere2", rotary_pct=0.5), "rotary_pct is not 1"),
    "cohere2-window": (changed("cohere2", sliding_window=None), "sliding_window is null"),
    "apertus-norms": (changed("apertus", post_norm=True), "post_norm is true"),
    "apertus-heads": (changed("apertus", qk_norm=False), "qk_norm is false"),
    "heads": (changed("llama", num_attention_heads=7), "7 query heads do not divide among 2 KV heads"),
    "no-heads": (changed("llama", num_attention_heads=0), "num_attention_heads is 0; it must be a whole number from 1"),
    "hidden": (changed("smollm3", hidden_size=245), "hidden_size 245 does not divide among 6 heads"),
    "head_dim": (changed("llama", head_dim=44), "head_dim 44 is no multiple of 8"),
    "wide-head": (changed("llama", head_dim=2048), "head_dim is 2048; it must be a whole number from 1 to 1,024"),
    "wide-heads": (
        changed("llama", hidden_size=1 << 24, num_attention_heads=1 << 24, num_key_value_heads=1, head_dim=1024),
        r"16,777,216 heads of 1,024 dimensions are more than 16,777,216",
    ),
    "layers": (changed("llama", num_hidden_layers=10**9), "num_hidden_layers is 1000000000; it must be .* 1 to 4,096"),
    "text": (changed("llama", hidden_size="138"), "hidden_size is '138'"),
    "fraction": (changed("llama", hidden_size=138.0), "hidden_size is 138.0"),
    "flag": (changed("llama", num_key_value_heads=True), "num_key_value_heads is True"),
    "eps": (changed("llama", rms_norm_eps=math.nan), "rms_norm_eps is nan; it must be a number above 0"),
    "odd-rope": (changed("phi", partial_rotary_factor=0.24), "19 dimensions of a head of 80 cannot rotate in pairs"),
    "few-factors": (
        changed("phi3-long", rope_scaling=CASES["phi3-short"]["rope_scaling"]),
        "long_factor is .* a list of 48",
    ),
    "missing": (changed("llama", vocab_size=None), "has no vocab_size"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_kvik_lacks_is_refused_by_name(name: str) -> None:
    config, said = REFUSED[name]
    with pytest.raises(ModelError, match=said) as caught:
        read_hf_spec(config, PATH)
    assert_one_line(caught.value)


def test_an_unknown_family_is_told_what_kvik_runs() -> None:
    with pytest.raises(ModelError) as caught:
        read_hf_spec({"model_type": "mamba"}, PATH)
    assert all(name in caught.value.hint for name in FAMILIES)


def assert_one_line(error: ModelError) -> None:
    assert error.message.startswith(f"{PATH}: ")
    assert "\n" not in error.message
    assert len(error.message) < 400
    assert error.hint


NONSENSE: tuple[Any, ...] = (
    *(0, -1, 1, 3, 10**9, 2**31, 2**63, 10**400),
    *(0.0, -0.5, 1e-320, 1e-7, 0.999, 1e9, 1e308, math.inf, math.nan),
    *("", "12", "silu", "x" * 5000, "a\nb", True, False, None),
    *([], {}, [[]], [1], ["full_attention"], [math.nan] * 20, [10**400] * 20, {"rope_type": "yarn"}, {"factor": 2}),
)


def altered(config: dict[str, Any], *keys: str) -> Iterator[dict[str, Any]]:
    """The config with each of its fields, those inside of others too, replaced by each nonsense, and left out."""
    inside: Any = config
    for key in keys:
        inside = inside[key]
    for key, value in inside.items():
        for nonsense in (..., *NONSENSE):
            copied = copy.deepcopy(config)
            place: Any = copied
            for outer in keys:
                place = place[outer]
            if nonsense is ...:
                del place[key]
            else:
                place[key] = nonsense
            yield copied
        if isinstance(value, dict) and key != "vision_config":
            yield from altered(config, *keys, key)


@pytest.mark.parametrize("name", CASES)
def test_any_config_gives_a_decoder_or_a_model_error(name: str) -> None:
    """Of the decoder, all that is made of the config alone is whole: shapes, angles, where tensors lie."""
    num_refused = 0
    for config in altered(CASES[name]):
        try:
            spec = read_hf_spec(config, PATH)
        except ModelError as error:
            assert_one_line(error)
            num_refused += 1
        else:
            assert_whole(spec)
    assert num_refused > 100


def assert_whole(spec: DecoderSpec) -> None:
    assert spec.problem() is None
    assert 0 < spec.norm_eps < math.inf
    for rope in spec.ropes:
        assert np.isfinite(rope.table(3).cos_sin).all(), rope
    for value in (spec.attention_scale, spec.embedding_scale, spec.residual_scale, spec.logit_scale):
        assert value is None or 0 < np.float32(value) < math.inf
    if spec.num_layers * spec.num_heads < 100 and spec.num_heads * spec.head_dim < 10_000:
        assert hf_parts(spec, ()).keys() == spec.tensors().keys()


def test_json_that_is_no_json(tmp_path: Path) -> None:
    for text in ('{"hidden_size": ' + "9" * 5000 + "}", "[" * 100_000, "[]", "\xff", ""):
        (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(ModelError) as caught:
            read_json_object(tmp_path / "config.json")
        assert "\n" not in caught.value.message


@pytest.mark.parametrize("name", CASES)
def test_parts_use_every_stored_tensor(name: str) -> None:
    golden = golden_of(name)
    spec = read_hf_spec(golden.config, PATH)
    parts = hf_parts(spec, golden.shapes)
    shapes = {part.stored: part.shape for part in parts.values()}
    shapes |= {part.scales: part.shape[:-1] for part in parts.values() if part.scales is not None}
    used = shapes.keys()
    assert shapes == {key: golden.shapes[key] for key in used}
    unused = golden.shapes.keys() - used
    assert all(is_unused(spec, key) for key in unused)
    assert not any(is_unused(spec, key) for key in used)
    assert bool(unused) == (name in ("gemma3", "mistral3")), unused  # the part that sees


@pytest.mark.parametrize("name", ["gpt2", "gpt_bigcode", "gpt_neox", "falcon-7b", "llama", "opt", "gemma3"])
def test_parts_of_a_model_that_was_saved_without_its_head(name: str) -> None:
    """As the class without a head saves it, its names begin further in."""
    golden = golden_of(name)
    spec = read_hf_spec(golden.config, PATH)
    whole = hf_parts(spec, golden.shapes)
    outer = {"opt": "model.", "gemma3": "language_model."}.get(
        name
    ) or f"{next(iter(whole.values())).stored.split('.')[0]}."
    bare = [key.removeprefix(outer) for key in golden.shapes]
    assert all(part.stored in bare for part in hf_parts(spec, bare).values())


@pytest.mark.parametrize(
    ("name", "stored", "unused"),
    [
        ("gpt2", "h.0.attn.bias", True),
        ("gpt2", "transformer.h.0.attn.masked_bias", True),
        ("gpt2", "transformer.h.0.attn.c_attn.bias", False),
        ("gpt_neox", "gpt_neox.layers.0.attention.bias", True),
        ("gpt_neox", "gpt_neox.layers.0.attention.rotary_emb.inv_freq", True),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq", True),
        ("llama", "lm_head.weight", False),
        ("llama-3.2", "lm_head.weight", True),
        ("llama", "model.vision_tower.x", False),
        ("gemma3", "vision_tower.x", True),
        ("gemma3", "model.vision_tower.x", True),
        ("gemma3", "multi_modal_projector.x", True),
        ("gemma4-31b", "model.embed_vision.embedding_projection.weight", True),
        ("gemma4-31b", "model.audio_tower.x", True),
        ("gemma4-e2b", "model.language_model.layers.4.self_attn.k_proj.weight", True),
        ("gemma4-e2b", "model.layers.6.self_attn.v_norm.weight", True),
        ("gemma4-e2b", "model.layers.3.self_attn.k_proj.weight", False),
        ("gemma4-e2b", "model.layers.4.self_attn.q_proj.weight", False),
        ("gemma4-e2b", "model.layers.7.self_attn.k_proj.weight", False),
        ("llama", "model.layers.0.mlp.gate_proj.lora_A.weight", False),
    ],
)
def test_stored_tensors_that_no_decoder_uses(name: str, stored: str, unused: bool) -> None:
    assert is_unused(read_hf_spec(CASES[name], PATH), stored) is unused


def test_cases_are_json() -> None:
    assert json.loads(json.dumps(CASES)) == CASES


def test_longrope_has_the_factors_of_the_context_that_is_used() -> None:
    config, path = CASES["phi3-long"], Path("config.json")
    whole, short = read_hf_spec(config, path), read_hf_spec(config, path, 80)
    original = config["original_max_position_embeddings"]
    assert read_hf_spec(config, path, original + 1) == whole
    assert read_hf_spec(config, path, original) == read_hf_spec(config, path, 2)
    assert [spec.ropes[0].factors for spec in (whole, short)] == [
        tuple(map(float, config["rope_scaling"][key])) for key in ("long_factor", "short_factor")
    ]
    assert whole.context_length == short.context_length
