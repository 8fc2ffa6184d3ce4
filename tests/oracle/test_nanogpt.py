"""A nanoGPT checkpoint, saved as docs/model-files.md does: kvik's logits are those of nanoGPT's own arithmetic."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from checkpoints import write_tokenizer
from kvik.config import EngineConfig
from kvik.engine.engine import Engine
from kvik.models.loader import load_model
from kvik.ops.native import NativeOps
from models import run

DOCS = Path(__file__).parents[2] / "docs" / "model-files.md"
LAYERS, HEADS, WIDTH, CONTEXT, VOCAB = 3, 4, 64, 96, 300
PROMPT = [(index * 37 + 5) % 259 for index in range(60)]


def state_dict(*, bias: bool) -> dict[str, torch.Tensor]:
    """Random weights by nanoGPT's names, as its optimised model has them: prefixed, head and embedding one tensor."""
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    embedding = normal(VOCAB, WIDTH)
    weights = {
        "lm_head.weight": embedding,
        "transformer.wte.weight": embedding,
        "transformer.wpe.weight": normal(CONTEXT, WIDTH),
    }
    for index in range(LAYERS):
        layer = f"transformer.h.{index}"
        for name, rows, columns in (
            ("attn.c_attn", 3 * WIDTH, WIDTH),
            ("attn.c_proj", WIDTH, WIDTH),
            ("mlp.c_fc", 4 * WIDTH, WIDTH),
            ("mlp.c_proj", WIDTH, 4 * WIDTH),
        ):
            weights[f"{layer}.{name}.weight"] = normal(rows, columns)
            weights[f"{layer}.{name}.bias"] = normal(rows)
        for name in ("ln_1", "ln_2"):
            weights |= {f"{layer}.{name}.weight": 1 + normal(WIDTH), f"{layer}.{name}.bias": normal(WIDTH)}
    weights |= {"transformer.ln_f.weight": 1 + normal(WIDTH), "transformer.ln_f.bias": normal(WIDTH)}
    return {f"_orig_mod.{name}": values for name, values in weights.items() if bias or not name.endswith("bias")}


def logits(state: dict[str, torch.Tensor]) -> Any:
    """After each token of the prompt: nanoGPT's model.py, written out."""
    weights = {name.removeprefix("_orig_mod."): values for name, values in state.items()}

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, (WIDTH,), weights[f"{name}.weight"], weights.get(f"{name}.bias"), 1e-5)

    x = weights["transformer.wte.weight"][PROMPT] + weights["transformer.wpe.weight"][: len(PROMPT)]
    for index in range(LAYERS):
        layer = f"transformer.h.{index}"
        heads = [
            part.view(len(PROMPT), HEADS, -1).transpose(0, 1)
            for part in linear(f"{layer}.attn.c_attn", norm(f"{layer}.ln_1", x)).split(WIDTH, dim=1)
        ]
        attended = functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + linear(f"{layer}.attn.c_proj", attended.transpose(0, 1).reshape(len(PROMPT), WIDTH))
        hidden = functional.gelu(linear(f"{layer}.mlp.c_fc", norm(f"{layer}.ln_2", x)))
        x = x + linear(f"{layer}.mlp.c_proj", hidden)
    return linear("lm_head", norm("transformer.ln_f", x)).numpy()


@pytest.mark.parametrize("bias", [True, False])
def test_the_documented_lines_save_what_kvik_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    state = state_dict(bias=bias)
    sizes = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": WIDTH, "block_size": CONTEXT, "vocab_size": VOCAB}
    saved = {
        "model": state,
        "optimizer": {"state": {}, "param_groups": []},
        "model_args": {**sizes, "bias": bias, "dropout": 0.0},
        "iter_num": 7,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "shakespeare_char"},
    }
    for name in ("out", "folder"):
        (tmp_path / name).mkdir()
    torch.save(saved, tmp_path / "out" / "ckpt.pt")
    code = re.search(r"In nanoGPT's folder.*?```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # of the file that one of the lines leaves to be closed
        exec(code[1], {})
    write_tokenizer(tmp_path / "folder")

    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    model = load_model(tmp_path / "folder", NativeOps(threads=1))
    first = run(Engine(model, EngineConfig(kv_dtype="f32")), PROMPT).logits[0]
    np.testing.assert_allclose(first, logits(state)[-1], atol=2e-5)
