"""The GGUF file that llama.cpp's converter makes of a checkpoint, in float32: its keys, names and orders of rows.

The names come from the `gguf` library; which keys, and which rows change places, from the converter's classes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType, get_tensor_name_map

from families.checkpoints import FloatArray
from gguf_files import tiny_vocabulary, write_gguf

Config = Mapping[str, Any]

ARCHITECTURES = {
    "gpt2": "gpt2",
    "gpt_bigcode": "starcoder",
    "gpt_neox": "gptneox",
    "falcon": "falcon",
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gemma4_text": "gemma4",
    "gemma4_unified_text": "gemma4",
    "phi": "phi2",
    "phi3": "phi3",
    "smollm3": "smollm3",
    "granite": "granite",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "olmoe": "olmoe",
    "mixtral": "llama",
    "granitemoe": "granitemoe",
    "granitemoeshared": "granitemoe",
    "gpt_oss": "gpt-oss",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "starcoder2": "starcoder2",
    "ministral3": "mistral3",
    "exaone4": "exaone4",
    "glm4": "glm4",
    "ernie4_5": "ernie4_5",
    "hunyuan_v1_dense": "hunyuan-dense",
    "seed_oss": "seed_oss",
    "cohere": "command-r",
    "cohere2": "cohere2",
    "apertus": "apertus",
    "arcee": "arcee",
}
"""What the converter calls each model_type."""

_PERMUTED = ("llama", "smollm3", "granite", "granitemoe", "mistral3", "arcee")
_FLOATS = ("rope.freq_base", "rope.scaling.factor", "rope.scaling.yarn_")
"""Numbers that a config.json may have without a point."""
_SHIFTED = ("gemma", "gemma2", "gemma3")


def gguf_of(
    path: Path,
    config: Config,
    tensors: Mapping[str, FloatArray],
    extra: Config | None = None,
    *,
    stored: Callable[[dict[str, FloatArray]], Mapping[str, FloatArray]] = lambda tensors: tensors,
) -> Path:
    """Write the file and return its path.

    `extra` are keys more, or (None) less, without the architecture's name; `stored` makes other tensors of those that
    the converter would write.
    """
    architecture = ARCHITECTURES[config["model_type"]]
    keys = {
        key: float(value) if key.startswith(_FLOATS) else value
        for key, value in (_keys(config) | dict(extra or {})).items()
        if value is not None
    }
    metadata = {"general.architecture": architecture} | {f"{architecture}.{key}": one for key, one in keys.items()}
    vocabulary = tiny_vocabulary(config["vocab_size"])
    curves = {name: values for name, values in tensors.items() if ".act_fn." in name}
    metadata |= _curve_keys(curves)
    others = {name: values for name, values in tensors.items() if name not in curves}
    written = stored(dict(_tensors(architecture, config, others)) | _rope_tensors(config))
    f32, mxfp4 = GGMLQuantizationType.F32, GGMLQuantizationType.MXFP4
    typed = {name: (values, mxfp4 if values.dtype == np.uint8 else f32) for name, values in written.items()}
    return write_gguf(path, metadata | vocabulary, typed)


def _curve_keys(curves: Mapping[str, FloatArray]) -> dict[str, list[float]]:
    """The numbers of xIELU, a list of all layers' each."""
    found: dict[str, dict[int, float]] = {}
    for name, value in curves.items():
        found.setdefault(name.rpartition(".")[2], {})[int(name.split(".")[2])] = float(value.reshape(()))
    return {f"xielu.{kind}": [layers[index] for index in sorted(layers)] for kind, layers in found.items()}


def _first(config: Config, *names: str) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)


def _num_heads(config: Config) -> tuple[int, int]:
    """Of queries, of keys and values."""
    heads = _first(config, "num_attention_heads", "n_head")
    match config["model_type"]:
        case "gpt_bigcode":
            return heads, 1
        case "falcon":
            return heads, config["num_kv_heads"] if config["new_decoder_architecture"] else 1
    return heads, config.get("num_key_value_heads") or heads


