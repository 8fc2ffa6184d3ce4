"""Greedy text of the default model, through the public API, next to transformers'."""

from __future__ import annotations

import pytest

from kvik import SamplingParams
from kvik.config import ActivationDType, KVDType
from oracle.conftest import NUM_NEW_TOKENS, LLMFactory, Report
from oracle.hf_llama import Continuation

GREEDY = SamplingParams(max_tokens=NUM_NEW_TOKENS, ignore_eos=True)
INT8_TOKENS = 64  # later tokens may leave at wider gaps: what is different has had longer to grow
KV_DTYPES: list[KVDType] = ["f16", "f32"]


def completions(
    llm_of: LLMFactory, activations: ActivationDType, kv_dtype: KVDType, prompts: list[list[int]]
) -> list[list[int]]:
    found = [completion.token_ids for completion in llm_of(activations, kv_dtype).generate(prompts, GREEDY)]
    assert [len(token_ids) for token_ids in found] == [NUM_NEW_TOKENS] * len(prompts)
    return found


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_int16_writes_what_float32_writes(
    llm_of: LLMFactory,
    prompts: list[list[int]],
    hf_continuations: list[Continuation],
    report: Report,
    kv_dtype: KVDType,
) -> None:
    closest = min(float(expected.gaps.min()) for expected in hf_continuations)
    report(f"{len(prompts)} prompts, {NUM_NEW_TOKENS} tokens each; the reference's closest choice is by {closest:.4f}")
    found = completions(llm_of, "int16", kv_dtype, prompts)
    assert found == [expected.token_ids for expected in hf_continuations]


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_int8_leaves_the_text_of_float32_at_near_ties_only(
    llm_of: LLMFactory,
    prompts: list[list[int]],
    hf_continuations: list[Continuation],
    report: Report,
    kv_dtype: KVDType,
) -> None:
    found = completions(llm_of, "int8", kv_dtype, prompts)
    leads = []
    for token_ids, expected in zip(found, hf_continuations, strict=True):
        if token_ids[:INT8_TOKENS] == expected.token_ids[:INT8_TOKENS]:
            report(f"{INT8_TOKENS} of {INT8_TOKENS} tokens the same")
            continue
        # Up to here both had the same tokens before them; from here on they write about different things.
        first = next(index for index in range(INT8_TOKENS) if token_ids[index] != expected.token_ids[index])
        logits = expected.logits[first]
        leads.append(float(logits[expected.token_ids[first]] - logits[token_ids[first]]))
        report(f"{first} of {INT8_TOKENS} tokens the same, then a reference gap of {leads[-1]:.4f}")
    assert all(0 <= lead < 0.2 for lead in leads)
