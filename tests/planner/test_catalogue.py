"""The catalogue: every entry agrees with itself, and with the figures that were published."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvik.cache.spec import CODED_HEAD_DIMS
from kvik.errors import InvalidInput
from kvik.planner.catalogue import (
    device_entries,
    device_of,
    find_device,
    find_model,
    model_entries,
    near_models,
    shape_of,
)
from kvik.planner.near import plain
from kvik.planner.shape import KV_DTYPES
from looped import looped

MODELS = list(model_entries().values())
DEVICES = list(device_entries().values())
models = looped("entry", MODELS, lambda entry: entry["name"])
devices = looped("entry", DEVICES, lambda entry: entry["name"])

# Heads times head_dim is not the hidden size in these, as their publishers have it.
OTHER_WIDTH = (
    "qwen3-0.6b", "qwen3-4b", "qwen3-32b", "qwen3-30b-a3b", "qwen3-235b-a22b", "qwen3-next-80b-a3b", "qwen3.5-27b",
    "gemma-7b", "gemma-2-2b", "gemma-2-9b", "gemma-2-27b", "gemma-3-1b", "gemma-3-4b", "gemma-3-12b", "gemma-3-27b",
    "gemma-4-26b-a4b", "deepseek-v2-lite", "deepseek-v2", "deepseek-v3", "kimi-k2", "gpt-oss-20b", "gpt-oss-120b",
    "palm-540b", "nemotron-3-nano-30b-a3b",
)  # fmt: skip

FULL_LAYERS: dict[str, Callable[[int], int]] = {
    "full": lambda layers: layers,
    "full (MLA)": lambda layers: layers,
    "all sliding": lambda layers: 0,
    "alternating sliding,full": lambda layers: layers // 2,
    "5 sliding:1 full": lambda layers: layers // 6,
    "3 sliding:1 full (NoPE)": lambda layers: layers // 4,
    "3 chunked(8192):1 full (NoPE)": lambda layers: layers // 4,
    "3 linear:1 full": lambda layers: layers // 4,
    "3 linear(GatedDeltaNet):1 full": lambda layers: layers // 4,
    "MEMEM*EMEMEM*... (6 attention of 52)": lambda layers: 6,
}

# Bytes of f16 keys and values a token as others print them, and the last digit that they print.
PUBLISHED = {
    "gpt3-175b": (4.72e6, 1e4),
    "opt-175b": (4.5 * 2**20, 1e5),
    "opt-13b": (800 * 2**10, 1e3),  # Kwon et al., 2023: 800 KB
    "llama-1-7b": (0.5 * 2**20, 1e4),
    "llama-2-7b": (0.5 * 2**20, 1e4),
    "llama-1-65b": (2.5 * 2**20, 1e5),
    "llama-2-70b": (0.33e6, 1e4),
    "llama-3-8b": (128 * 2**10, 1e3),
    "llama-3-70b": (0.33e6, 1e4),
    "llama-3.1-405b": (516.096e3, 1),  # DeepSeek-AI, 2025, "Insights into DeepSeek-V3", table 1, as the next two
    "qwen2.5-72b": (327.680e3, 1),
    "deepseek-v3": (70.272e3, 1),
    "mistral-7b-v0.1": (128 * 2**10, 1e3),
    "falcon-7b": (8 * 2**10, 1e2),
    "smollm2-135m": (23_040, 1),
}


def test_the_catalogue_is_whole() -> None:
    assert len(MODELS) == 113
    assert len(DEVICES) == 47


@models
def test_an_entry_agrees_with_itself(entry: dict[str, Any]) -> None:
    for key in ("layers", "hidden", "heads", "kv_heads", "head_dim", "vocab", "max_context"):
        assert type(entry[key]) is int, key
        assert entry[key] > 0, key
    assert entry["heads"] % entry["kv_heads"] == 0
    assert (entry["heads"] * entry["head_dim"] == entry["hidden"]) == (entry["name"] not in OTHER_WIDTH)
    assert entry["full_layers"] + entry["windowed_layers"] + entry["layers_without_kv"] == entry["layers"]
    assert entry["full_layers"] == FULL_LAYERS[entry["layer_pattern"]](entry["layers"])
    assert (entry["windowed_layers"] > 0) == ("sliding_window" in entry or "chunk" in entry)
    assert ("kv_lora_rank" in entry) == ("qk_rope_head_dim" in entry) == ("MLA" in entry["layer_pattern"])
    known = {"all", "layer_pattern", "params_b", "layers", "hidden", "heads", "kv_heads", "vocab", "max_context"}
    assert set(entry["uncertain"]) <= known | {"sliding_window"}
    assert entry["source"].strip()


@models
def test_its_parameters_are_enough_for_its_attention_and_its_vocabulary(entry: dict[str, Any]) -> None:
    attention = 2 * entry["hidden"] * entry["head_dim"] * (entry["heads"] + entry["kv_heads"])
    if "kv_lora_rank" in entry:
        attention = entry["hidden"] * (entry["kv_lora_rank"] + entry["qk_rope_head_dim"])
    min_params = (entry["full_layers"] + entry["windowed_layers"]) * attention + entry["vocab"] * entry["hidden"]
    assert min_params < entry["params_b"] * 1e9
    active = entry.get("active_params_b")
    assert active is None or 0 < active < entry["params_b"]


@models
def test_its_bytes_a_token_follow_from_its_heads(entry: dict[str, Any]) -> None:
    """By the formula written out once more, from the entry's own words."""
    shape = shape_of(entry)
    for dtype, item_bytes, scale_bytes in (("f32", 4, 0), ("f16", 2, 0), ("int8", 1, 4)):
        if "kv_lora_rank" in entry:
            rank, rope = entry["kv_lora_rank"], entry["qk_rope_head_dim"]
            token = entry["layers"] * ((rank + rope) * item_bytes + 2 * scale_bytes)
        else:
            heads, dim = (
                entry.get("global_kv_heads", entry["kv_heads"]),
                entry.get("global_head_dim", entry["head_dim"]),
            )
            token = entry["full_layers"] * 2 * heads * (dim * item_bytes + scale_bytes)
            head_bytes = entry["head_dim"] * item_bytes + scale_bytes
            token += entry["windowed_layers"] * 2 * entry["kv_heads"] * head_bytes
        assert shape.token_bytes(dtype) == token
    keeps_codes = "kv_lora_rank" not in entry and bool(entry["full_layers"])
    keeps_codes = keeps_codes and entry.get("global_head_dim", entry["head_dim"]) in CODED_HEAD_DIMS
    assert shape.kv_dtypes == (KV_DTYPES if keeps_codes else KV_DTYPES[:-1])