def _keys(config: Config) -> dict[str, Any]:
    family = config["model_type"]
    hidden_size, (num_heads, num_kv_heads) = _first(config, "hidden_size", "n_embd"), _num_heads(config)
    rms_eps = config.get("rms_norm_eps")
    keys: dict[str, Any] = {
        "block_count": _first(config, "num_hidden_layers", "n_layer"),
        "context_length": _first(config, "max_position_embeddings", "n_positions"),
        "embedding_length": hidden_size,
        "feed_forward_length": _first(config, "intermediate_size", "n_inner", "ffn_hidden_size") or 4 * hidden_size,
        "attention.head_count": num_heads,
        "attention.head_count_kv": num_kv_heads,
        "attention.key_length": config.get("head_dim"),
        "attention.value_length": config.get("head_dim"),
        "attention.layer_norm_rms_epsilon": rms_eps,
        "attention.layer_norm_epsilon": None
        if rms_eps
        else _first(config, "layer_norm_epsilon", "layer_norm_eps", "norm_epsilon"),
        "rope.freq_base": _first(config, "rope_theta", "rotary_emb_base"),
        "expert_count": _first(config, "num_local_experts", "num_experts"),
        "expert_used_count": config.get("num_experts_per_tok"),
        "expert_feed_forward_length": config.get("moe_intermediate_size"),
        "expert_shared_feed_forward_length": _first(
            config, "shared_expert_intermediate_size", "shared_intermediate_size"
        ),
    }
    partial = _first(config, "partial_rotary_factor", "rotary_pct")
    if partial is not None:
        keys["rope.dimension_count"] = int(partial * hidden_size) // num_heads
    if ARCHITECTURES[family] in _PERMUTED:
        keys["rope.dimension_count"] = config.get("head_dim") or hidden_size // num_heads
        keys["vocab_size"] = config["vocab_size"]
    match family:
        case "ministral3":
            scaling = config["rope_parameters"]
            keys["attention.temperature_scale"] = scaling["llama_4_scaling_beta"]
            keys["rope.scaling.yarn_log_multiplier"] = scaling["mscale_all_dim"]
            keys["rope.freq_base"] = scaling["rope_theta"]
        case "exaone4" if config["sliding_window"]:
            keys["attention.sliding_window"] = config["sliding_window"]
            keys["attention.sliding_window_pattern"] = [one == "sliding_attention" for one in config["layer_types"]]
        case "glm4":
            keys["rope.dimension_count"] = int(config["head_dim"] * config["partial_rotary_factor"])
        case "hunyuan_v1_dense":
            dims, scaling = config["head_dim"], config["rope_scaling"]
            keys["rope.freq_base"] = config["rope_theta"] * scaling["alpha"] ** (dims / (dims - 2))
            keys |= {"rope.scaling.type": "none", "rope.scaling.factor": 1}
        case "cohere" | "cohere2":
            keys |= {"logit_scale": config["logit_scale"], "rope.scaling.type": "none"}
            keys["attention.sliding_window"] = config.get("sliding_window")
            if family == "cohere2":
                keys["rope.dimension_count"] = hidden_size // num_heads
        case "gpt_neox":
            keys["use_parallel_residual"] = config["use_parallel_residual"]
        case "granite" | "granitemoe" | "granitemoeshared":
            keys["attention.scale"] = config["attention_multiplier"]
            keys["embedding_scale"] = config["embedding_multiplier"]
            keys["residual_scale"] = config["residual_multiplier"]
            keys["logit_scale"] = config["logits_scaling"]
        case "gemma2" | "gemma3_text":
            keys["attn_logit_softcapping"] = config.get("attn_logit_softcapping")
            keys["final_logit_softcapping"] = config.get("final_logit_softcapping")
            keys["attention.sliding_window"] = config["sliding_window"]
            keys["rope.freq_base_swa"] = config.get("rope_local_base_freq")
        case "gpt_oss":
            keys["attention.sliding_window"] = config["sliding_window"]
            keys["expert_feed_forward_length"] = config["intermediate_size"]
        case "gemma4_text" | "gemma4_unified_text":
            keys |= _gemma4_keys(config)
        case "phi3":
            keys["attention.sliding_window"] = config.get("sliding_window") or 0
        case "olmo3":
            keys["attention.sliding_window"] = config["sliding_window"]
            keys["attention.sliding_window_pattern"] = [
                (index + 1) % 4 != 0 for index in range(config["num_hidden_layers"])
            ]
    return keys | _rope_keys(config)


