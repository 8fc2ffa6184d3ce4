"""A run that is watched: what is seen, that it is what happened, and that nobody notices."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from explain.conftest import NUM_WRITTEN, PROMPT, traced
from families.goldens import golden_of
from gguf_files import tiny_llama
from kvik import LLM, SamplingParams
from kvik.config import KVDType
from kvik.explain.run import TracedRun, kept_kv
from kvik.explain.tracer import Rows, Tracer, candidates
from kvik.explain.tracing_ops import TracingOps
from kvik.ops.reference import quantize_kv

# Windows and a soft cap; biases, no rope and no gate; norms behind; parallel; norms of queries and keys.
FAMILIES = ("gemma2", "gemma3", "gpt2", "olmo2", "falcon-7b", "qwen3", "smollm3", "qwen2_moe-mixed", "granitemoeshared")


def test_what_is_watched_is_what_is_written_without_watching(llm: LLM, run: TracedRun) -> None:
    params = SamplingParams(max_tokens=NUM_WRITTEN, ignore_eos=True)
    (completion,) = llm.generate(PROMPT, params)
    assert run.with_cache.lane.sequence.completion_ids == completion.token_ids
    assert run.is_same
    assert run.verdict.num_compared == NUM_WRITTEN


def test_rows_that_are_computed_again_are_counted_and_compared(llm: LLM, run: TracedRun) -> None:
    prompt, layers = len(run.prompt_ids), llm.model.decoder.spec.num_layers
    repeated = sum(range(prompt, prompt + NUM_WRITTEN - 1))
    for rows, factor in ((run.without.tracer.keys, layers), (run.without.tracer.hidden, 1)):
        assert (rows.num_repeated, rows.num_same) == (repeated * factor, repeated * factor)
    assert run.with_cache.tracer.keys.num_repeated == 0
    assert run.num_kv_rows == run.num_same_kv_rows == 2 * layers * (prompt + NUM_WRITTEN - 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_of_decoder_can_be_watched(name: str, tmp_path: Path) -> None:
    run = traced(LLM(str(golden_of(name).write_folder(tmp_path))), list(range(3, 45)), 12)
    assert run.is_same
    assert run.attention_difference < 2e-5
    for ours, theirs in zip(run.with_cache.tracer.steps, run.without.tracer.steps, strict=True):
        bits = [[call.bits for call in step.calls] for step in (ours, theirs)]
        assert bits[0] == bits[1], "the last row of an op differs between the lanes"


@pytest.mark.parametrize("dtype", ["f32", "f16", "int8"])
def test_keys_and_values_are_those_that_attention_reads(dtype: KVDType, tiny: Path) -> None:
    """The formula over what we say lies in the cache is what the kernels made of what does."""
    run = traced(LLM(str(tiny), kv_dtype=dtype), max_tokens=10)
    assert run.is_same
    assert run.attention_difference < (1e-4 if dtype == "int8" else 2e-6)  # int8 rounds queries and weights too
    keys, kv = run.with_cache.tracer.keys[0], kept_kv(run.llm, run.with_cache.tracer, 0)
    wanted = {"f32": keys, "f16": keys.astype(np.float16).astype(np.float32), "int8": quantize_kv(keys)}[dtype]
    np.testing.assert_array_equal(kv.keys.reshape(-1, 2, 16)[: len(keys)], wanted)


def test_a_wrong_cache_would_be_seen(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """int8 read as if it were kept whole: the difference is no rounding of float32."""
    monkeypatch.setattr("kvik.ops.reference.quantize_kv", lambda x: x)
    assert traced(LLM(str(tiny), kv_dtype="int8"), max_tokens=4).attention_difference > 1e-4


def test_ops_come_in_order_with_the_names_of_their_weights(run: TracedRun) -> None:
    calls = run.with_cache.tracer.steps[0].calls
    layer = [(call.name, call.weights) for call in calls if call.place == "layer 1"]
    assert layer == [
        ("norm", "attn_norm"),
        ("project", "q_proj, k_proj, v_proj"),
        ("rope", ""),
        ("rope", ""),
        ("write_kv", ""),
        ("attend", ""),
        ("project", "o_proj"),
        ("add", ""),
        ("norm", "mlp_norm"),
        ("project", "gate_proj, up_proj"),
        ("activate", ""),
        ("project", "down_proj"),
        ("add", ""),
    ]
    assert [(call.name, call.weights, call.place) for call in (calls[0], *calls[-3:])] == [
        ("embed", "embedding", "embedding"),
        ("take_rows", "", "head"),
        ("norm", "norm", "head"),
        ("project", "lm_head", "head"),
    ]
    assert calls[-1].shapes == ((1, 320),)
    starts = [call.started_s for call in calls]
    assert starts == sorted(starts)


def test_experts_have_names(tmp_path: Path) -> None:
    run = traced(LLM(str(golden_of("qwen2_moe").write_folder(tmp_path))), list(range(3, 9)), 1)
    calls = [(call.name, call.weights) for call in run.with_cache.tracer.steps[0].calls if call.place == "layer 2"]
    assert calls[-10:-1] == [
        ("norm", "mlp_norm"),
        ("project", "router"),
        ("experts", "experts"),
        ("project", "shared_gate_proj, shared_up_proj"),
        ("activate", ""),
        ("project", "shared_down_proj"),
        ("project", "shared_gate"),
        ("gate", ""),
        ("add", ""),
    ]


def test_a_tied_head_has_its_own_name(tmp_path: Path) -> None:
    calls = (
        traced(LLM(str(tiny_llama(tmp_path / "tied.gguf", tied=True))), max_tokens=1).with_cache.tracer.steps[0].calls
    )
    assert (calls[0].weights, calls[-1].weights) == ("embedding", "lm_head")


def test_a_watcher_that_changes_something_is_found_out(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    add = TracingOps.add
    monkeypatch.setattr(
        TracingOps, "add", lambda self, x, y, scale=1.0: add(self, x, y, scale) * np.float32(1 + 2**-20)
    )
    with pytest.raises(AssertionError, match="watching changed the logits"):
        traced(llm, max_tokens=1)


def test_the_clock_stands_still_while_watching(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    watch = Tracer._watch

    def slow_watch(*arguments: Any) -> None:
        time.sleep(0.05)
        watch(*arguments)

    monkeypatch.setattr(Tracer, "_watch", slow_watch)
    run = traced(llm, max_tokens=4)
    for traced_lane in (run.with_cache, run.without):
        assert traced_lane.tracer.aside_s >= 4 * 0.05
        assert traced_lane.lane.elapsed_s < 4 * 0.05


def test_nothing_of_it_is_there_when_nobody_watches(tiny: Path) -> None:
    code = (
        "import sys; from kvik import LLM, SamplingParams\n"
        f"llm = LLM({str(tiny)!r}); llm.generate('hello', SamplingParams(max_tokens=2))\n"
        "assert llm.engine.observers == ()\n"
        "assert not [name for name in sys.modules if name.startswith('kvik.explain')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_predictions_are_the_likeliest_tokens_behind_each_row(run: TracedRun) -> None:
    """Behind the last prompt token and each written one, they are what was chosen."""
    behind = run.predictions[len(run.prompt_ids) - 1 :]
    assert [one.token_id for one in behind] == run.with_cache.lane.sequence.completion_ids


def test_candidates_are_sorted_and_their_probabilities_those_of_softmax() -> None:
    logits = np.array([1.0, 3.0, 2.0, 3.0], np.float32)
    found = candidates(logits, 3)
    assert [one.token_id for one in found] == [1, 3, 2]
    weights = np.exp(logits.astype(np.float64))
    assert found[2].probability == pytest.approx(weights[2] / weights.sum(), rel=1e-7)
    assert found[2].logit == 2.0


def test_rows_notice_a_single_bit() -> None:
    rows = Rows(2)
    first = np.arange(12, dtype=np.float32).reshape(3, 4)
    rows.note(0, [first, first])
    again = np.vstack([first, first[:1]])
    again[1, 2] = np.nextafter(again[1, 2], np.float32(9))
    rows.note(0, [again, np.vstack([first, first[:1]])])
    assert (rows.num_rows, rows.num_repeated, rows.num_same) == (4, 6, 5)
    np.testing.assert_array_equal(rows[0], np.vstack([first, first[:1]]))  # the first time counts
    negative = np.where(first == 0, np.float32(-0.0), first)
    rows.note(0, [negative, first])
    assert (rows.num_repeated, rows.num_same) == (12, 10), "-0.0 has other bits than 0.0"
    with pytest.raises(AssertionError, match="rows from 9 on behind 4"):
        rows.note(9, [first, first])
