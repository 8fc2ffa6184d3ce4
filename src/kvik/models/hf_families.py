"""What is particular about the configs of each family.

Source: the configuration and modeling classes of transformers 5 (field names, defaults, what each field does).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kvik.files.config_fields import MAX_CONTEXT, ConfigFields
from kvik.models.hf_layer_kinds import kinds_of, layers_with_rope
from kvik.models.hf_layers import KeptLayer
from kvik.models.hf_params import gemma4_layer_embedding_size
from kvik.models.hf_rope import PLAIN_ROTARY, Rotary, rope_fields
from kvik.models.spec import OTHER_MODEL, QueryScale
from kvik.ops.base import Nonlinearity

Fields = dict[str, Any]

_NONLINEARITIES: Mapping[str, Nonlinearity] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


@dataclass(frozen=True, slots=True)
class Family:
    """What is particular about the configs of one model_type."""

    fields: Callable[[ConfigFields], Fields]  # of `DecoderSpec`, besides those that all families have
    rotary: Rotary | None = PLAIN_ROTARY
    tied: bool = False  # where the config does not say
    has_rope: Callable[[ConfigFields, int], list[bool]] | None = None  # of each layer; None: all have it, or none
    inner: int | None = None  # intermediate_size by hidden_size, where the config does not say
    defaults: Fields = field(default_factory=dict)  # fields that published configs leave out
    quantized_by: str = ""  # the method by which checkpoints of this family may be quantised already
    of_layer: Callable[[ConfigFields, KeptLayer], Fields] = lambda config, layer: {}  # of `LayerSpec`


def _llama(config: ConfigFields, norm_eps: float = 1e-6) -> Fields:
    bias = config.flag("attention_bias", False)
    return {
        "norm_eps": config.number("rms_norm_eps", norm_eps),
        "activation": nonlinearity_of(config, "hidden_act", "silu"),
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": config.flag("mlp_bias", False),
    }


def _qwen2(config: ConfigFields) -> Fields:
    return _llama(config) | {"qkv_bias": True, "output_bias": False}


def _qwen2_moe(config: ConfigFields) -> Fields:
    return _qwen2(config) | {"qkv_bias": config.flag("qkv_bias", True)}


def _qwen3(config: ConfigFields) -> Fields:
    return _llama(config) | {"qk_norm": "head"}


def _olmoe(config: ConfigFields) -> Fields:
    if config.find("clip_qkv") is not None:
        raise config.error("clip_qkv is set: clamped queries, keys and values, which kvik does not run", OTHER_MODEL)
    return _llama(config, 1e-5) | {"qk_norm": "row"}


def _mixtral(config: ConfigFields) -> Fields:
    return _llama(config, 1e-5)


def _olmo2(config: ConfigFields) -> Fields:
    return _llama(config, 1e-5) | {"norm_places": "after", "qk_norm": "row"}


def _phi3(config: ConfigFields) -> Fields:
    return _llama(config, 1e-5)


def _gpt_oss(config: ConfigFields) -> Fields:
    for key, value in (("swiglu_alpha", 1.702), ("swiglu_limit", 7.0)):
        if config.number(key, value) != value:
            raise config.error(f"{key} is {config.number(key):g}, where kvik runs {value:g} alone", OTHER_MODEL)
    bias = config.flag("attention_bias", True)
    return _llama(config, 1e-5) | {
        "activation": "clamped_silu",
        "sinks": True,
        "qkv_bias": bias,
        "output_bias": bias,
    }


def _granite(config: ConfigFields) -> Fields:
    return _llama(config) | {
        "embedding_scale": _scale(config, "embedding_multiplier", 1.0),
        "residual_scale": _scale(config, "residual_multiplier", 1.0),
        "attention_scale": _scale(config, "attention_multiplier", 1.0),
        "logit_scale": 1.0 / _scale(config, "logits_scaling", 1.0),
    }


def _scale(config: ConfigFields, key: str, default: float) -> float:
    return config.number(key, default, above=1e-6, maximum=1e6)


def _cap(config: ConfigFields, key: str) -> float | None:
    return config.optional_number(key, above=1e-3, maximum=1e6)


def _gemma(config: ConfigFields) -> Fields:
    refuse_if(config, "use_bidirectional_attention", True)
    key = "hidden_act" if config.find("hidden_activation") is None else "hidden_activation"
    activation = nonlinearity_of(config, key, "gelu_pytorch_tanh")
    return _llama(config) | {
        "activation": "gelu_tanh" if activation == "gelu" else activation,  # a slip in the first configs
        "embedding_scale": math.sqrt(config.count("hidden_size")),
    }


def _gemma2(config: ConfigFields) -> Fields:
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    attention, final = (_cap(config, key) if key in config.fields else cap for key, cap in caps.items())
    return _gemma(config) | {
        "norm_places": "around",
        "attention_scale": _scale(config, "query_pre_attn_scalar", 256.0) ** -0.5,
        "attention_soft_cap": attention,
        "logit_soft_cap": final,
    }


def _gemma3(config: ConfigFields) -> Fields:
    if config.find("attn_logit_softcapping") is not None:  # transformers has the field and never looks at it
        raise config.error("attn_logit_softcapping is set, which no Gemma 3 has", OTHER_MODEL)
    return _gemma2(config) | {
        "qk_norm": "head",
        "attention_soft_cap": None,
        "logit_soft_cap": _cap(config, "final_logit_softcapping"),
    }


def _gemma4(config: ConfigFields) -> Fields:
    size = gemma4_layer_embedding_size(config)
    rows = config.count("vocab_size_per_layer_input", 262_144)
    if size and rows != config.count("vocab_size"):
        raise config.error(f"vocab_size_per_layer_input is {rows:,}; it must be vocab_size", OTHER_MODEL)
    both_ways = config.find("use_bidirectional_attention")
    if both_ways not in (None, False, "vision"):  # text sees what is before it, pictures see all of themselves
        raise config.error(f"use_bidirectional_attention is {both_ways!r:.60}, which kvik does not run", OTHER_MODEL)
    fields = ConfigFields({**config.fields, "use_bidirectional_attention": None}, config.path)
    return _gemma(fields) | {
        "norm_places": "around",
        "qk_norm": "head",
        "value_norm": True,
        "attention_scale": 1.0,
        "logit_soft_cap": _cap(config, "final_logit_softcapping"),
        "layer_scales": True,
        "layer_embedding_size": size,
    }


def _gemma4_layer(config: ConfigFields, layer: KeptLayer) -> Fields:
    wide = layer.kv_from is not None and config.flag("use_double_wide_mlp", False)
    return {
        "keys_as_values": not layer.slides and config.flag("attention_k_eq_v", False),
        "intermediate_size": 2 * config.count("intermediate_size") if wide else None,
    }


_GEMMA4_ROPE: Fields = {
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
    }
}


def _layer_norm(config: ConfigFields, eps_key: str, activation_key: str, activation: str, *, bias: bool) -> Fields:
    """Layer norms with biases, and an MLP of two matrices."""
    return {
        "norm": "layer",
        "norm_bias": True,
        "norm_eps": config.number(eps_key, 1e-5),
        "activation": nonlinearity_of(config, activation_key, activation),
        "gated": False,
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": bias,
    }


def _gpt2(config: ConfigFields, activation: str = "gelu_new") -> Fields:
    refuse_if(config, "scale_attn_weights", False)
    refuse_if(config, "scale_attn_by_inverse_layer_idx", True)
    refuse_if(config, "add_cross_attention", True)
    positions = {"num_learned_positions": config.count("max_position_embeddings", maximum=MAX_CONTEXT)}
    return _layer_norm(config, "layer_norm_epsilon", "activation_function", activation, bias=True) | positions


def _gpt_bigcode(config: ConfigFields) -> Fields:
    return _gpt2(config, "gelu_pytorch_tanh")


def _nanogpt(config: ConfigFields) -> Fields:
    bias = config.flag("bias", True)
    fields = _gpt2(config, "gelu")
    return fields | {"norm_bias": bias, "qkv_bias": bias, "output_bias": bias, "mlp_bias": bias}


def _gpt_neox(config: ConfigFields) -> Fields:
    bias = config.flag("attention_bias", True)
    return _layer_norm(config, "layer_norm_eps", "hidden_act", "gelu", bias=True) | {
        "qkv_bias": bias,
        "output_bias": bias,
        "parallel": "two_norms" if config.flag("use_parallel_residual", True) else "none",
    }


def _phi(config: ConfigFields) -> Fields:
    refuse_if(config, "qk_layernorm", True)
    fields = _layer_norm(config, "layer_norm_eps", "hidden_act", "gelu_new", bias=True)
    return fields | {"parallel": "one_norm", "head_bias": True}


def _falcon(config: ConfigFields) -> Fields:
    refuse_if(config, "alibi", True)
    refuse_if(config, "apply_residual_connection_post_layernorm", True)
    is_new, is_parallel = (config.flag("new_decoder_architecture", False), config.flag("parallel_attn", True))
    if is_new and not is_parallel:
        raise config.error("parallel_attn is false with new_decoder_architecture, which kvik does not run", OTHER_MODEL)
    num_norms = config.count("num_ln_in_parallel_attn", 2 if is_new else 1, maximum=2)
    parallel = "none" if not is_parallel else "two_norms" if is_new and num_norms == 2 else "one_norm"
    bias = config.flag("bias", False)
    return _layer_norm(config, "layer_norm_epsilon", "activation", "gelu", bias=bias) | {"parallel": parallel}


def _opt(config: ConfigFields) -> Fields:
    refuse_if(config, "do_layer_norm_before", False)
    refuse_if(config, "layer_norm_elementwise_affine", False)
    refuse_if(config, "_remove_final_layer_norm", True)
    hidden_size = config.count("hidden_size")
    if config.count("word_embed_proj_dim", hidden_size) != hidden_size:
        raise config.error("word_embed_proj_dim differs from hidden_size, which kvik does not run", OTHER_MODEL)
    positions = {"num_learned_positions": config.count("max_position_embeddings", maximum=MAX_CONTEXT)}
    bias = config.flag("enable_bias", True)
    fixed = ConfigFields({"activation_function": config.find("activation_function")}, config.path)  # the eps is fixed
    return _layer_norm(fixed, "layer_norm_eps", "activation_function", "relu", bias=bias) | positions


def _ministral3(config: ConfigFields) -> Fields:
    scaling = rope_fields(config)
    original = scaling.count("original_max_position_embeddings", maximum=MAX_CONTEXT)
    scale = QueryScale(scaling.number("llama_4_scaling_beta", maximum=1e3), original)
    return _llama(config, 1e-5) | {"query_scale": scale}


def _exaone4(config: ConfigFields) -> Fields:
    return _llama(config, 1e-5) | {"norm_places": "after", "qk_norm": "head"}


def _windows_have_rope(config: ConfigFields, num_layers: int) -> list[bool]:
    """Where some layers have a window, RoPE is theirs alone."""
    kinds = kinds_of(config, config.text("model_type"), num_layers)
    return [kind == "window" or config.find("sliding_window") is None for kind in kinds]


def _glm4(config: ConfigFields) -> Fields:
    bias = config.flag("attention_bias", True)
    return _llama(config, 1.5625e-7) | {"norm_places": "around", "qkv_bias": bias, "output_bias": False}


def _ernie4_5(config: ConfigFields) -> Fields:
    bias = config.flag("use_bias", False)
    return _llama(config, 1e-5) | {"qkv_bias": bias, "output_bias": bias, "mlp_bias": bias}


def _hunyuan(config: ConfigFields) -> Fields:
    refuse_if(config, "use_qk_norm", False)
    refuse_if(config, "use_cla", True)
    return _llama(config, 1e-5) | {"qk_norm": "head", "qk_norm_after_rope": True}


def _seed_oss(config: ConfigFields) -> Fields:
    biases = {
        "qkv_bias": config.flag("attention_bias", True),
        "output_bias": config.flag("attention_out_bias", False),
    }
    return _llama(config) | biases


def _cohere(config: ConfigFields) -> Fields:
    refuse_if(config, "use_qk_norm", True)  # whose weights are one head's each
    refuse_if(config, "use_parallel_block", False)
    refuse_if(config, "use_gated_activation", False)
    if config.number("rotary_pct", 1.0) != 1.0:
        raise config.error("rotary_pct is not 1, which kvik does not run", OTHER_MODEL)
    bias = config.flag("attention_bias", False)
    return _layer_norm(config, "layer_norm_eps", "hidden_act", "silu", bias=bias) | {
        "norm_bias": False,
        "gated": True,
        "mlp_bias": False,
        "parallel": "one_norm",
        "logit_scale": _scale(config, "logit_scale", 0.0625),
    }


def _cohere2(config: ConfigFields) -> Fields:
    if config.find("sliding_window") is None:
        raise config.error("sliding_window is null: no layer has RoPE then, which no Cohere 2 means", OTHER_MODEL)
    return _cohere(config)


def _apertus(config: ConfigFields) -> Fields:
    refuse_if(config, "post_norm", True)
    refuse_if(config, "qk_norm", False)
    is_xielu = config.text("hidden_act", "xielu") == "xielu"
    silent = ConfigFields({key: value for key, value in config.fields.items() if key != "hidden_act"}, config.path)
    return _llama(silent if is_xielu else config, 1e-5) | {"qk_norm": "head", "gated": False, "xielu": is_xielu}


def _arcee(config: ConfigFields) -> Fields:
    activation = nonlinearity_of(config, "hidden_act", "relu2")
    return _llama(config, 1e-5) | {"activation": activation, "gated": False}


def _starcoder2(config: ConfigFields) -> Fields:
    bias = config.flag("use_bias", True)
    return _layer_norm(config, "norm_epsilon", "hidden_act", "gelu_pytorch_tanh", bias=bias)


_GPT_OSS_ROPE = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}
_MINISTRAL3_ROPE = {
    "rope_type": "yarn",
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
_APERTUS_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(_llama),
    "mistral": Family(_llama),
    "ministral": Family(_llama),
    "qwen2": Family(_qwen2),
    "qwen2_moe": Family(_qwen2_moe),
    "qwen3": Family(_qwen3),
    "qwen3_moe": Family(_qwen3),
    "olmoe": Family(_olmoe),
    "mixtral": Family(_mixtral, Rotary(1_000_000.0)),
    "phi3": Family(_phi3, Rotary(rotates_part=True), defaults={"original_max_position_embeddings": 4096}),
    "phi": Family(_phi, Rotary(partial=0.5, rotates_part=True)),
    "granite": Family(_granite),
    "granitemoe": Family(_granite),
    "granitemoeshared": Family(_granite),
    "smollm3": Family(_llama, Rotary(2_000_000.0), tied=True, has_rope=layers_with_rope),
    "olmo2": Family(_olmo2),
    "olmo3": Family(_olmo2, Rotary(500_000.0, windows_plain=True)),
    "gemma": Family(_gemma, tied=True),
    "gemma2": Family(_gemma2, tied=True),
    "gemma3_text": Family(_gemma3, Rotary(1_000_000.0, windows_plain=True, windows_theta=10_000.0), tied=True),
    "gpt_oss": Family(_gpt_oss, Rotary(150_000.0), defaults={"rope_parameters": _GPT_OSS_ROPE}, quantized_by="mxfp4"),
    "gemma4_text": Family(_gemma4, tied=True, defaults=_GEMMA4_ROPE, of_layer=_gemma4_layer),
    "gemma4_unified_text": Family(_gemma4, tied=True, defaults=_GEMMA4_ROPE, of_layer=_gemma4_layer),
    "starcoder2": Family(_starcoder2, tied=True),
    "gpt2": Family(_gpt2, None, tied=True, inner=4),
    "nanogpt": Family(_nanogpt, None, tied=True, inner=4),
    "gpt_bigcode": Family(_gpt_bigcode, None, tied=True, inner=4),
    "gpt_neox": Family(_gpt_neox, Rotary(10_000.0, 0.25, "rotary_emb_base", "rotary_pct", rotates_part=True)),
    "falcon": Family(_falcon, tied=True, inner=4),
    "opt": Family(_opt, None, tied=True),
    "ministral3": Family(_ministral3, Rotary(1_000_000.0), defaults={"rope_parameters": _MINISTRAL3_ROPE}),
    "exaone4": Family(_exaone4, has_rope=_windows_have_rope),
    "glm4": Family(_glm4, Rotary(partial=0.5, rotates_part=True, adjacent_pairs=True)),
    "ernie4_5": Family(_ernie4_5, Rotary(500_000.0, adjacent_pairs=True), tied=True),
    "hunyuan_v1_dense": Family(_hunyuan),
    "seed_oss": Family(_seed_oss),
    "cohere": Family(_cohere, Rotary(500_000.0, adjacent_pairs=True), tied=True),
    "cohere2": Family(_cohere2, Rotary(adjacent_pairs=True), tied=True, has_rope=_windows_have_rope),
    "apertus": Family(_apertus, Rotary(12_000_000.0), defaults={"rope_parameters": _APERTUS_ROPE}),
    "arcee": Family(_arcee),
}


def refuse_if(config: ConfigFields, key: str, value: bool) -> None:
    """For a choice that the decoder does not have."""
    if config.flag(key, not value) is value:
        raise config.error(f"{key} is {str(value).lower()}, which kvik does not run", OTHER_MODEL)


def nonlinearity_of(config: ConfigFields, key: str, default: str) -> Nonlinearity:
    """The nonlinearity that a config names."""
    name = config.text(key, default)
    if name not in _NONLINEARITIES:
        raise config.error(f"{key} {name!r:.60} is not one that kvik runs", f"kvik runs {', '.join(_NONLINEARITIES)}")
    return _NONLINEARITIES[name]
