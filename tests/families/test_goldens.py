"""Every family against the logits that transformers computed, kept in goldens/: needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from families.cases import CASES
from families.float_ops import FloatOps
from families.goldens import FOLDER, ROWS, all_goldens, golden_of
from kvik.files.config_fields import read_json_object
from kvik.models.checkpoint import read_checkpoint
from kvik.models.checkpoint_source import CheckpointSource
from kvik.models.decoder import Decoder
from kvik.models.hf_families import FAMILIES
from kvik.models.hf_spec import read_hf_spec
from kvik.models.rope_scaling import yarn_factors
from kvik.models.spec import DecoderSpec, QueryScale
from kvik.models.weights import read_weights
from oracle.teacher_forcing import teacher_forced

TOLERANCE = 1e-4

Change: TypeAlias = Callable[[DecoderSpec], DecoderSpec]


def difference(folder: Path, name: str, change: Change = lambda spec: spec) -> float:
    """How far the logits of a folder are from a golden's, with a decoder that was changed a little."""
    golden, path = golden_of(name), folder / "config.json"
    spec, ops = change(read_hf_spec(read_json_object(path), path)), FloatOps(threads=1)
    weights = read_weights(spec, CheckpointSource(read_checkpoint(folder), spec, ops))
    decoder = Decoder(spec, weights, ops, spec.context_length)
    found = teacher_forced(decoder, golden.token_ids, kv_dtype="f32", chunks=(150, 1, 64))
    return float(np.abs(found[list(ROWS)] - golden.logits).max())


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    assert difference(golden_of(name).write_folder(tmp_path), name) < TOLERANCE


def wider_windows(spec: DecoderSpec, by: int = 1) -> DecoderSpec:
    layers = (replace(layer, window=layer.window and layer.window + by) for layer in spec.layers)
    return replace(spec, layers=tuple(layers))


def one_rope(spec: DecoderSpec) -> DecoderSpec:
    return replace(spec, layers=tuple(replace(layer, rope=spec.ropes[0]) for layer in spec.layers))


def other_ropes(spec: DecoderSpec, **changes: Any) -> DecoderSpec:
    ropes = (layer.rope and replace(layer.rope, **changes) for layer in spec.layers)
    return replace(
        spec, layers=tuple(replace(layer, rope=rope) for layer, rope in zip(spec.layers, ropes, strict=True))
    )


def other_keys(spec: DecoderSpec) -> DecoderSpec:
    """Layers with windows that read the keys of the first of their kind, not of the last."""
    layers = (replace(one, kv_from=0) if one.kv_from and one.window else one for one in spec.layers)
    return replace(spec, layers=tuple(layers))


def fields(**changes: Any) -> Change:
    return lambda spec: replace(spec, **changes)


CHANGES: list[tuple[str, str, Change]] = [
    ("gpt2", "eps", fields(norm_eps=1e-3)),
    ("gpt2", "activation", fields(activation="gelu")),
    ("gpt_neox", "parallel", fields(parallel="none")),
    ("gpt_neox", "pairs", partial(other_ropes, adjacent_pairs=True)),
    ("gpt_neox-serial", "linear", partial(other_ropes, factors=1.0)),
    ("gpt_neox-serial", "parallel", fields(parallel="two_norms")),
    ("llama-3.2", "llama3", partial(other_ropes, factors=1.0)),
    ("llama-yarn", "magnitude", partial(other_ropes, magnitude=1.0)),
    ("phi3-long", "magnitude", partial(other_ropes, magnitude=1.0)),
    ("mistral", "window + 1", wider_windows),
    ("mistral", "window - 1", partial(wider_windows, by=-1)),
    ("qwen2", "window + 1", wider_windows),
    ("smollm3-windows", "window + 1", wider_windows),
    ("smollm3", "all layers have RoPE", one_rope),
    ("gemma3_text", "one base", one_rope),
    ("gemma3_text", "window + 1", wider_windows),
    ("olmo3", "one rope", one_rope),
    ("gemma2", "cap of attention", fields(attention_soft_cap=None)),
    ("gemma2", "cap of logits", fields(logit_soft_cap=None)),
    ("gemma2", "attention scale", fields(attention_scale=None)),
    ("gemma2", "embedding scale", fields(embedding_scale=1.0)),
    ("gemma2", "activation", fields(activation="silu")),
    ("gemma4-e2b", "norm of values", fields(value_norm=False)),
    ("gemma4-e2b", "attention scale", fields(attention_scale=None)),
    ("gemma4-e2b", "cap of logits", fields(logit_soft_cap=None)),
    ("gemma4-e2b", "pairs that rotate", partial(other_ropes, num_rotating=None)),
    ("gemma4-e2b", "whose keys", other_keys),
    ("gemma4-12b", "norm of values", fields(value_norm=False)),
    ("granite", "attention scale", fields(attention_scale=None)),
    ("granite", "embedding scale", fields(embedding_scale=1.0)),
    ("granite", "residual scale", fields(residual_scale=1.0)),
    ("granite", "logit scale", fields(logit_scale=1.0)),
    ("gpt_oss", "activation", fields(activation="silu")),
    (
        "gpt_oss",
        "yarn's bounds",
        partial(other_ropes, factors=yarn_factors(150_000.0, 40, factor=4.0, original_context=80)),
    ),
    ("gpt_oss", "window + 1", wider_windows),
    ("ministral3", "query scale", fields(query_scale=None)),
    ("ministral3", "query scale's context", fields(query_scale=QueryScale(0.4, 81))),
    ("exaone4", "all layers have RoPE", one_rope),
    ("exaone4", "window + 1", wider_windows),
    ("exaone4", "norms", fields(qk_norm_after_rope=True)),
    ("glm4", "pairs", partial(other_ropes, adjacent_pairs=False)),
    ("ernie4_5", "pairs", partial(other_ropes, adjacent_pairs=False)),
    ("hunyuan_v1_dense", "norms", fields(qk_norm_after_rope=False)),
    ("hunyuan_v1_dense", "alpha", partial(other_ropes, theta=10_000.0)),
    ("cohere", "pairs", partial(other_ropes, adjacent_pairs=False)),
    ("cohere", "logit scale", fields(logit_scale=1.0)),
    ("cohere", "norm", fields(norm="rms")),
    ("cohere2", "all layers have RoPE", one_rope),
    ("cohere2", "window + 1", wider_windows),
    ("arcee", "activation", fields(activation="relu")),
]


@pytest.mark.parametrize(
    ("name", "change"),
    [(name, change) for name, _, change in CHANGES],
    ids=[f"{name}: {what}" for name, what, _ in CHANGES],
)
def test_the_goldens_notice_every_choice(name: str, change: Change, tmp_path: Path) -> None:
    """The comparison above would also hold if the small models took no notice of a field."""
    assert difference(golden_of(name).write_folder(tmp_path), name, change) > 3 * TOLERANCE


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
