"""A step's work as it is counted, against what the captured step says of each op."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvik.config import EngineConfig
from kvik.engine.batch import ScheduledBatch
from kvik.engine.engine import Engine
from kvik.engine.runner import ModelRunner
from kvik.models.work import StepWork, count_work
from models import GREEDY, random_prompt, tiny_model
from sequences import new_sequence


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", ["f16", "int8"])
def test_counts_equal_those_of_the_recorded_ops(tmp_path: Path, seed: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    kv_heads = int(rng.integers(1, 4))
    model = tiny_model(tmp_path, num_layers=3, num_kv_heads=kv_heads, num_heads=kv_heads * 2, hidden_size=64)
    engine = Engine(model, EngineConfig(kv_dtype=dtype, token_budget=90))
    for index in range(3):
        engine.add(new_sequence(engine, random_prompt(model, int(rng.integers(1, 120)), 10 * seed + index), GREEDY))
    runner, seen = engine.runner, list[ScheduledBatch]()
    assert isinstance(runner, ModelRunner)
    engine.add_observer(lambda event: seen.extend([event.batch] if event.batch else []))
    while engine.step() is not None:
        pass
    assert len(seen) >= 8
    for batch in seen:
        work = count_work(model.decoder, engine.kv_spec, batch.arrays)
        ops = runner.profile(batch)
        assert 2 * work.attention_multiply_adds == sum(op.operations for op in ops if op.name == "attend")
        assert work.kv_bytes == sum(op.bytes for op in ops if op.name == "attend"), f"seed {seed}"
        products = ("norm_qkv", "linear", "norm_gated", "norm_linear")
        assert 2 * work.weight_multiply_adds == sum(op.operations for op in ops if op.name in products)


def test_works_add_up() -> None:
    work = StepWork(1, 2, 30, 4, 500, 60)
    assert work + work == StepWork(2, 4, 60, 8, 1000, 120)
    assert (work.multiply_adds, work.read_bytes) == (34, 560)
