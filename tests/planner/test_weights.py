"""Bytes of weights: the file's as the `gguf` library has them, kvik's as its packing makes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from gguf_files import WEIGHT_TYPES, random_blocks, tiny_llama
from kvik.engine.llm import LLM
from kvik.errors import InvalidInput
from kvik.ops.native import NativeOps
from kvik.planner.sources import find_shape
from kvik.planner.weights import FORMATS, file_bytes, find_format, held_bytes, packed_matrix_bytes

types = pytest.mark.parametrize("kind", WEIGHT_TYPES, ids=lambda kind: kind.name)


def test_every_type_that_kvik_runs_is_a_format() -> None:
    assert set(FORMATS) == {kind.name.lower() for kind in WEIGHT_TYPES}


@types
def test_a_file_has_the_bytes_that_the_library_says(kind: GGMLQuantizationType) -> None:
    block, block_bytes = GGML_QUANT_SIZES[kind]
    assert file_bytes(1000 * block, FORMATS[kind.name.lower()]) == 1000 * block_bytes


@types
@pytest.mark.parametrize(("rows", "columns"), [(16, 256), (48, 512), (13, 256), (1, 768)])
def test_a_packed_matrix_has_the_bytes_that_are_allocated(kind: GGMLQuantizationType, rows: int, columns: int) -> None:
    data = np.ascontiguousarray(random_blocks(kind, rows, columns, np.random.default_rng(0))).reshape(-1)
    packed = NativeOps(threads=1).load_weight(kind.name, data, rows, columns)
    form = FORMATS[kind.name.lower()]
    assert packed_matrix_bytes(rows, columns, form) == packed.num_bytes
    if rows % 16 == 0:
        assert held_bytes(rows * columns, form) == packed.num_bytes


@types
@pytest.mark.parametrize("tied", [True, False])
def test_a_header_tells_what_the_loaded_model_holds(tmp_path: Path, kind: GGMLQuantizationType, tied: bool) -> None:
    path = tiny_llama(
        tmp_path / "tiny.gguf",
        num_heads=4, num_kv_heads=2, head_dim=64, intermediate_size=512, vocab_size=323, tied=tied, weight_type=kind,
    )  # fmt: skip
    tensors = find_shape(str(path)).tensors
    decoder = LLM(str(path), threads=1).model.decoder
    assert tensors is not None
    assert tensors.format == kind.name.lower()
    assert tensors.file_bytes == path.stat().st_size
    assert tensors.step_bytes == decoder.step_bytes(decoder.spec.kv_spec("f16"), 1, 1)
    assert tensors.held_bytes == tensors.step_bytes + (0 if tied else decoder.weights.embedding.num_bytes)


@pytest.mark.parametrize("name", ["Q8_0", "q4_K_M", " bf16 "])
def test_a_format_may_be_written_as_files_are_called(name: str) -> None:
    assert find_format(name).name == name.strip().lower().removesuffix("_m")


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(InvalidInput, match="weights is 'q9_0'") as caught:
        find_format("q9_0")
    assert "did you mean q" in caught.value.hint
    assert "f32, bf16, f16, q8_0" in caught.value.hint
