"""Shapes and rotations that the default model does not have: random models of float weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import pi
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader

from gguf_files import tiny_llama, write_gguf
from kvik.models.loader import load_model
from kvik.ops.base import Ops
from kvik.ops.native import NativeOps
from kvik.ops.reference import ReferenceOps
from oracle.conftest import Report
from oracle.hf_llama import build, logits
from oracle.teacher_forcing import teacher_forced

F32 = GGMLQuantizationType.F32
HEAD_DIM, ROPE_BASE, CONTEXT = 40, 10_000.0, 512
NUM_TOKENS = 300  # beyond the first segment of attention

LINEAR: dict[str, Any] = {"rope_type": "linear", "factor": 2.5}
# Wavelengths of a 40-wide head are 6, 10, 16, 25, ...: some pairs stay, some turn slower, some are in between.
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def llama3_factors() -> np.ndarray[Any, np.dtype[np.float32]]:
    """What llama.cpp's converter writes as `rope_freqs`: the divisor of each pair's frequency."""
    length, factor = LLAMA3["original_max_position_embeddings"], LLAMA3["factor"]
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    factors = []
    for pair in range(HEAD_DIM // 2):
        wavelength = 2 * pi * ROPE_BASE ** (2 * pair / HEAD_DIM)
        smooth = min(1.0, max(0.0, (length / wavelength - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / factor + smooth))
    assert min(factors) == 1.0
    assert max(factors) == factor
    return np.array(factors, np.float32)


def tiny(path: Path, scaling: dict[str, Any] | None) -> Path:
    """A model of odd shapes: three query heads to a KV head, rows that no vector width divides, a head of its own."""
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": LINEAR["factor"]}
    tiny_llama(
        path,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        head_dim=HEAD_DIM,
        hidden_size=102,
        intermediate_size=90,
        vocab_size=331,
        context_length=CONTEXT,
        rope_freq_base=ROPE_BASE,
        tied=False,
        weight_type=F32,
        extra_metadata=linear if scaling is LINEAR else None,
    )
    return with_tensor(path, "rope_freqs.weight", llama3_factors()) if scaling is LLAMA3 else path


def with_tensor(path: Path, name: str, values: np.ndarray[Any, np.dtype[np.float32]]) -> Path:
    """The same file with one tensor more; all of its tensors are F32."""
    reader = GGUFReader(path)
    metadata = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    tensors = {tensor.name: (np.array(tensor.data), F32) for tensor in reader.tensors}
    return write_gguf(path.with_stem(f"{path.stem}-more"), metadata, {**tensors, name: (values, F32)})


@pytest.mark.parametrize("backend", [NativeOps, ReferenceOps], ids=["native", "reference"])
@pytest.mark.parametrize("scaling", [None, LINEAR, LLAMA3], ids=["plain", "linear", "llama3"])
@pytest.mark.parametrize("chunks", [(512,), (37, 64, 1, 100), (290, 1)], ids=["prefill", "chunks", "decode"])
def test_tiny_models(
    tmp_path: Path, backend: Callable[[], Ops], scaling: dict[str, Any] | None, chunks: Sequence[int], report: Report
) -> None:
    path = tiny(tmp_path / "tiny.gguf", scaling)
    token_ids = np.random.default_rng(1).integers(0, 331, NUM_TOKENS).tolist()
    expected = logits(build(path, rope_scaling=scaling), token_ids)
    assert expected.std() > 1
    found = teacher_forced(load_model(path, backend()).decoder, token_ids, kv_dtype="f32", chunks=chunks)
    error = float(np.abs(found - expected).max())
    report(f"largest difference of a logit {error:.1e}")
    assert error < 1e-4
