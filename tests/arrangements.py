"""Everything that must not matter to a result, and the comparison of bits that says whether it did."""

from __future__ import annotations

import dataclasses

import numpy as np

from kvik.config import ActivationDType, EngineConfig, SamplingParams
from kvik.engine.engine import Engine
from kvik.models.loader import LoadedModel
from kvik.ops.base import Batch
from models import FloatArray, Run, run, shuffle_free_blocks, with_ops


@dataclasses.dataclass(frozen=True, slots=True)
class Arrangement:
    """How an engine goes about a prompt."""

    token_budget: int = 512
    use_cache: bool = True
    threads: int = 1
    shuffled: bool = False

    def run(
        self,
        model: LoadedModel,
        prompt: list[int],
        params: SamplingParams,
        kv_dtype: str,
        activations: ActivationDType,
    ) -> Run:
        """Completes the prompt so, on an engine of its own."""
        engine = Engine(
            with_ops(model, activations, self.threads), EngineConfig(kv_dtype=kv_dtype, token_budget=self.token_budget)
        )
        if self.shuffled:
            shuffle_free_blocks(engine, seed=len(prompt))
        return run(engine, prompt, params, use_cache=self.use_cache)


def assert_same(result: Run, wanted: Run, message: object) -> None:
    """The same tokens from the same bits."""
    assert result.token_ids == wanted.token_ids, message
    np.testing.assert_array_equal(result.logits.view(np.uint32), wanted.logits.view(np.uint32), str(message))


def prompt_logits(model: LoadedModel, prompt: list[int], chunk: int, kv_dtype: str, seed: int) -> FloatArray:
    """The logits of every prompt position, `chunk` tokens a forward pass, in blocks shuffled by the seed."""
    spec = model.decoder.spec.kv_spec(kv_dtype)
    count = spec.num_blocks_for(len(prompt))
    tables = np.random.default_rng(seed).permutation(count + 3)[None, :count].astype(np.int32)
    forward = model.decoder.capture(model.decoder.ops.allocate_kv(spec, count + 3))
    rows = []
    for start in range(0, len(prompt), chunk):
        token_ids = np.asarray(prompt[start : start + chunk], np.int32)
        positions = start + np.arange(len(token_ids), dtype=np.int32)
        batch = Batch.in_blocks(
            token_ids=token_ids,
            positions=positions,
            sequence_index=np.zeros(len(token_ids), np.int32),
            block_tables=tables,
            logit_rows=np.arange(len(token_ids), dtype=np.int32),
            num_groups=len(spec.groups),
        )
        rows.append(model.decoder.ops.to_numpy(forward(batch)))
    return np.concatenate(rows)
