"""What kvik reads in a config.json against the caches and weights of transformers' own models, class by class."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.cache_utils import DummyLayer, LinearAttentionLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from families.make_config_classes import text as table_text
from kvik.errors import ModelError
from kvik.models import config_classes
from kvik.models.config_classes import is_encoder_decoder, text_part, with_defaults
from kvik.models.hf_expert_counts import num_experts
from kvik.models.hf_layers import KeptLayer, KeptLayers, read_layers
from kvik.models.hf_params import count_params

NUM_TOKENS = 3
PATH = Path("config.json")

ASSISTANTS = ("gemma4_assistant", "gemma4_unified_assistant")
"""Refused, whatever they assist; transformers 5.23 does not build the text part of the first from its defaults."""

REFUSED = {
    *("glm4_moe", "musicgen", "musicgen_melody"),  # 96 heads of a 96th of 4,096 dimensions; encoders
    *("blt", "deepseek_v4", "dots3_note", "dots3_note_text", *ASSISTANTS, "mllama"),
    *("moshi", "qwen4_exp", "qwen4_exp_text", "reformer", "xlm", "xlnet"),
}
"""docs/planning.md says why. Those that have an encoder are refused too."""

NOT_BUILT = {
    "bamba": "can only be called on Attention layers",
    "cohere_compass_text": "full_attention",
    "dbrx": "rope_theta",
    "deepseek_v2": "'k' must be int, not NoneType",
    "dots1": "empty()",
    "granitemoehybrid": "can only be called on Attention layers",
    "hunyuan_v1_dense": "unsupported operand",
    "hunyuan_v1_moe": "unsupported operand",
    "jetmoe": "Cannot copy out of meta tensor",
    "lfm2_moe": "not subscriptable",
    "ministral": "unsupported operand",
    "nemotron": "unsupported operand",
    **dict.fromkeys(("openai-gpt", "recurrent_gemma", "rwkv"), "past_key_values"),
    "xlstm": "has no attribute 'layers'",
    "xmod": "Input language unknown",
}
"""Classes whose models transformers 5.23 cannot build from their own defaults, or run on no data, and why."""

Kept = tuple[str, int | None, int]
"""Kind, window, bytes of a token."""


def minimal(name: str) -> dict[str, Any]:
    """A config.json of nothing but its class; of one that wraps any other, with the fields of that."""
    config = CONFIG_MAPPING[name]
    if name in NOT_BUILT or getattr(config, "sub_configs", {}).get("text_config") is None:
        return {"model_type": name}
    inner = config.sub_configs["text_config"]
    kind = getattr(inner, "model_type", None)
    return {"model_type": name, "text_config": {"model_type": kind} if kind else text_config(name).to_dict()}


def text_config(name: str) -> Any:
    config = CONFIG_MAPPING[name]().get_text_config(decoder=True)
    config.is_decoder = True
    return config


def planned(config: dict[str, Any]) -> KeptLayers:
    return read_layers(with_defaults(text_part(config, PATH)))


def kept_of(layer: KeptLayer) -> Kept:
    if layer.kind == "state" or layer.kv_from is not None:
        return "none", None, 0
    group = layer.group(0)
    return layer.kind, layer.window, group.num_kv_heads * group.vector_bytes


def build(config: Any) -> torch.nn.Module:
    """A model without memory, whose experts add nothing: which of them are chosen cannot be known without data."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for module in model.modules():
        if "Experts" in type(module).__name__:
            module.forward = lambda hidden_states, *args, **kwargs: torch.zeros_like(hidden_states)
    return model.eval()


def cache_of(model: torch.nn.Module) -> list[Kept]:
    with torch.device("meta"), torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        for name in ("item", "__bool__", "__int__"):  # of a mask, of which all is true
            patch.setattr(torch.Tensor, name, lambda self: True)
        made = model(input_ids=torch.ones((1, NUM_TOKENS), dtype=torch.long), use_cache=True)
    cache = made.cache_params if "cache_params" in made else made.past_key_values
    kept: list[Kept] = []
    for layer in getattr(cache, "self_attention_cache", cache).layers:
        if isinstance(layer, DummyLayer) or type(layer) is LinearAttentionLayer or layer.keys is None:
            kept.append(("none", None, 0))
            continue
        tensors = (layer.keys, layer.values, getattr(layer, "indexer_keys", None))
        num_tokens = layer.keys.shape[-2]  # CPM-Ant has tokens of its own before those of the text
        values = sum(one.numel() for one in tensors if isinstance(one, torch.Tensor))
        window = getattr(layer, "sliding_window", None)
        kept.append(("full" if window is None else "window", window, 2 * values // num_tokens))
    nothing: Kept = ("none", None, 0)
    return kept + [nothing] * (model.config.get_text_config(decoder=True).num_hidden_layers - len(kept))


def expected(kept: KeptLayers) -> list[Kept]:
    """What kvik says, in the words of transformers' caches: latents are like others there, and chunks are windows."""
    words = {"latent": "full", "chunk": "window"}
    return [(words.get(kind, kind), window, size) for kind, window, size in map(kept_of, kept.layers)]


def without_long_windows(kept: list[Kept], context: int) -> list[Kept]:
    return [
        ("full", None, size) if window and window >= context else (kind, window, size) for kind, window, size in kept
    ]


@pytest.mark.parametrize("name", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_the_cache_of_a_class_with_its_defaults(name: str) -> None:
    if name in REFUSED or is_encoder_decoder(name):
        with pytest.raises(ModelError, match=r"model_type|does not divide"):
            planned({"model_type": name} if name in ASSISTANTS else minimal(name))
        return
    kept = planned(minimal(name))
    if name in NOT_BUILT:
        with pytest.raises(Exception, match=re.escape(NOT_BUILT[name])):  # whatever transformers raises
            cache_of(build(CONFIG_MAPPING[name]()))
        return
    config = text_config(name)
    assert planned(config.to_dict()).layers == kept.layers, "whether fields are said or left to the class"
    model = build(CONFIG_MAPPING[name]() if name == "emu3" else config)  # its text part has no model alone
    assert without_long_windows(cache_of(model), kept.max_context) == expected(kept)
    check_params(name, model, kept)


def check_params(name: str, model: torch.nn.Module, kept: KeptLayers) -> None:
    fields = with_defaults(text_part(minimal(name), PATH))
    params = count_params(fields, kept)
    if params is None:
        return
    matrices = sum(one.numel() for one in model.parameters() if one.ndim > 1)
    assert params.total == pytest.approx(matrices, rel=2e-3)
    assert params.active <= params.total
    assert (params.active < params.total) == bool(num_experts(fields))


def test_the_table_is_of_this_transformers() -> None:
    path = Path(config_classes.__file__).with_suffix(".json")
    assert path.read_text("utf-8") == table_text(), f"make it again, by transformers {transformers.__version__}"
