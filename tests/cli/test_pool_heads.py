"""`kvik pool-heads`: heads pooled as the means that they should be, and what is said about it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from command_line import Kvik
from gguf_files import tiny_llama
from kvik.config import EngineConfig
from kvik.engine.engine import Engine
from kvik.files.gguf import dequantize, read_gguf
from kvik.models.gguf_spec import read_spec
from kvik.models.loader import load_model
from kvik.models.pool_heads import pool_kv_heads
from kvik.ops.native import NativeOps
from models import altered, random_prompt, run

KINDS = [GGMLQuantizationType[name] for name in ("F32", "F16", "Q8_0", "Q4_1", "Q4_K")]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_heads_become_the_mean_of_their_neighbours(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    source = tiny_llama(
        tmp_path / "a.gguf",
        num_heads=8,
        num_kv_heads=4,
        head_dim=32,
        hidden_size=256,
        intermediate_size=256,
        weight_type=kind,
    )
    target = tmp_path / "b.gguf"
    pool_kv_heads(source, target, 2)
    before, after = read_gguf(source), read_gguf(target)
    assert read_spec(after).num_kv_heads == 2
    assert before.metadata.keys() == after.metadata.keys()
    differing = {key for key in before.metadata if before.metadata[key] != after.metadata[key]}
    assert differing == {"llama.attention.head_count_kv"}
    for name, tensor in after.tensors.items():
        old, new = dequantize(before.tensors[name]), dequantize(tensor)
        if ".attn_k." in name or ".attn_v." in name:
            mean = old.reshape(2, 2, 32, 256).mean(axis=1).reshape(64, 256)
            step = abs(mean).max() / (7 if kind.name == "Q4_1" else 127) if kind.name.startswith("Q") else 1e-2
            assert abs(new - mean).max() <= step, name
        else:
            np.testing.assert_array_equal(old, new)


def test_equal_heads_pool_without_loss(tmp_path: Path) -> None:
    """Where neighbours are alike, the pooled model is the same function."""
    source = tiny_llama(tmp_path / "a.gguf", num_heads=4, num_kv_heads=1, weight_type=GGMLQuantizationType.F32)
    file = read_gguf(source)
    doubled = {
        name: (np.concatenate([dequantize(tensor)] * 2), GGMLQuantizationType.F32)
        for name, tensor in file.tensors.items()
        if ".attn_k." in name or ".attn_v." in name
    }
    both = altered(source, tmp_path / "b.gguf", metadata={"llama.attention.head_count_kv": 2}, tensors=doubled)
    pool_kv_heads(both, tmp_path / "c.gguf", 1)
    models = [load_model(path, NativeOps(threads=1)) for path in (source, both, tmp_path / "c.gguf")]
    prompt = random_prompt(models[0], 40, 7)
    wanted, *others = [run(Engine(model, EngineConfig(kv_dtype="f32")), prompt).logits for model in models]
    for logits in others:
        np.testing.assert_array_equal(wanted, logits)


def test_the_command_measures_and_warns(kvik: Kvik, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "pooled.gguf"
    result = kvik("pool-heads", str(tiny), "--kv-heads", "1", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert [line.split()[0] for line in result.stdout.splitlines()[1:3]] == ["2", "1"]
    assert "50% of the memory" in result.stdout
    assert "never trained together" in result.stdout
    result = kvik("pool-heads", str(tiny), "--kv-heads", "1", "--out", str(out), "--json")
    report = json.loads(result.stdout)
    assert [row["num_kv_heads"] for row in report["rows"]] == [2, 1]
    assert report["rows"][0]["kv_token_bytes"] == 2 * report["rows"][1]["kv_token_bytes"]
    assert all(0 < row["loss"] < 50 for row in report["rows"])


def test_a_model_of_few_positions_is_measured_too(kvik: Kvik, tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "a.gguf", context_length=24)
    result = kvik("pool-heads", str(source), "--kv-heads", "1", "--out", str(tmp_path / "b.gguf"), "--json")
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["rows"]) == 2


@pytest.mark.parametrize(
    ("heads", "out", "message"),
    [
        ("2", "a.gguf", "has 2 KV heads"),
        ("3", "a.gguf", "has 2 KV heads"),
        ("0", "a.gguf", "from 1 to"),
        ("1", "a.bin", "writes .gguf"),
        ("1", "none/a.gguf", "there is no folder"),
    ],
)
def test_what_cannot_be_done_is_refused(
    kvik: Kvik, tiny: Path, tmp_path: Path, heads: str, out: str, message: str
) -> None:
    result = kvik("pool-heads", str(tiny), "--kv-heads", heads, "--out", str(tmp_path / out))
    assert result.exit_code == 2
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


def test_the_model_itself_is_not_overwritten(kvik: Kvik, tiny: Path) -> None:
    before = tiny.read_bytes()
    result = kvik("pool-heads", str(tiny), "--kv-heads", "1", "--out", str(tiny))
    assert (result.exit_code, tiny.read_bytes()) == (2, before)
    assert "the model itself" in result.stderr
