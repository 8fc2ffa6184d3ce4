"""GGUF files of the families: fused tensors of every type, keys with their effect, and what is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType

from families.checkpoints import FloatArray
from families.gguf_cases import GGUF_CASES, tensors_of
from families.gguf_of import gguf_of
from gguf_files import WEIGHT_TYPES, tiny_llama, write_gguf
from kvik.errors import ModelError
from kvik.files.gguf import GGUFFile, read_gguf
from kvik.models.gguf_source import find_tensors
from kvik.models.gguf_spec import read_spec
from kvik.models.loader import load_model
from kvik.models.spec import DecoderSpec
from kvik.ops.native import NativeOps
from models import Tensor, altered
from oracle.teacher_forcing import teacher_forced

F32 = GGMLQuantizationType.F32


def family(tmp_path: Path, name: str, extra: Mapping[str, Any] | None = None) -> Path:
    return gguf_of(tmp_path / f"{name}.gguf", GGUF_CASES[name], tensors_of(GGUF_CASES[name]), extra)


def spec_of(path: Path) -> DecoderSpec:
    return read_spec(read_gguf(path))


def logits_of(path: Path) -> FloatArray:
    decoder = load_model(path, NativeOps("int8", threads=1)).decoder
    return teacher_forced(decoder, range(3, 60), kv_dtype="f16")


# Fused tensors.


def raw_tensor(file: GGUFFile, name: str) -> npt.NDArray[np.uint8]:
    tensor = file.tensors[name]
    return tensor.data.reshape(tensor.shape[0], -1)


def rewritten(source: Path, target: Path, architecture: str, fused: Mapping[str, tuple[str, ...]]) -> Path:
    """The same model under another architecture's name, with some matrices of each layer in one."""
    file = read_gguf(source)
    metadata = {
        key.replace("llama.", f"{architecture}.", 1): architecture if key == "general.architecture" else value
        for key, value in file.metadata.items()
    }
    tensors: dict[str, Tensor] = {}
    for name, tensor in file.tensors.items():
        kind = GGMLQuantizationType(tensor.type)
        layer, _, part = name.removesuffix(".weight").rpartition(".")
        whole = next((one for one, parts in fused.items() if part in parts), None)
        if whole is None:
            values = tensor.data.view("<f4") if len(tensor.shape) == 1 else raw_tensor(file, name)
            tensors[name] = values, kind
        else:
            rows = [raw_tensor(file, f"{layer}.{one}.weight") for one in fused[whole]]
            tensors[f"{layer}.{whole}.weight"] = np.concatenate(rows), kind
    return write_gguf(target, metadata, tensors)


QKV = {"attn_qkv": ("attn_q", "attn_k", "attn_v")}


