"""Logits of the default model after every token of a text, next to transformers'."""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvik.config import Activations, KVDType
from oracle.conftest import LLMFactory, Report
from oracle.distance import Distance, distance, joined
from oracle.hf_llama import logits
from oracle.teacher_forcing import teacher_forced

NUM_WINDOWS, WINDOW = 2, 1024  # 2,048 tokens, each window a sequence of its own

Window = tuple[list[int], npt.NDArray[np.float32]]


@pytest.fixture(scope="module")
def windows(llm_of: LLMFactory, hf_model: Any) -> list[Window]:
    """Stretches of Python's manual far apart, as token ids, and the reference's logits."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    token_ids = llm_of("int8", "f16").encode(text)
    starts = [len(token_ids) * index // NUM_WINDOWS for index in range(NUM_WINDOWS)]
    stretches = [token_ids[start : start + WINDOW] for start in starts]
    assert [len(stretch) for stretch in stretches] == [WINDOW] * NUM_WINDOWS
    return [(stretch, logits(hf_model, stretch)) for stretch in stretches]


def measured(windows: list[Window], llm_of: LLMFactory, activations: Activations, kv_dtype: KVDType) -> Distance:
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
    assert found.lead.max() < 0.02  # another top token at a tie only


@pytest.mark.parametrize("kv_dtype", ["f16", "f32"])
def test_int8_distributions_are_close_to_float32(
    windows: list[Window], llm_of: LLMFactory, report: Report, kv_dtype: KVDType
) -> None:
    found = measured(windows, llm_of, "int8", kv_dtype)
    report(found)
    assert len(found.kl) >= 2000
    assert found.mean_kl < 5e-3
