"""A decoder's shape from a checkpoint's config.json, family by family.

Source: the configuration and modeling classes of transformers 5 (field names, defaults, what each field does).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kvik.files.config_fields import MAX_CONTEXT, MAX_WIDTH, ConfigFields
from kvik.models.hf_rope import PLAIN_ROTARY, Rotary, read_ropes
from kvik.models.spec import MAX_HEAD_DIM, MAX_LAYERS, OTHER_MODEL, DecoderSpec, LayerSpec
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
}


@dataclass(frozen=True, slots=True)
class Family:
    """What is particular about the configs of one model_type."""

    fields: Callable[[ConfigFields], Fields]  # of `DecoderSpec`, besides those that all families have
    rotary: Rotary | None = PLAIN_ROTARY
    tied: bool = False  # where the config does not say
    kv_heads: Callable[[ConfigFields, int], int] = lambda config, heads: config.count(
        "num_key_value_heads", heads, maximum=heads
    )
    head_dim: int | None = None  # where the config does not say; None: hidden_size / num_attention_heads
    inner: int | None = None  # intermediate_size by hidden_size, where the config does not say
    windows: Literal["none", "all", "asked"] = "none"  # layers with a window: all, or those that `layer_types` asks for
    window: int | None = None  # where the config does not say
    pattern: int | None = None  # each so-many-th layer sees all, where the config has no layer_types
    defaults: Fields = field(default_factory=dict)  # fields that published configs leave out


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


def _qwen3(config: ConfigFields) -> Fields:
    return _llama(config) | {"qk_norm": "head"}


def _olmo2(config: ConfigFields) -> Fields:
    return _llama(config, 1e-5) | {"norm_places": "after", "qk_norm": "row"}


def _phi3(config: ConfigFields) -> Fields:
    return _llama(config, 1e-5)


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


def _falcon_kv_heads(config: ConfigFields, num_heads: int) -> int:
    if config.flag("new_decoder_architecture", False):
        return config.count("num_kv_heads", config.count("n_head_kv", num_heads, maximum=num_heads), maximum=num_heads)
    return 1 if config.flag("multi_query", True) else num_heads


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


def _starcoder2(config: ConfigFields) -> Fields:
    bias = config.flag("use_bias", True)
    return _layer_norm(config, "norm_epsilon", "hidden_act", "gelu_pytorch_tanh", bias=bias)


def _multi_query(config: ConfigFields, num_heads: int) -> int:
    return 1 if config.flag("multi_query", True) else num_heads


def _all_heads(config: ConfigFields, num_heads: int) -> int:
    return num_heads


_GEMMA3_DEFAULTS: Fields = {  # of the text decoder of a multimodal model
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131_072,
}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(_llama),
    "mistral": Family(_llama, windows="all", window=4096),
    "ministral": Family(_llama, windows="all", window=4096),
    "qwen2": Family(_qwen2, windows="asked", window=4096),
    "qwen3": Family(_qwen3, windows="asked", window=4096, head_dim=128),
    "phi3": Family(_phi3, windows="all", defaults={"original_max_position_embeddings": 4096}),
    "phi": Family(_phi, Rotary(partial=0.5)),
    "granite": Family(_granite),
    "smollm3": Family(_llama, Rotary(2_000_000.0), tied=True, windows="asked"),
    "olmo2": Family(_olmo2),
    "olmo3": Family(_olmo2, Rotary(500_000.0, windows_plain=True), windows="asked", window=4096, pattern=4),
    "gemma": Family(_gemma, tied=True, head_dim=256),
    "gemma2": Family(_gemma2, tied=True, head_dim=256, windows="asked", window=4096, pattern=2),
    "gemma3_text": Family(
        _gemma3,
        Rotary(1_000_000.0, windows_plain=True, windows_theta=10_000.0),
        tied=True,
        head_dim=256,
        windows="asked",
        window=4096,
        pattern=6,
        defaults=_GEMMA3_DEFAULTS,
    ),
    "starcoder2": Family(_starcoder2, tied=True, windows="all"),
    "gpt2": Family(_gpt2, None, tied=True, kv_heads=_all_heads, inner=4),
    "nanogpt": Family(_nanogpt, None, tied=True, kv_heads=_all_heads, inner=4),
    "gpt_bigcode": Family(_gpt_bigcode, None, tied=True, kv_heads=_multi_query, inner=4),
    "gpt_neox": Family(_gpt_neox, Rotary(10_000.0, 0.25, "rotary_emb_base", "rotary_pct"), kv_heads=_all_heads),
    "falcon": Family(
        _falcon, tied=True, kv_heads=_falcon_kv_heads, inner=4, defaults={"max_position_embeddings": 2048}
    ),
    "opt": Family(_opt, None, tied=True, kv_heads=_all_heads),
}


_MULTIMODAL = {"gemma3": "gemma3_text"}
"""Multimodal model types and the family of their text decoder."""


def text_config(config: Mapping[str, Any], path: Path) -> ConfigFields:
    """The fields of the part that reads and writes text, with what the family takes where the file says nothing.

    Raises `ModelError` for a family that kvik does not run.
    """
    fields = ConfigFields(config, path)
    name = fields.text("model_type")
    inner = fields.object("text_config") if name in _MULTIMODAL else None
    if inner is not None:
        fields = ConfigFields({**config, "model_type": _MULTIMODAL[name], **inner.fields}, path)
        name = fields.text("model_type")
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        if fields.optional(key):
            raise fields.error(f"{key} is {fields.optional(key)}: a mixture of experts, which kvik does not run yet")
    if name not in FAMILIES:
        raise fields.error(
            f"model_type {name!r:.60} is not one that kvik runs", f"kvik runs {', '.join(sorted(FAMILIES))}"
        )
    silent = {key: value for key, value in FAMILIES[name].defaults.items() if fields.find(key) is None}
    return ConfigFields({**fields.fields, **silent}, path)


def read_hf_spec(config: Mapping[str, Any], path: Path, context: int | None = None) -> DecoderSpec:
    """The decoder that a config.json describes. Raises `ModelError`, which names the field.

    `context` is that of the sequences to come, where it is shorter than the model's: LongRoPE has other divisors then.
    """
    fields = text_config(config, path)
    model_type = fields.text("model_type")
    family = FAMILIES[model_type]
    hidden_size = fields.count("hidden_size")
    num_heads = fields.count("num_attention_heads", maximum=hidden_size)
    head_dim = _head_dim(fields, family, hidden_size, num_heads)
    context_length = fields.count("max_position_embeddings", maximum=MAX_CONTEXT)
    spec = DecoderSpec(
        architecture=model_type,
        hidden_size=hidden_size,
        intermediate_size=fields.count("intermediate_size", family.inner and family.inner * hidden_size),
        num_heads=num_heads,
        num_kv_heads=family.kv_heads(fields, num_heads),
        head_dim=head_dim,
        vocab_size=fields.count("vocab_size"),
        context_length=context_length,
        layers=_layers(fields, family, head_dim, context_length, context or context_length),
        tied_head=fields.flag("tie_word_embeddings", family.tied),
        **family.fields(fields),
    )
    if problem := spec.problem():
        raise fields.error(problem, OTHER_MODEL)
    return spec


def _head_dim(config: ConfigFields, family: Family, hidden_size: int, num_heads: int) -> int:
    if config.find("head_dim") is None and family.head_dim is None and hidden_size % num_heads:
        raise config.error(f"hidden_size {hidden_size:,} does not divide among {num_heads:,} heads")
    head_dim = config.count("head_dim", family.head_dim or hidden_size // num_heads, maximum=MAX_HEAD_DIM)
    if num_heads * head_dim > MAX_WIDTH:
        raise config.error(f"{num_heads:,} heads of {head_dim:,} dimensions are more than {MAX_WIDTH:,} together")
    return head_dim


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


def _layers(config: ConfigFields, family: Family, head_dim: int, context: int, used: int) -> tuple[LayerSpec, ...]:
    num_layers = config.count("num_hidden_layers", maximum=MAX_LAYERS)
    has_rope = _layers_with_rope(config, num_layers)
    windows = _windows(config, family, has_rope, context)
    if family.rotary is None:
        return tuple(LayerSpec(None, window) for window in windows)
    everywhere, in_windows = read_ropes(config, family.rotary, head_dim, context, used)
    return tuple(
        LayerSpec(None if not rope else everywhere if window is None else in_windows, window)
        for rope, window in zip(has_rope, windows, strict=True)
    )


def _layers_with_rope(config: ConfigFields, num_layers: int) -> list[bool]:
    """Whether each layer has RoPE: SmolLM3 has NoPE layers."""
    if config.text("model_type") != "smollm3":
        return [True] * num_layers
    flags = config.list("no_rope_layers", num_layers, (int, bool))  # 1 where there is RoPE
    every = config.count("no_rope_layer_interval", 4)
    return [bool(flags[index] if flags else (index + 1) % every) for index in range(num_layers)]


def _windows(config: ConfigFields, family: Family, has_rope: list[bool], context: int) -> list[int | None]:
    """Of each layer; a window as long as the context is none."""
    num_layers = len(has_rope)
    types = config.list("layer_types", num_layers, (str,))
    for one in types or ():
        if one not in ("full_attention", "sliding_attention"):
            raise config.error(f"layer_types has {one!r:.60} in it, which kvik does not run", OTHER_MODEL)
    window = config.optional("sliding_window") if "sliding_window" in config.fields else family.window
    asked = family.pattern is not None or config.flag("use_sliding_window", False)
    if family.windows == "none" or window is None or (family.windows == "asked" and not asked):
        if types and "sliding_attention" in types:
            raise config.error("layer_types asks for sliding_attention, but no sliding_window is in use")
        return [None] * num_layers
    if types is not None:
        slides = [one == "sliding_attention" for one in types]
    elif family.windows == "all":
        slides = [True] * num_layers
    elif family.pattern is not None:
        every = config.count("sliding_window_pattern", family.pattern)
        slides = [(index + 1) % every != 0 for index in range(num_layers)]
    elif not all(has_rope):
        slides = [not rope for rope in has_rope]
    else:
        first = config.fields.get("max_window_layers", 28)
        if type(first) is not int:
            raise config.error(f"max_window_layers is {first!r:.60}; it must be a whole number")
        slides = [index >= first for index in range(num_layers)]
    return [window if slide and window < context else None for slide in slides]
