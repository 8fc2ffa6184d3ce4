"""`kvik plan FOLDER`: held bytes are those of the packed weights; what kvik does not run has a shape too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from checkpoints import tiny_checkpoint
from kvik.hub import hugging_face as hub
from kvik.models.loader import load_model
from kvik.ops.native import NativeOps
from kvik.planner.plan import plan
from kvik.planner.sources import find_shape


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_headers_are_what_is_held(tmp_path: Path, dtype: str, tied: bool) -> None:
    folder = tiny_checkpoint(tmp_path / "m", dtype=dtype, num_shards=2, tie_word_embeddings=tied)
    shape = find_shape(str(folder))
    decoder = load_model(folder, NativeOps(threads=1)).decoder
    assert shape.tensors is not None
    step_bytes = decoder.step_bytes(decoder.spec.kv_spec("f16"), 1, 1)
    assert shape.tensors.step_bytes == step_bytes
    assert shape.tensors.held_bytes == step_bytes + (0 if tied else decoder.weights.embedding.num_bytes)
    assert shape.tensors.file_bytes == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert (shape.origin, shape.source, shape.runs) == ("checkpoint", str(folder), True)
    assert shape.tensors.format == dtype.lower()
    planned = plan(str(folder), context=256)
    assert planned.weights is not None
    assert planned.weights.held_bytes == shape.tensors.held_bytes


def test_a_folder_that_kvik_does_not_run_is_planned_by_its_config(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "m")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "awq"}}))
    shape = find_shape(str(folder))
    assert (shape.origin, shape.runs, shape.num_layers) == ("config.json", False, 2)
    assert shape.tensors is not None


def test_a_cached_checkpoint_is_planned_by_its_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_checkpoint(tmp_path / "m")
    monkeypatch.setattr("kvik.hub.store.cached_models_of", lambda name: {hub.CHECKPOINT: folder})
    for name in ("some/model", "some/model:safetensors"):
        assert find_shape(name).origin == "checkpoint"
