"""Every family against transformers in float32: all logits, however the tokens are fed, and greedy completions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from families.cases import CASES, NUM_TOKENS
from families.float_ops import FloatOps, FloatReference
from families.goldens import ROWS, golden_of
from kvik.config import EngineConfig, Pooling, SamplingParams
from kvik.engine.engine import Engine
from kvik.engine.stream import run_all
from kvik.explain.tracing_ops import TracingOps, weight_names
from kvik.models.decoder import Decoder
from kvik.models.hf_spec import read_hf_spec
from kvik.models.loader import load_model
from kvik.ops.base import Batch
from kvik.ops.reference import choose_experts
from models import run
from oracle.conftest import Report
from oracle.hf_families import SavedModel, random_ids, save_checkpoint
from oracle.hf_llama import FloatArray, continue_greedily, hidden_states
from oracle.teacher_forcing import teacher_forced

TOLERANCE = 1e-4
NEAR_CHOICE = 1e-5
"""Between logits of a router, whose rounding is a tenth of that."""
MEDIAN_TOLERANCE = 5e-5
"""Of the largest difference of each row, in every family."""
CHUNKS = ((512,), (37, 64, 1, 100), (1,))  # prefill at once, prefill in chunks, decode
NUM_NEW_TOKENS = 32


@pytest.fixture(scope="module", params=CASES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SavedModel:
    return save_checkpoint(tmp_path_factory.mktemp(request.param), CASES[request.param])


def test_logits(saved: SavedModel, report: Report) -> None:
    token_ids = random_ids(NUM_TOKENS)
    # With embeddings of layers (Gemma 4 E2B), the angles that transformers rounds to float32 move its own logits by
    # 2.2e-4, which is more than the tolerance: what counts there is the distance from exact arithmetic.
    is_sensitive = bool(saved.config.get("hidden_size_per_layer_input"))
    expected = saved.exact_logits(token_ids) if is_sensitive else saved.logits(token_ids)
    assert expected.std() > 0.5
    errors = {}
    for ops in (FloatOps(), FloatReference()):
        decoder = load_model(saved.folder, ops).decoder
        found = [teacher_forced(decoder, token_ids, kv_dtype="f32", chunks=chunks) for chunks in CHUNKS]
        errors[ops.name] = max(float(np.abs(rows - expected).max()) for rows in found)
        assert max(float(np.median(np.abs(rows - expected).max(axis=1))) for rows in found) < MEDIAN_TOLERANCE
    report("largest difference of a logit: " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items()))
    assert max(errors.values()) < TOLERANCE


class ChosenExperts(TracingOps):
    """Notes which experts each token's router chose, layer by layer."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder.ops, weight_names(decoder))
        self.chosen: list[list[list[int]]] = []

    def run(self, name: str, *arguments: Any) -> Any:
        """As `TracingOps`."""
        if name == "experts":
            _, router_logits, weights, _ = arguments
            self.chosen.append([sorted(choose_experts(row, weights)) for row in self.to_numpy(router_logits)])
        return super().run(name, *arguments)


def test_the_same_experts_are_chosen(saved: SavedModel, report: Report) -> None:
    """Up to the first token that chooses between experts that are near: there any rounding may choose others."""
    token_ids = random_ids(NUM_TOKENS)
    decoder = load_model(saved.folder, FloatOps()).decoder
    if decoder.spec.experts is None:
        return
    expected = saved.chosen_experts(token_ids)
    assert len(expected) == sum(layer.sparse for layer in decoder.spec.layers)
    nearest = [min(of_layers) for of_layers in zip(*(gaps for _, gaps in expected), strict=True)]
    clear = next((token for token, gap in enumerate(nearest) if gap < NEAR_CHOICE), NUM_TOKENS)
    report(f"nearest choice: router logits {min(nearest):.1e} apart; {clear} of {NUM_TOKENS} tokens compared")
    assert clear >= 100
    spec, ops, positions = decoder.spec.kv_spec("f32"), ChosenExperts(decoder), np.arange(NUM_TOKENS, dtype=np.int32)
    num_blocks = spec.pool_blocks_for(NUM_TOKENS)
    batch = Batch.in_blocks(
        token_ids=np.asarray(token_ids, np.int32),
        positions=positions,
        sequence_index=np.zeros(NUM_TOKENS, np.int32),
        block_tables=np.arange(num_blocks, dtype=np.int32)[None],
        logit_rows=positions[-1:],
        num_groups=len(spec.groups),
    )
    decoder.forward(batch, decoder.ops.allocate_kv(spec, num_blocks), ops)
    assert [chosen[:clear] for chosen in ops.chosen] == [chosen[:clear] for chosen, _ in expected]


def test_embeddings(saved: SavedModel, report: Report) -> None:
    """transformers' last hidden states, those that its head sees."""
    token_ids = random_ids(100, seed=3)
    expected = hidden_states(saved.model, token_ids)
    engine = Engine(load_model(saved.folder, FloatOps()), EngineConfig(kv_dtype="f32", token_budget=48))
    poolings: dict[Pooling, FloatArray] = {"last": expected[-1], "mean": expected.mean(axis=0)}
    errors = {}
    for pooling, wanted in poolings.items():
        sequence = engine.new_sequence(engine.new_embed_request(token_ids, pooling, False))
        assert run_all(engine, [sequence]) == [sequence]
        errors[pooling] = float(np.abs(sequence.embedding().vector - wanted).max())
    report(f"standard deviation {expected.std():.1f}; largest difference: {errors}")
    assert max(errors.values()) < TOLERANCE


def test_greedy_completions(saved: SavedModel) -> None:
    """A token may differ only where transformers' own first two lie closer than rounding reaches."""
    prompt = random_ids(100, seed=2)
    expected = continue_greedily(saved.model, prompt, NUM_NEW_TOKENS)
    params = SamplingParams(max_tokens=NUM_NEW_TOKENS, ignore_eos=True)
    found = run(
        Engine(load_model(saved.folder, FloatOps()), EngineConfig(kv_dtype="f32", token_budget=48)), prompt, params
    )
    clear = next((index for index, gap in enumerate(expected.gaps) if gap < 2 * TOLERANCE), NUM_NEW_TOKENS)
    assert clear > 4
    assert found.token_ids[:clear] == expected.token_ids[:clear]
    assert np.abs(found.logits[:clear] - expected.logits[:clear]).max() < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_goldens_are_what_transformers_makes(name: str, tmp_path: Path) -> None:
    """Another version, or a case that was changed, would show here."""
    golden, saved = golden_of(name), save_checkpoint(tmp_path, CASES[name])
    assert golden.shapes == saved.shapes
    path = tmp_path / "config.json"
    assert read_hf_spec(golden.config, path) == read_hf_spec(saved.config, path)
    assert np.abs(saved.logits(golden.token_ids)[list(ROWS)] - golden.logits).max() < TOLERANCE / 2
