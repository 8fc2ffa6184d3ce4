"""Which layer of a decoder is of which kind, by its config.json: a list of names, or a rule of its class.

Source: configuration and attention classes of transformers 5.23.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from kvik.files.config_fields import ConfigFields
from kvik.models.config_classes import has_field, is_known

MAX_PLANNED_LAYERS = 1 << 14
HEADLESS = ("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm")
"""Classes without attention, whose configs have no heads."""

Kind = Literal["full", "window", "chunk", "latent", "state"]

_KINDS: Mapping[str, Kind] = {
    **dict.fromkeys(("full_attention", "attention", "hybrid", "indexed_attention"), "full"),
    **dict.fromkeys(("sliding_attention", "hybrid_sliding"), "window"),
    **dict.fromkeys(("deepseek_sparse_attention",), "full"),
    "chunked_attention": "chunk",
    **dict.fromkeys(("linear_attention", "mamba", "mamba2", "conv", "recurrent", "moe", "mlp"), "state"),
}
"""Names of layer types; those of a state group may keep nothing at all. A hybrid has a state beside its keys."""


def listed_types(config: ConfigFields) -> Sequence[str] | None:
    """The names of layer types where the config lists them. Raises `ModelError` for what is no list."""
    found = next((one for key in ("layer_types", "layers_block_type") if (one := config.find(key)) is not None), None)
    if found is not None and (not isinstance(found, list) or not 0 < len(found) <= MAX_PLANNED_LAYERS):
        raise config.error("layer_types must be a list of names")
    return found


def kinds_of(config: ConfigFields, model_type: str, num_layers: int) -> list[Kind]:
    """Of each layer. Raises `ModelError` for a list that is wrong or has a kind that nobody here knows."""
    if model_type == "jamba":
        period, offset = config.count("attn_layer_period"), config.find("attn_layer_offset")
        if type(offset) is not int or not 0 <= offset < period:
            raise config.error(f"attn_layer_offset is {reprlib.repr(offset)}, not in 0 … {period - 1:,}")
        return ["full" if index % period == offset else "state" for index in range(num_layers)]
    types = listed_types(config)
    if types is None:
        return _SCHEMES.get(model_type, _plain)(config, num_layers)
    if len(types) != num_layers:
        raise config.error(f"layer_types must be a list of {num_layers:,} names")
    for one in types:
        if not isinstance(one, str) or one not in _KINDS:
            raise config.error(f"layer_types has {reprlib.repr(one)} in it, a kind that kvik does not know")
    kinds = [_KINDS[one] for one in types]
    if "window" in kinds and not _slides(config, model_type):
        raise config.error("layer_types asks for sliding_attention, but has no sliding_window in use")
    if model_type.startswith("gemma4"):
        kinds[-1] = "full"
    return kinds


def _slides(config: ConfigFields, model_type: str) -> bool:
    """Whether windows are switched on."""
    if model_type in _SWITCHED and not config.flag("use_sliding_window", False):
        return False
    windows = [config.optional(key) for key in ("sliding_window", "sliding_window_size", "local_attention")]
    if not has_field(model_type, "sliding_window") and is_known(model_type) and model_type != "modernbert-decoder":
        return False  # a stray field, at which the class never looks
    return any(windows)


_SWITCHED = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3")

Scheme = Callable[[ConfigFields, int], list[Kind]]


def _plain(config: ConfigFields, num_layers: int) -> list[Kind]:
    """All alike."""
    if _slides(config, config.text("model_type", "")):
        return ["window"] * num_layers
    return ["chunk" if config.optional("attention_chunk_size") else "full"] * num_layers


def _all_full(config: ConfigFields, num_layers: int) -> list[Kind]:
    return ["full"] * num_layers


def _all_states(config: ConfigFields, num_layers: int) -> list[Kind]:
    return ["state"] * num_layers


def _last_of(every: int, other: Kind = "window", key: str = "", *, last_full: bool = False) -> Scheme:
    """Each so-many-th layer sees all; `key` may tell how many."""

    def kinds(config: ConfigFields, num_layers: int) -> list[Kind]:
        if other == "window" and not _slides(config, config.text("model_type", "")):
            return ["full"] * num_layers
        period = _period(config, key, every) if key else every
        made: list[Kind] = [other if (index + 1) % period else "full" for index in range(num_layers)]
        return [*made[:-1], "full"] if last_full else made

    return kinds


def _period(config: ConfigFields, key: str, every: int) -> int:
    """A number of layers; EXAONE 4 writes it as LLLG."""
    found = config.find(key)
    return len(found) if isinstance(found, str) and 0 < len(found) < 64 else config.count(key, every)


def _first_of(every: int, key: str = "") -> Scheme:
    def kinds(config: ConfigFields, num_layers: int) -> list[Kind]:
        if not _slides(config, config.text("model_type", "")):
            return ["full"] * num_layers
        period = config.count(key, every) if key else every
        return ["window" if index % period else "full" for index in range(num_layers)]

    return kinds


def _where(is_full: Callable[[int, int], bool], other: Kind = "window") -> Scheme:
    """By a rule over the layer's index and the number of layers."""
    return lambda config, num_layers: ["full" if is_full(index, num_layers) else other for index in range(num_layers)]


