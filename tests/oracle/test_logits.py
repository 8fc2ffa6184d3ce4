"""Logits of the default model after every token of a text, next to transformers'."""

from __future__ import annotations

import pytest

from kvik.config import ActivationDType, KVDType
from oracle.conftest import LLMFactory, Report, Window
from oracle.distance import Distance, distance, joined
from oracle.teacher_forcing import teacher_forced


def measured(windows: list[Window], llm_of: LLMFactory, activations: ActivationDType, kv_dtype: KVDType) -> Distance:
    decoder = llm_of(activations, kv_dtype).model.decoder
    return joined(
        [distance(reference, teacher_forced(decoder, token_ids, kv_dtype=kv_dtype)) for token_ids, reference in windows]
    )


@pytest.mark.parametrize("kv_dtype", ["f16", "f32"])
def test_int16_logits_are_those_of_float32(
    windows: list[Window], llm_of: LLMFactory, report: Report, kv_dtype: KVDType
) -> None:
    found = measured(windows, llm_of, "int16", kv_dtype)
    report(found)
    assert found.relative_rms <= 1e-3
    assert found.mean_kl < 1e-5
    assert found.lead.max() < 0.02  # another top token at a tie only


@pytest.mark.parametrize("kv_dtype", ["f16", "f32"])
def test_int8_distributions_are_close_to_float32(
    windows: list[Window], llm_of: LLMFactory, report: Report, kv_dtype: KVDType
) -> None:
    found = measured(windows, llm_of, "int8", kv_dtype)
    report(found)
    assert len(found.kl) >= 2000
    assert found.mean_kl < 5e-3