@pytest.mark.parametrize("kind", WEIGHT_TYPES, ids=lambda kind: kind.name)
def test_rows_of_fused_tensors_are_the_matrices_alone(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    path = tiny_llama(tmp_path / "tiny.gguf", head_dim=64, intermediate_size=256, tied=False, weight_type=kind)
    alone = rewritten(path, tmp_path / "qwen2.gguf", "qwen2", {})
    fused = rewritten(path, tmp_path / "phi3.gguf", "phi3", {**QKV, "ffn_up": ("ffn_gate", "ffn_up")})
    wanted = find_tensors(read_gguf(alone), spec_of(alone))
    found = find_tensors(read_gguf(fused), spec_of(fused))
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert (tensor.shape, tensor.type) == (wanted[name].shape, wanted[name].type)
        np.testing.assert_array_equal(tensor.data, wanted[name].data)
    np.testing.assert_array_equal(logits_of(fused), logits_of(alone))


def test_llama_files_may_have_fused_projections_too(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "tiny.gguf")
    fused = rewritten(path, tmp_path / "fused.gguf", "llama", QKV)
    assert "blk.0.attn_qkv.weight" in read_gguf(fused).tensors
    np.testing.assert_array_equal(logits_of(fused), logits_of(path))


def test_phi3_files_may_have_projections_of_their_own(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "tiny.gguf")
    fused = rewritten(path, tmp_path / "fused.gguf", "phi3", {**QKV, "ffn_up": ("ffn_gate", "ffn_up")})
    partly = rewritten(path, tmp_path / "partly.gguf", "phi3", {"ffn_up": ("ffn_gate", "ffn_up")})
    np.testing.assert_array_equal(logits_of(partly), logits_of(fused))


def test_a_head_that_is_a_copy_of_the_embedding_is_like_none(tmp_path: Path) -> None:
    """Older files of GPT-2 have one."""
    path = family(tmp_path, "gpt2")
    embedding = read_gguf(path).tensors["token_embd.weight"]
    copy: Tensor = (embedding.data.view("<f4").reshape(embedding.shape), F32)
    with_head = altered(path, tmp_path / "head.gguf", tensors={"output.weight": copy})
    np.testing.assert_array_equal(logits_of(with_head), logits_of(path))


# Keys that have an effect.


@pytest.mark.parametrize("name", ["phi3-long", "phi3-short"])
def test_longrope_s_divisors_are_those_of_the_chosen_context(tmp_path: Path, name: str) -> None:
    file = read_gguf(family(tmp_path, name))
    long, short = (
        tuple(file.tensors[f"rope_factors_{one}.weight"].data.view("<f4").tolist()) for one in ("long", "short")
    )
    original = 80 if name == "phi3-long" else 320
    for context in (None, 320, 81, 80, 2):
        (rope,) = read_spec(file, context).ropes
        assert rope.factors == (long if (context or 320) > original else short)
        assert (rope.magnitude > 1) == (name == "phi3-long")
    model = load_model(file.path, NativeOps("int8", threads=1), context=80)
    assert model.decoder.spec.ropes[0].factors == short


def test_granite_s_rotary_embeddings_can_be_off(tmp_path: Path) -> None:
    assert spec_of(family(tmp_path, "granite", {"rope.scaling.finetuned": True})).ropes
    assert not spec_of(family(tmp_path, "granite", {"rope.scaling.finetuned": False})).ropes
    assert spec_of(family(tmp_path, "llama", {"rope.scaling.finetuned": False})).ropes


@pytest.mark.parametrize(("name", "num_layers"), [("gemma2", 46), ("gemma3_text", 62)])
def test_the_27b_models_scale_scores_by_another_width(tmp_path: Path, name: str, num_layers: int) -> None:
    assert spec_of(family(tmp_path, name)).attention_scale is None
    spec = spec_of(family(tmp_path, name, {"block_count": num_layers}))
    assert spec.attention_scale == pytest.approx((132 // 6) ** -0.5)


def test_patterns_of_windows(tmp_path: Path) -> None:
    def windows(name: str, **keys: Any) -> list[int | None]:
        extra = {f"attention.sliding_{key}": value for key, value in keys.items()}
        return [layer.window for layer in spec_of(family(tmp_path, name, extra)).layers]

    assert windows("gemma2") == [24, None, 24]
    assert windows("gemma2", window=0) == [None] * 3
    assert windows("gemma2", window_pattern=3) == [24, 24, None]
    assert windows("gemma2", window_pattern=[False, True, True]) == [None, 24, 24]
    assert windows("gemma3_text") == [24, 24, 24, 24, 24, None, 24]
    assert windows("olmo2", window=24) == [24] * 3
    assert windows("llama", window=24) == [24] * 3
    assert windows("llama", window=320) == [None] * 3
    path = family(tmp_path, "gemma2")
    file = read_gguf(altered(path, tmp_path / "default.gguf", without=["gemma2.attention.sliding_window"]))
    assert [layer.window for layer in read_spec(file).layers] == [None] * 3  # 4,096 is more than the context


def test_a_window_as_long_as_the_context_leaves_its_layers_their_rotary_embedding(tmp_path: Path) -> None:
    layers = spec_of(family(tmp_path, "gemma3_text", {"attention.sliding_window": 4096})).layers
    assert [layer.rope.theta for layer in layers if layer.rope] == [1e4] * 5 + [1e6, 1e4]
    assert all(layer.window is None for layer in layers)


def test_keys_that_nobody_reads_may_lie_beside_shared_ones(tmp_path: Path) -> None:
    """Published checkpoints have them, and so have the files that are made of these."""
    path = family(tmp_path, "gemma4-e2b")
    extra = {f"blk.4.attn_{name}.weight": plain(32, 132) for name in ("k", "v")}
    extra["blk.4.attn_k_norm.weight"] = plain(16)
    np.testing.assert_array_equal(logits_of(altered(path, tmp_path / "more.gguf", tensors=extra)), logits_of(path))


# What is refused.


def plain(*shape: int) -> Tensor:
    return np.ones(shape, np.float32), F32


BAD: list[tuple[str, dict[str, Any], dict[str, Tensor], list[str], str]] = [
    ("qwen3", {"qwen3.expert_count": 8}, {}, [], "mixture of experts"),
    ("gpt2", {}, {}, ["blk.1.attn_qkv.weight"], "'blk.1.attn_qkv.weight' is missing"),
    ("gpt2", {}, {}, ["position_embd.weight"], "'position_embd.weight' is missing"),
    ("gpt2", {"gpt2.context_length": 321}, {}, [], "position_embd.weight"),
    ("gpt2", {}, {}, ["blk.2.ffn_down.bias"], "'blk.2.ffn_down.bias' is missing"),
    ("gpt2", {}, {"blk.0.attn_q.weight": plain(200, 200)}, [], "blk.0.attn_q.weight' has no place"),
    ("gpt_bigcode", {"starcoder.attention.head_count_kv": 5}, {}, [], "attn_qkv.weight' has shape"),
    ("gpt_neox", {"gptneox.use_parallel_residual": 1}, {}, [], "use_parallel_residual"),
    ("gpt_neox", {"gptneox.rope.dimension_count": 21}, {}, [], "21 dimensions"),
    ("falcon-7b", {"falcon.attention.max_alibi_bias": 8.0}, {}, [], "ALiBi"),
    ("falcon-7b", {}, {"blk.0.ffn_norm.weight": plain(320)}, [], "blk.0.ffn_norm.weight' has no place"),
    ("falcon-40b", {}, {}, ["blk.0.attn_norm_2.weight"], "has no place"),
    ("falcon-40b", {}, {}, ["blk.1.attn_norm_2.weight"], "'blk.1.attn_norm_2.weight' is missing"),
    ("phi3", {}, {"blk.0.ffn_up.weight": plain(201, 288)}, [], "ffn_up.weight' has shape"),
    ("phi3", {}, {"blk.0.ffn_gate.weight": plain(201, 288)}, [], "ffn_gate.weight' has no place"),
    ("phi3", {}, {}, ["blk.0.attn_qkv.weight"], "'blk.0.attn_qkv.weight' is missing"),
    ("phi3-long", {}, {"rope_factors_long.weight": plain(47)}, [], "rope_factors_long.weight' has shape"),
    ("phi3-long", {}, {"rope_factors_short.weight": (np.zeros(48, np.float32), F32)}, [], "factors_short"),
    ("phi3-long", {}, {}, ["rope_factors_short.weight"], "do not belong together"),
    ("phi3-long", {}, {"rope_freqs.weight": plain(48)}, [], "do not belong together"),
    ("gemma2", {"gemma2.attn_logit_softcapping": -1.0}, {}, [], "attn_logit_softcapping"),
    ("gemma2", {"gemma2.attention.sliding_window_pattern": [True]}, {}, [], "of 3 items"),
    ("gemma3_text", {"gemma3.attn_logit_softcapping": 50.0}, {}, [], "gemma3.attn_logit_softcapping"),
    ("gemma3_text", {}, {"dense_2.weight": plain(8, 132)}, [], "dense_2.weight' has no place"),
    ("gemma3_text", {}, {}, ["blk.6.post_ffw_norm.weight"], "'blk.6.post_ffw_norm.weight' is missing"),
    ("gemma4-e2b", {"gemma4.attention.shared_kv_layers": 7}, {}, [], "shared_kv_layers"),
    ("gemma4-e2b", {"gemma4.attention.shared_kv_layers": 6}, {}, [], "there are none before"),
    ("gemma4-e2b", {"gemma4.attention.value_length_swa": 8}, {}, [], "16 dimensions in windows, values 8"),
    ("gemma4-e2b", {"gemma4.attention.value_length": 8}, {}, [], "24 dimensions, values 8"),
    ("gemma4-e2b", {"gemma4.feed_forward_length": [170, 0] * 3 + [170]}, {}, [], "numbers in it that no layer"),
    ("gemma4-e2b", {}, {"rope_freqs.weight": (np.full(12, 1e30, np.float32), F32)}, [], "0 of 12 pairs"),
    ("gemma4-e2b", {}, {}, ["per_layer_token_embd.weight"], "'per_layer_token_embd.weight' is missing"),
    ("gemma4-e2b", {}, {"per_layer_token_embd.weight": plain(283, 83)}, [], "token_embd.weight' has shape"),
    ("gemma4-e2b", {}, {}, ["blk.3.layer_output_scale.weight"], "'blk.3.layer_output_scale.weight' is missing"),
    ("gemma4-e2b", {}, {}, ["blk.3.attn_k.weight"], "'blk.3.attn_k.weight' is missing"),
    ("gemma2", {"general.architecture": "gemma3n"}, {}, [], "needs AltUp .* and LAuReL"),
    ("granite", {"granite.logit_scale": 0.0}, {}, [], "granite.logit_scale"),
    ("granite", {"granite.embedding_scale": float("nan")}, {}, [], "granite.embedding_scale"),
    ("qwen3", {}, {"blk.0.attn_q_norm.weight": plain(768)}, [], "attn_q_norm.weight' has shape"),
    ("olmo2", {}, {"blk.0.attn_norm.weight": plain(240)}, [], "attn_norm.weight' has no place"),
]


@pytest.mark.parametrize(("name", "metadata", "tensors", "without", "pattern"), BAD, ids=str)
def test_what_is_refused(
    tmp_path: Path, name: str, metadata: dict[str, Any], tensors: dict[str, Tensor], without: list[str], pattern: str
) -> None:
    path = family(tmp_path, name)
    path = altered(path, tmp_path / "bad.gguf", metadata=metadata, tensors=tensors, without=without)
    with pytest.raises(ModelError, match=pattern) as caught:
        load_model(path, NativeOps("int8", threads=1))
    assert "bad.gguf" in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint
    assert len(str(caught.value)) < 600