def _from_max_window_layers(config: ConfigFields, num_layers: int) -> list[Kind]:
    """Qwen 2 and 3: the first so many layers see all."""
    if not _slides(config, config.text("model_type", "")):
        return ["full"] * num_layers
    first = config.fields.get("max_window_layers", 28)
    if type(first) is not int:
        raise config.error(f"max_window_layers is {first!r:.60}; it must be a whole number")
    return ["window" if index >= first else "full" for index in range(num_layers)]


def _smollm3(config: ConfigFields, num_layers: int) -> list[Kind]:
    if not _slides(config, "smollm3"):
        return ["full"] * num_layers
    return ["full" if rope else "window" for rope in layers_with_rope(config, num_layers)]


def layers_with_rope(config: ConfigFields, num_layers: int) -> list[bool]:
    """Of SmolLM3 and Llama 4: whether each layer has RoPE."""
    flags = config.list("no_rope_layers", num_layers, (int, bool)) if config.find("no_rope_layers") else None
    every = config.count("no_rope_layer_interval", 4)
    return [bool(flags[index] if flags else (index + 1) % every) for index in range(num_layers)]


def _llama4(config: ConfigFields, num_layers: int) -> list[Kind]:
    return ["chunk" if rope else "full" for rope in layers_with_rope(config, num_layers)]


def _listed(key: str, other: Kind, *, absent: Kind) -> Scheme:
    """A field that has the indices of the layers that see all."""

    def kinds(config: ConfigFields, num_layers: int) -> list[Kind]:
        found = config.find(key)
        if found is None:
            return [absent] * num_layers
        if not isinstance(found, list) or any(type(one) is not int or not 0 <= one < num_layers for one in found):
            raise config.error(f"{key} is {reprlib.repr(found)}; it must be a list of layers' indices")
        listed = set(found)
        return ["full" if index in listed else other for index in range(num_layers)]

    return kinds


def _inkling(config: ConfigFields, num_layers: int) -> list[Kind]:
    if (local := config.find("local_layer_ids")) is not None:
        inner = ConfigFields({**config.fields, "local_layer_ids": local}, config.path)
        others = _listed("local_layer_ids", "window", absent="window")(inner, num_layers)
        return ["window" if kind == "full" else "full" for kind in others]
    return _last_of(6)(config, num_layers)


def _kimi(config: ConfigFields, num_layers: int) -> list[Kind]:
    inner = config.object("linear_attn_config")
    full = None if inner is None else inner.find("full_attn_layers")
    if full is None:
        return ["full" if index and index % 4 == 0 else "state" for index in range(num_layers)]
    if not isinstance(full, list) or any(type(one) is not int or not 1 <= one <= num_layers for one in full):
        raise config.error("linear_attn_config.full_attn_layers must be a list of layers' numbers, from 1")
    listed = set(full)
    return ["full" if index + 1 in listed else "state" for index in range(num_layers)]


def _nemotron_h(config: ConfigFields, num_layers: int) -> list[Kind]:
    """A letter a layer: M Mamba, * attention, - MLP, E experts."""
    pattern = config.text("hybrid_override_pattern", "ME*-")
    if strange := set(pattern) - set("M*-E"):
        raise config.error(f"hybrid_override_pattern has {min(strange)!r} in it; it must be of M, *, - and E")
    return ["full" if letter == "*" else "state" for letter in pattern]


