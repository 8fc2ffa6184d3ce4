"""Every family from a GGUF file: the shape and the logits are those of the checkpoint that it was made from."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from families.cases import CASES, NUM_TOKENS, WINDOW
from families.checkpoints import FloatArray, write_folder
from families.gguf_cases import GGUF_CASES, tensors_of
from families.gguf_of import ARCHITECTURES as CONVERTED
from families.gguf_of import gguf_of
from kvik.models.gguf_architectures import ARCHITECTURES
from kvik.models.loader import LoadedModel, load_model
from kvik.models.spec import DecoderSpec
from kvik.ops.native import NativeOps
from oracle.teacher_forcing import teacher_forced

TOKENS = [int(token_id) for token_id in np.random.default_rng(7).integers(3, 255, NUM_TOKENS)]

REORDERED = ("llama", "smollm3", "granite", "granitemoe", "mistral3", "arcee")
"""Rows of queries and keys lie in another order, and their products are summed in it."""
ROUNDED = ("phi3-long", "phi3-short", "exaone4", "exaone4-full", "hunyuan_v1_dense", "apertus")
"""Divisors, magnitudes and bases were rounded to float32."""


def load(path: Path) -> LoadedModel:
    return load_model(path, NativeOps("int16", threads=1))


def folder_of(folder: Path, config: Mapping[str, Any]) -> Path:
    return write_folder(folder, config, {name: values.shape for name, values in tensors_of(config).items()})


def logits_of(model: LoadedModel) -> FloatArray:
    return teacher_forced(model.decoder, TOKENS, kv_dtype="f32", chunks=(150, 1, 64))


def comparable(spec: DecoderSpec) -> DecoderSpec:
    """But for the name, the order of rows, the last digits of computed factors and how the usual is said."""
    layers = []
    for layer in spec.layers:
        rope = layer.rope
        if rope is not None:
            factors = np.asarray(rope.factors, np.float32)
            rope = dataclasses.replace(
                rope,
                adjacent_pairs=False,
                factors=tuple(factors.tolist()) if factors.ndim else float(factors),
                magnitude=float(np.float32(rope.magnitude)),
                theta=float(np.float32(rope.theta)),
            )
        own: dict[str, Any] = {
            "num_kv_heads": spec.num_kv_heads_of(layer),
            "head_dim": spec.head_dim_of(layer),
            "intermediate_size": spec.intermediate_size_of(layer),
        }
        layers.append(dataclasses.replace(layer, rope=rope, **own))
    scale = spec.attention_scale or spec.head_dim**-0.5
    usual: dict[str, Any] = dict.fromkeys(("num_kv_heads", "head_dim", "intermediate_size"), 0)
    return dataclasses.replace(spec, architecture="", layers=tuple(layers), attention_scale=scale, **usual)


NOT_IN_LLAMA_CPP: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "mistral": (CASES["mistral"], {"attention.sliding_window": WINDOW}),
    "phi3": (CASES["phi3"], {}),
    "llama-yarn": (
        {
            **CASES["llama"],
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 80,
                "beta_fast": 16,
                "beta_slow": 2,
                "attention_factor": 1.3,
            },
        },
        {},
    ),
}
"""Configs, and keys more: what a file says, as transformers means it, and llama.cpp passes over."""


@pytest.mark.parametrize("name", NOT_IN_LLAMA_CPP)
def test_windows_and_yarn_s_numbers_are_those_of_the_checkpoint(name: str, tmp_path: Path) -> None:
    config, extra = NOT_IN_LLAMA_CPP[name]
    checkpoint = load(folder_of(tmp_path, config))
    model = load(gguf_of(tmp_path / "model.gguf", config, tensors_of(config), extra))
    assert comparable(model.decoder.spec) == comparable(checkpoint.decoder.spec)
    np.testing.assert_allclose(logits_of(model), logits_of(checkpoint), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", GGUF_CASES)
def test_a_gguf_file_is_the_checkpoint(name: str, tmp_path: Path) -> None:
    config = GGUF_CASES[name]
    checkpoint = load(folder_of(tmp_path, config))
    model = load(gguf_of(tmp_path / "model.gguf", config, tensors_of(config)))
    assert comparable(model.decoder.spec) == comparable(checkpoint.decoder.spec)
    wanted, found = logits_of(checkpoint), logits_of(model)
    assert 0.1 < wanted.std() < 10
    if model.decoder.spec.architecture in REORDERED or name in ROUNDED:
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    else:
        np.testing.assert_array_equal(found, wanted)


def test_every_architecture_has_a_case() -> None:
    converted = {CONVERTED[config["model_type"]] for config in GGUF_CASES.values()}
    assert converted == set(ARCHITECTURES)


def test_every_architecture_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "model-files.md").read_text(encoding="utf-8")
    section = text.split("## GGUF files")[1].split("\n## ")[0]
    named = [name for line in section.splitlines() if line.startswith("| `") for name in re.findall("`(.+?)`", line)]
    assert sorted(named) == sorted(ARCHITECTURES)