@looped("name", PUBLISHED)
def test_published_figures_are_met_within_their_rounding(name: str) -> None:
    figure, last_digit = PUBLISHED[name]
    shape = find_model(name)
    assert shape is not None
    assert abs(shape.token_bytes("f16") - figure) <= last_digit / 2 * 1.05


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("llama-2-7b", "MHA"), ("llama-2-13b", "MHA"), ("llama-2-70b", "GQA-8"), ("mistral-7b-v0.1", "GQA-8"),
        ("falcon-7b", "MQA"), ("gpt3-175b", "MHA"), ("deepseek-v3", "MLA"), ("starcoder", "MQA"),
    ],
)  # fmt: skip
def test_who_groups_its_heads(name: str, attention: str) -> None:
    shape = find_model(name)
    assert shape is not None
    assert shape.attention == attention


@devices
def test_a_device_is_possible(entry: dict[str, Any]) -> None:
    device = device_of(entry)
    for figure, minimum, maximum in (
        (device.memory_bytes, 1e9, 1e13),
        (device.bytes_per_s, 1e10, 1e13),
        (device.operations_per_s, 1e12, 1e16),
    ):
        assert figure is None or minimum < figure < maximum
    if device.operations_per_s and device.bytes_per_s:  # operations for each byte read: what GPUs are built for
        assert 50 < device.operations_per_s / device.bytes_per_s < 600
    assert device.source.strip()


@pytest.mark.parametrize("entries", [MODELS, DEVICES], ids=["models", "devices"])
def test_no_two_names_are_one(entries: list[dict[str, Any]]) -> None:
    names = [plain(name) for entry in entries for name in (entry["name"], *entry["aliases"])]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "name", ["llama-3-8b", "Llama 3 8B", "LLAMA_3_8B", "llama3-8b", "Llama-3-8B-Instruct", "llama-3-8b-hf"]
)
def test_a_name_may_be_written_in_many_ways(name: str) -> None:
    shape = find_model(name)
    assert shape is not None
    assert shape.name == "llama-3-8b"


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("h100", "NVIDIA H100 SXM"),
        ("H100-PCIe", "NVIDIA H100 PCIe"),
        ("a100", "NVIDIA A100 80GB SXM"),
        ("4090", "NVIDIA RTX 4090"),
        ("rtx 4090", "NVIDIA RTX 4090"),
        ("m1", "Apple M1"),
        ("m1 max", "Apple M1 Max"),
        ("l4", "NVIDIA L4"),
    ],
)
def test_a_device_by_a_short_name(name: str, device: str) -> None:
    assert find_device(name).name == device


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("rtx", "stands for several devices", "NVIDIA RTX 3090, NVIDIA RTX 4090"),
        ("h1000", "no device of the catalogue", "take one of: NVIDIA H100 SXM"),
        ("", "'' is no device", "--list devices"),
        ("\x1b[2J", "no device", "--list devices"),
    ],
)
def test_an_unknown_device_is_refused_with_near_ones(name: str, message: str, hint: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        find_device(name)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_near_models_are_the_near_ones() -> None:
    assert near_models("lama-3-8b")[0] == "llama-3-8b"
    assert near_models("meta-llama/Llama-3.1-8B")[0] == "llama-3.1-8b"
    assert near_models("zzzzzz") == []
    assert find_model("zzzzzz") is None