def _gemma4_keys(config: Config) -> dict[str, Any]:
    slides = [kind == "sliding_attention" for kind in config["layer_types"]]
    num_layers, wide, width = len(slides), config["use_double_wide_mlp"], config["intermediate_size"]
    heads, heads_of_all = config["num_key_value_heads"], config.get("num_global_key_value_heads")
    first_shared = num_layers - config["num_kv_shared_layers"]
    return {
        "attention.sliding_window": config["sliding_window"],
        "attention.sliding_window_pattern": slides,
        "attention.shared_kv_layers": config["num_kv_shared_layers"],
        "attention.head_count_kv": [heads if slide else heads_of_all for slide in slides] if heads_of_all else heads,
        "attention.key_length": config["global_head_dim"],
        "attention.value_length": config["global_head_dim"],
        "attention.key_length_swa": config["head_dim"],
        "attention.value_length_swa": config["head_dim"],
        "feed_forward_length": [width * (1 + (wide and index >= first_shared)) for index in range(num_layers)],
        "expert_count": config.get("num_experts"),
        "expert_used_count": config.get("top_k_experts"),
        "expert_feed_forward_length": config.get("moe_intermediate_size"),
        "embedding_length_per_layer_input": config.get("hidden_size_per_layer_input") or 0,
        "final_logit_softcapping": config["final_logit_softcapping"],
        "rope.freq_base": 1_000_000.0,
        "rope.freq_base_swa": 10_000.0,
        "rope.dimension_count": config["global_head_dim"],
        "rope.dimension_count_swa": config["head_dim"],
    }


def _rope_keys(config: Config) -> dict[str, Any]:
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    original: Any = _first({**scaling, **config}, "original_max_position_embeddings")
    match scaling.get("rope_type", scaling.get("type")):
        case "linear":
            return {"rope.scaling.type": "linear", "rope.scaling.factor": scaling["factor"]}
        case "yarn":
            return {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": scaling["factor"],
                "rope.scaling.original_context_length": original,
                "rope.scaling.yarn_attn_factor": scaling.get("attention_factor"),
                "rope.scaling.yarn_beta_fast": scaling.get("beta_fast"),
                "rope.scaling.yarn_beta_slow": scaling.get("beta_slow"),
            }
        case "longrope":  # without a type
            stretch = config["max_position_embeddings"] / original
            factor = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
            return {"rope.scaling.original_context_length": original, "rope.scaling.attn_factor": factor}
    return {}


