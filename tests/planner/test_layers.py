"""What `kvik plan` makes of layers that kvik does not run: from a config.json, GGUF keys, a folder's headers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from checkpoints import tiny_checkpoint
from gguf_files import write_gguf
from kvik.errors import ModelError
from kvik.planner.plan import plan
from kvik.planner.shape import ModelShape
from kvik.planner.sources import find_shape

F16 = GGMLQuantizationType.F16


def layers(shape: ModelShape) -> list[tuple[str, int, int, int | None]]:
    """Kind, number of layers, bytes of a token in one of them, window."""
    return [(one.kind, one.num_layers, one.num_kv_heads * one.vector_bytes, one.window) for one in shape.groups]


def of_config(folder: Path, **fields: Any) -> ModelShape:
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return find_shape(str(folder / "config.json"))


FULL = [("full", number, 512, None) for number in range(13)]
STATE = [("state", number, 0, None) for number in range(13)]
BASE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 12}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model_type": "qwen3_next", "full_attention_interval": 3, "head_dim": 64}, [FULL[4], STATE[8]]),
        ({"model_type": "jamba", "attn_layer_period": 4, "attn_layer_offset": 1}, [FULL[3], STATE[9]]),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "M*-E", "head_dim": 64}, [FULL[1], STATE[3]]),
        ({"model_type": "lfm2", "full_attn_idxs": [1, 5]}, [FULL[2], STATE[10]]),
        ({"model_type": "llama4_text", "attention_chunk_size": 64, "head_dim": 64}, [FULL[3], ("chunk", 9, 512, 64)]),
        (
            {"model_type": "gemma3n_text", "num_kv_shared_layers": 4, "sliding_window": 64, "head_dim": 64},
            [("full", 1, 512, None), ("window", 7, 512, 64)],
        ),
        (
            {"model_type": "gemma4_text", "head_dim": 64, "global_head_dim": 128, "sliding_window": 64},
            [("full", 2, 1024, None), ("window", 10, 512, 64)],
        ),
        (
            {"model_type": "deepseek_v32", "kv_lora_rank": 96, "qk_rope_head_dim": 32, "index_head_dim": 16}
            | {"num_key_value_heads": 4},
            [("latent", 12, 288, None)],
        ),
        (
            {"model_type": "mimo_v2_flash", "head_dim": 64, "v_head_dim": 32, "sliding_window": 64},
            [("full", 3, 384, None), ("window", 9, 768, 64)],
        ),
        ({"model_type": "mistral", "sliding_window": None}, [("full", 12, 512, None)]),
        ({"model_type": "mistral"}, [("window", 12, 512, 4096)]),
    ],
)  # fmt: skip
def test_layers_of_families_that_mix_them(
    tmp_path: Path, fields: dict[str, Any], expected: list[tuple[str, int, int, int | None]]
) -> None:
    assert layers(of_config(tmp_path, **BASE | fields)) == expected


def test_a_class_that_is_not_known_is_bounded_from_above_or_refused(tmp_path: Path) -> None:
    fields = BASE | {"model_type": "novel", "vocab_size": 100, "max_position_embeddings": 512}
    shape = of_config(tmp_path, **fields)
    assert layers(shape) == [("full", 12, 512, None)]
    assert "the figure for keys and values is an upper bound" in shape.note
    for key in ("value_head_dim", "global_num_key_value_heads", "num_kv_heads_full"):
        with pytest.raises(ModelError, match=f"{key} may make its keys and values larger"):
            of_config(tmp_path, **fields | {key: 64})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "deepseek_v4"}, "keeps compressed tokens"),
        ({"model_type": "bart"}, "has an encoder"),
        ({"model_type": "novel", "is_encoder_decoder": True}, "has an encoder"),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "M*X"}, "hybrid_override_pattern has 'X' in it"),
        ({"model_type": "lfm2", "full_attn_idxs": [12]}, "full_attn_idxs is [12]"),
        ({"model_type": "gemma3n_text", "num_kv_shared_layers": 12, "sliding_window": 9}, "_layers is 12 of 12"),
        ({"model_type": "gemma3n_text", "num_kv_shared_layers": 9, "sliding_window": 9}, "there is none before 3"),
        ({"model_type": "zamba2"}, "has no layers_block_type for its 12 layers"),
        ({"model_type": "recurrent_gemma", "block_types": ["magic"]}, "block_types is ['magic']"),
        ({"model_type": "jamba", "attn_layer_period": 4, "attn_layer_offset": "1"}, "attn_layer_offset is '1'"),
        ({"model_type": "jamba", "attn_layer_period": 4, "attn_layer_offset": 4}, "attn_layer_offset is 4, not in 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_refused_by_name(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError) as caught:
        of_config(tmp_path, **BASE | fields)
    assert said in caught.value.message


def test_weights_that_are_not_known_fit_nowhere_for_sure(tmp_path: Path) -> None:
    of_config(tmp_path, **BASE | {"model_type": "jamba"})
    for memory, fits in (("1TB", None), ("100kB", False)):
        fit = plan(str(tmp_path / "config.json"), context=256, memory=memory).fit
        assert fit is not None
        assert fit.fits is fits
        assert (fit.most_users, fit.largest_context, fit.change) == (None, None, None)


def test_experts_are_counted(tmp_path: Path) -> None:
    """Qwen3-30B-A3B, as published: 30.5 billion, 3.3 of them active."""
    shape = of_config(
        tmp_path, model_type="qwen3_moe", hidden_size=2048, num_hidden_layers=48, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
        intermediate_size=6144, vocab_size=151936, max_position_embeddings=40960, tie_word_embeddings=False,
    )  # fmt: skip
    assert shape.is_mixture
    assert shape.num_params == pytest.approx(30.53e9, rel=1e-3)
    assert shape.num_active_params == pytest.approx(3.35e9, rel=5e-3)


def test_a_folders_own_headers_tell_its_weights(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m", dtype="BF16")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "novel"}))
    shape = find_shape(str(folder))
    assert (shape.origin, shape.runs) == ("config.json", False)
    assert shape.tensors is not None
    assert shape.tensors.format == "bf16"
    stored = sum(one.stat().st_size for one in folder.glob("*.safetensors"))
    assert 0.9 * stored < shape.tensors.held_bytes < stored
    fit = plan(str(folder), context=64, memory="1GB").fit
    assert fit is not None
    assert fit.fits is True


def gguf(path: Path, architecture: str, keys: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> ModelShape:
    metadata = {"general.architecture": architecture} | {f"{architecture}.{key}": value for key, value in keys.items()}
    values = {
        name: (np.zeros(shape, np.float32), F16) for name, shape in ({"token_embd.weight": (50, 32)} | tensors).items()
    }
    return find_shape(str(write_gguf(path / "m.gguf", metadata, values)))


def test_gguf_keys_of_architectures_that_kvik_does_not_run(tmp_path: Path) -> None:
    base: dict[str, Any] = {"block_count": 4, "embedding_length": 32, "context_length": 512, "attention.head_count": 4}

    def attention(index: int, rows: int) -> dict[str, tuple[int, ...]]:
        names = {"k": rows, "v": rows, "q": 64}
        return {f"blk.{index}.attn_{name}.weight": (number, 32) for name, number in names.items()}

    window = gguf(
        tmp_path,
        "gpt-oss",
        base | {"attention.key_length": 16, "attention.sliding_window": 64, "expert_count": 8, "expert_used_count": 2},
        {name: shape for index in range(4) for name, shape in attention(index, 32).items()}
        | {f"blk.{index}.ffn_up_exps.weight": (8, 32, 32) for index in range(4)},
    )
    assert layers(window) == [("full", 2, 128, None), ("window", 2, 128, 64)]
    assert (window.is_mixture, window.num_params) == (True, 50 * 32 + 4 * (128 * 32 + 8 * 1024))
    assert window.num_active_params == 50 * 32 + 4 * (128 * 32 + 2 * 1024)
    assert window.tensors is not None
    assert (window.tensors.held_bytes, window.runs) == (2 * (50 * 32 + 4 * (128 * 32 + 8 * 1024)), False)

    hybrid = gguf(
        tmp_path, "lfm2", base | {"attention.head_count_kv": [0, 2, 0, 2]}, attention(1, 16) | attention(3, 16)
    )
    assert layers(hybrid) == [("full", 2, 64, None), ("state", 2, 0, None)]

    latent = gguf(
        tmp_path,
        "deepseek2",
        base | {"attention.kv_lora_rank": 24, "rope.dimension_count": 8},
        {f"blk.{index}.attn_kv_a_mqa.weight": (32, 32) for index in range(4)},
    )
    assert layers(latent) == [("latent", 4, 64, None)]

    shared = gguf(
        tmp_path,
        "gemma4",
        base
        | {"attention.key_length": 32, "attention.key_length_swa": 16, "attention.sliding_window": 64}
        | {"attention.sliding_window_pattern": [True, False, True, False]},
        attention(0, 32) | attention(1, 64) | {f"blk.{index}.attn_q.weight": (64, 32) for index in (2, 3)},
    )
    assert layers(shared) == [("full", 1, 256, None), ("window", 1, 128, 64)]
    assert shared.shared_layers == ((2, 0), (3, 1))

    strange = gguf(tmp_path, "novel", base | {"attention.sliding_window": 64}, attention(0, 16))
    assert layers(strange) == [("full", 1, 64, None), ("state", 3, 0, None)]
    assert "upper bound" in strange.note


def test_a_gguf_of_nonsense_is_refused(tmp_path: Path) -> None:
    base = {"block_count": 2, "embedding_length": 32, "context_length": 512, "attention.head_count": 4}
    with pytest.raises(ModelError, match="layer 0 has no keys"):
        gguf(tmp_path, "novel", base, {"blk.0.attn_q.weight": (64, 32)})
    with pytest.raises(ModelError, match="has 24 rows for a latent of 24"):
        gguf(tmp_path, "deepseek2", base | {"attention.kv_lora_rank": 24}, {"blk.0.attn_kv_a_mqa.weight": (24, 32)})
    with pytest.raises(ModelError, match="block_count"):
        gguf(tmp_path, "novel", base | {"block_count": 1 << 20}, {})


GEMMA4 = {"model_type": "gemma4_text", "head_dim": 256, "global_head_dim": 512, "hidden_size_per_layer_input": None}
WIDE = {**GEMMA4, "attention_k_eq_v": True, "sliding_window": 1024, "num_attention_heads": 16, "num_key_value_heads": 8}


@pytest.mark.parametrize(
    ("config", "num_params", "num_active_params", "token_bytes", "beyond_bytes"),
    [
        (
            {
                **GEMMA4,
                **{"hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 35, "num_key_value_heads": 1},
                **{"num_kv_shared_layers": 20, "use_double_wide_mlp": True, "hidden_size_per_layer_input": 256},
                "layer_types": ([*["sliding_attention"] * 4, "full_attention"]) * 7,
            },
            4_628_283_392,
            None,
            18_432,
            6_144,
        ),
        (
            {
                **WIDE,
                **{"model_type": "gemma4_unified_text", "hidden_size": 3840, "intermediate_size": 15_360},
                **{"num_hidden_layers": 48, "num_global_key_value_heads": 1},
            },
            11_906_580_480,
            None,
            344_064,
            16_384,
        ),
        (
            {
                **WIDE,
                **{"hidden_size": 2816, "intermediate_size": 2112, "num_hidden_layers": 30, "enable_moe_block": True},
                **{"num_global_key_value_heads": 2, "num_experts": 128, "top_k_experts": 8},
                "moe_intermediate_size": 704,
            },
            25_232_441_344,
            3_821_830_144,
            225_280,
            20_480,
        ),
    ],
    ids=["E2B", "12B", "26B-A4B"],
)
def test_gemma_4(
    tmp_path: Path,
    config: dict[str, Any],
    num_params: int,
    num_active_params: int | None,
    token_bytes: int,
    beyond_bytes: int,
) -> None:
    """Weights of the text decoder; bytes of a token in f16 before its windows are full, and beyond them."""
    shape = of_config(tmp_path, **config)
    assert (shape.num_params, shape.num_active_params if shape.is_mixture else None) == (num_params, num_active_params)
    assert (shape.token_bytes("f16"), shape.token_bytes_at(100_000, "f16")) == (token_bytes, beyond_bytes)