def _recurrent_gemma(config: ConfigFields, num_layers: int) -> list[Kind]:
    types = config.find("block_types")
    if not isinstance(types, list) or not types or not set(map(str, types)) <= {"recurrent", "attention"}:
        raise config.error(f"block_types is {reprlib.repr(types)}; it must be a list of recurrent and attention")
    return ["window" if types[index % len(types)] == "attention" else "state" for index in range(num_layers)]


def _zamba(config: ConfigFields, num_layers: int) -> list[Kind]:
    period, offset = config.count("attn_layer_period"), config.fields.get("attn_layer_offset", 4)
    rest: list[Kind] = ["full" if index % period == offset else "state" for index in range(max(0, num_layers - 3))]
    first: list[Kind] = ["state", "state", "full"]
    return [*first[:num_layers], *rest]


def _zamba2(config: ConfigFields, num_layers: int) -> list[Kind]:
    if num_layers != 54:
        raise config.error(f"has no layers_block_type for its {num_layers:,} layers")
    return ["full" if index in (6, 12, 18, 24, 30, 36, 42, 47, 51) else "state" for index in range(54)]


def _cohere2_moe(config: ConfigFields, num_layers: int) -> list[Kind]:
    dense = min(config.optional("first_k_dense_replace") or 0, num_layers)
    inner = ConfigFields(
        {**config.fields, "sliding_window_pattern": config.find("prefix_dense_sliding_window_pattern")}, config.path
    )
    scheme = _last_of(4, key="sliding_window_pattern")
    return [
        *(_last_of(1, key="sliding_window_pattern")(inner, dense) if dense else []),
        *scheme(config, num_layers - dense),
    ]


_LINEAR = _last_of(4, "state", "full_attention_interval")

_SCHEMES: Mapping[str, Scheme] = {
    "afmoe": _last_of(4, key="global_attn_every_n_layers"),
    "beam": _last_of(6, last_full=True),
    "bailing_hybrid": _last_of(6, "state", "layer_group_size"),
    "bamba": _listed("attn_layer_indices", "state", absent="state"),
    "cohere2": _last_of(4, key="sliding_window_pattern"),
    "cohere2_moe": _cohere2_moe,
    "cohere_compass_text": _all_full,
    "cwm": _first_of(4),
    **dict.fromkeys(("dots1", "qwen2", "qwen2_moe", "qwen3"), _from_max_window_layers),
    **dict.fromkeys(("exaone4", "exaone_moe"), _last_of(4, key="sliding_window_pattern")),
    **dict.fromkeys(("falcon_h1", "zaya", "laguna", "mellum"), _all_full),
    **dict.fromkeys(HEADLESS, _all_states),
    "flint": _where(lambda index, number: index < 2 or index % 4 == 1 or index == number - 1),
    **dict.fromkeys(("gemma2", "vaultgemma"), _last_of(2, key="sliding_window_pattern")),
    "gemma3_text": _last_of(6, key="sliding_window_pattern"),
    "gemma3n_text": _last_of(5),
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), _last_of(6, last_full=True)),
    "gpt_neo": _all_full,
    "gpt_oss": _last_of(2),
    **dict.fromkeys(("granite_swa", "granitemoe_swa"), _first_of(4)),
    "granitemoehybrid": _all_states,
    "inkling_text": _inkling,
    "inkling2_text": _last_of(6),
    "kimi_linear": _kimi,
    "kolibri1": _last_of(5),
    **dict.fromkeys(("lfm2", "lfm2_moe"), _listed("full_attn_idxs", "state", absent="full")),
    "lfm3": lambda config, number: [
        "full" if index % 4 == 2 else "window" if index and index % 4 == 0 else "state" for index in range(number)
    ],
    **dict.fromkeys(("llama4", "llama4_text"), _llama4),
    "mimo_v2_flash": _where(lambda index, number: index == 0 or (index + 1) % 6 == 0),
    "minimax": _where(lambda index, number: bool((index + 1) % 2), "state"),
    "modernbert-decoder": _first_of(3, "global_attn_every_n_layers"),
    "nemotron_h": _nemotron_h,
    "olmo3": _last_of(4, key="sliding_window_pattern"),
    "olmo_hybrid": _last_of(4, "state"),
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"), _LINEAR),
    "recurrent_gemma": _recurrent_gemma,
    "smollm3": _smollm3,
    "zamba": _zamba,
    "zamba2": _zamba2,
}
"""By model_type: which layer is of which kind, where the config has no list of them."""