def _rope_tensors(config: Config) -> dict[str, FloatArray]:
    scaling = config.get("rope_scaling") or {}
    if ARCHITECTURES[config["model_type"]] == "gemma4":
        pairs, rotating = config["global_head_dim"] // 2, config["global_head_dim"] // 8
        return {"rope_freqs.weight": np.asarray([1.0] * rotating + [1e30] * (pairs - rotating), np.float32)}
    match scaling.get("rope_type", scaling.get("type")):
        case "longrope":
            return {
                f"rope_factors_{length}.weight": np.asarray(scaling[f"{length}_factor"], np.float32)
                for length in ("long", "short")
            }
        case "llama3":
            num_dims = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
            low, high, factor = (scaling[key] for key in ("low_freq_factor", "high_freq_factor", "factor"))
            factors = []
            for pair in range(num_dims // 2):
                wave = 2 * math.pi * config["rope_theta"] ** (2 * pair / num_dims)
                rotations = scaling["original_max_position_embeddings"] / wave
                way = min(1.0, max(0.0, (rotations - low) / (high - low)))
                factors.append(1 / ((1 - way) / factor + way))
            return {"rope_freqs.weight": np.asarray(factors, np.float32)}
    return {}


def _tensors(architecture: str, config: Config, tensors: Mapping[str, FloatArray]) -> Iterator[tuple[str, FloatArray]]:
    kind = next(one for one, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(MODEL_ARCH(kind), _first(config, "num_hidden_layers", "n_layer"))
    for given, values in _gpt_oss(tensors) if architecture == "gpt-oss" else _experts_together(tensors):
        name = f"{given}.weight" if given.endswith(_BARE) else given
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if of_router := _OF_ROUTER.fullmatch(name):
            stored = f"blk.{of_router[1]}.{_ROUTER_SCALES[of_router[2]]}.scale"
        assert stored is not None, name
        yield stored, np.ascontiguousarray(_values(architecture, config, name, values))


_BARE = ("layer_scalar", ".experts.gate_up_proj", ".experts.down_proj")
"""Parameters that are in no module."""
_OF_ROUTER = re.compile(r"model\.layers\.(\d+)\.router\.(\w*scale)")
_ROUTER_SCALES = {"scale": "ffn_gate_inp", "per_expert_scale": "ffn_down_exps"}
_OF_EXPERT = re.compile(r"(model\.layers\.\d+)\.(?:mlp|block_sparse_moe)\.experts\.\d+\.(\w+)\.weight")
_OF_MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_FUSED = {".block_sparse_moe.input_linear.": ".mlp.experts.{}.", ".shared_mlp.input_linear.": ".mlp.shared_expert.{}."}


def _experts_together(tensors: Mapping[str, FloatArray]) -> Iterator[tuple[str, FloatArray]]:
    """All experts of a layer become one tensor; gates and ups, where they are one, become two."""
    together: dict[str, list[FloatArray]] = {}
    for name, values in tensors.items():
        fused = next((part for part in _FUSED if part in name), None)
        if match := _OF_EXPERT.fullmatch(name):
            stacked = f"{match[1]}.mlp.experts.{_OF_MIXTRAL.get(match[2], match[2])}.weight"
            together.setdefault(stacked, []).append(values)
        elif fused is not None:
            for kind, half in zip(("gate_proj", "up_proj"), np.split(values, 2, axis=-2), strict=True):
                yield name.replace(fused, _FUSED[fused].format(kind)), half
        else:
            yield name, values
    yield from ((name, np.stack(values)) for name, values in together.items())


def _gpt_oss(tensors: Mapping[str, FloatArray]) -> Iterator[tuple[str, FloatArray]]:
    """Experts are turned, gates and ups, whose rows alternate, become two; sinks get a kind."""
    for name, values in tensors.items():
        base, _, part = name.partition(".mlp.experts.")
        part, kind = (part.removesuffix("_bias"), "bias") if part.endswith("_bias") else (part, "weight")
        rows = values
        if part.endswith("_blocks"):
            part = part.removesuffix("_blocks")
            rows = _gguf_blocks(values, tensors[f"{base}.mlp.experts.{part}_scales"])
        elif kind == "weight" and part:
            rows = values.swapaxes(1, 2)
        if part.endswith("_scales"):
            continue
        if part == "gate_up_proj":
            yield f"{base}.mlp.experts.gate_proj.{kind}", rows[:, 0::2]
            yield f"{base}.mlp.experts.up_proj.{kind}", rows[:, 1::2]
        elif part:
            yield f"{base}.mlp.experts.{part}.{kind}", rows
        else:
            yield f"{name}.weight" if name.endswith(".sinks") else name, values


def _gguf_blocks(blocks: npt.NDArray[Any], scales: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(experts, rows, bytes): a scale, and 16 bytes of two values 16 apart, in place of neighbours."""
    values = [(blocks[..., at // 2] >> (4 * (at % 2))) & 15 for at in range(32)]
    packed = [values[at] | values[at + 16] << 4 for at in range(16)]
    return np.stack([scales, *packed], axis=-1).reshape(*blocks.shape[:2], -1)


def _values(architecture: str, config: Config, name: str, values: FloatArray) -> FloatArray:
    num_heads, num_kv_heads = _num_heads(config)
    if architecture in _PERMUTED and ".q_proj." in name:
        return _pairs_beside(values, num_heads)
    if architecture in _PERMUTED and ".k_proj." in name:
        return _pairs_beside(values, num_kv_heads)
    if architecture in _SHIFTED and name.endswith("norm.weight"):
        return values + np.float32(1)
    if architecture == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        return values.T
    if architecture in ("gptneox", "falcon") and ".query_key_value." in name:
        kv_heads = num_heads if architecture == "gptneox" else num_kv_heads
        return _heads_apart(values, num_heads, kv_heads)
    return values


def _pairs_beside(values: FloatArray, num_heads: int) -> FloatArray:
    """Rows that rotate together, half a head apart, become neighbours."""
    halves = values.reshape(num_heads, 2, -1, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _heads_apart(values: FloatArray, num_heads: int, num_kv_heads: int) -> FloatArray:
    """Groups of queries with their key and value become all queries, all keys, all values."""
    groups = values.reshape(num_kv_heads, num_heads // num_kv_heads + 2, -1, *values.shape[1:])
    apart = (groups[:, :-2], groups[:, -2], groups[:, -1])
    return np.concatenate([part.reshape(-1, *values.shape[1:]) for part in apart])
