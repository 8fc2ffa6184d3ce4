"""llama.cpp on the same small GGUF files: the keys and orders of rows are the real ones, and mean the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from families.checkpoints import FloatArray
from families.gguf_cases import GGUF_CASES, tensors_of
from families.gguf_of import gguf_of
from kvik.models import gguf_spec
from kvik.models.gguf_architectures import ARCHITECTURES
from kvik.models.hf_spec import read_hf_spec
from kvik.models.loader import load_model
from kvik.ops.native import NativeOps
from oracle.conftest import Report
from oracle.teacher_forcing import teacher_forced

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is missing (`make test-oracle` brings it)")

CONTEXT = 256  # llama.cpp rounds it up to a multiple of 256, and chooses LongRoPE's divisors by it
TOKENS = [int(token_id) for token_id in np.random.default_rng(7).integers(3, 255, 150)]  # six windows
F32 = 0  # of llama.cpp's types

TOLERANCE = 3e-4  # of logits whose standard deviation is about 1
GELU_TOLERANCE = 5e-3
"""Of the root mean square difference: llama.cpp has one GELU for all, and looks it up in a table of float16."""

GELU_CASES = [
    name for name, config in GGUF_CASES.items() if read_hf_spec(config, Path(name)).activation.startswith("gelu")
]
GELU_EXPERTS_TOLERANCE = 5e-2
"""The same of a mixture, where the table's rounding may choose another expert in a later layer."""
BLOCKS_TOLERANCE = 5e-2
"""The same where weights lie in blocks: llama.cpp rounds the activations beside them to 8 bits, kvik here to 16."""


@pytest.fixture(autouse=True)
def rounded_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """gpt-oss as llama.cpp computes it, which rounds the bounds of YaRN in all architectures.

    gpt-oss was trained with bounds that are not rounded, and no key of its files says so: kvik takes them as they are,
    as transformers does, and its logits are others than llama.cpp's (root mean square difference 0.07 of the small
    model, which stretches a context of 80 tokens).
    """
    changed = {"gpt-oss": dataclasses.replace(ARCHITECTURES["gpt-oss"], whole_yarn=True)}
    monkeypatch.setattr(gguf_spec, "ARCHITECTURES", {**ARCHITECTURES, **changed})


def llama_logits(path: Path) -> FloatArray:
    model: Any = llama_cpp.Llama(
        str(path), n_ctx=CONTEXT, n_threads=1, n_threads_batch=1, logits_all=True, type_k=F32, type_v=F32, verbose=False
    )
    model.eval(TOKENS)
    logits = np.array(model.scores[: len(TOKENS)], np.float32)
    model.close()
    return logits


def differences(path: Path, tensors: Mapping[str, FloatArray], name: str) -> FloatArray:
    """Of all logits, kvik's less llama.cpp's."""
    gguf_of(path, GGUF_CASES[name], tensors)
    wanted = llama_logits(path)
    model = load_model(path, NativeOps("int16", threads=1), context=CONTEXT)
    found = teacher_forced(model.decoder, TOKENS, kv_dtype="f32")
    assert 0.1 < wanted.std() < 10
    return found - wanted


@pytest.mark.parametrize("name", GGUF_CASES)
def test_logits_are_those_of_llama_cpp(name: str, tmp_path: Path, report: Report) -> None:
    difference = differences(tmp_path / "model.gguf", tensors_of(GGUF_CASES[name]), name)
    largest, mean_square = float(np.abs(difference).max()), float(np.square(difference).mean())
    report(f"{name}: logits differ by {largest:.1e} at most, by {mean_square**0.5:.1e} in the mean")
    if name in GELU_CASES:
        has_experts = "num_experts" in GGUF_CASES[name]
        assert mean_square**0.5 < (GELU_EXPERTS_TOLERANCE if has_experts else GELU_TOLERANCE)
    elif "quantization_config" in GGUF_CASES[name]:
        assert mean_square**0.5 < BLOCKS_TOLERANCE
    else:
        assert largest < TOLERANCE


@pytest.mark.parametrize("name", GELU_CASES)
def test_all_but_the_mlp_is_exactly_llama_cpp_s(name: str, tmp_path: Path, report: Report) -> None:
    """Families with GELU once more, with MLPs, experts and layers' embeddings that add nothing."""
    down = (
        *("mlp.c_proj.weight", "dense_4h_to_h.weight", "down_proj.weight", "fc2.weight", "experts.down_proj"),
        "per_layer_projection.weight",
    )
    tensors = {
        stored: np.zeros_like(values) if stored.endswith(down) else values
        for stored, values in tensors_of(GGUF_CASES[name]).items()
    }
    difference = differences(tmp_path / "model.gguf", tensors, name)
    report(f"{name} without MLPs: logits differ by {np.abs(difference).max():.1e} at most")
    assert np.abs(difference).max() < TOLERANCE
