"""Every family against the logits that transformers computed, kept in goldens/: needs no torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from families.cases import CASES
from families.goldens import FOLDER, ROWS, all_goldens, golden_of
from kvik.models.hf_spec import FAMILIES, read_hf_spec
from kvik.models.loader import load_model
from kvik.ops.native import NativeOps
from oracle.teacher_forcing import teacher_forced

TOLERANCE = 1e-4


def difference(folder: Path, name: str) -> float:
    """How far the logits of a folder are from a golden's."""
    golden = golden_of(name)
    decoder = load_model(folder, NativeOps("int8", threads=1)).decoder
    found = teacher_forced(decoder, golden.token_ids, kv_dtype="f32", chunks=(150, 1, 64))
    return float(np.abs(found[list(ROWS)] - golden.logits).max())


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    assert difference(golden_of(name).write_folder(tmp_path), name) < TOLERANCE


def test_nanogpt_is_gpt2_with_projections_as_they_are_used(tmp_path: Path) -> None:
    """transformers has no such class: its GPT-2 keeps the same matrices the other way round."""
    folder = golden_of("gpt2").write_folder(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    is_projection = {name: ".c_" in name and name.endswith("weight") for name in tensors}
    turned = {name: np.ascontiguousarray(t.T) if is_projection[name] else t for name, t in tensors.items()}
    save_file(turned, folder / "model.safetensors")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"model_type": "gpt2"', '"model_type": "nanogpt"'))
    assert difference(folder, "gpt2") < TOLERANCE


def test_every_family_has_a_golden() -> None:
    families = {read_hf_spec(golden.config, FOLDER).architecture for golden in all_goldens()}
    assert families | {"nanogpt"} == set(FAMILIES)
    assert {path.stem for path in FOLDER.iterdir()} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_published_and_saved_configs_say_the_same(name: str) -> None:
    """The cases are written as published configs are, old ones too; transformers saved them in its new form."""
    path = FOLDER / f"{name}.json"
    assert read_hf_spec(CASES[name], path) == read_hf_spec(golden_of(name).config, path)
