"""kvik's int8 activations next to llama.cpp's own: who is closer to float32 on the same text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvik.config import KVDType
from oracle.conftest import WINDOW, LLMFactory, Report, Window
from oracle.distance import Distance, distance, joined
from oracle.teacher_forcing import teacher_forced

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is missing (`make test-oracle` brings it)")


@pytest.fixture(scope="module")
def llama(default_model_path: Path) -> Iterator[Any]:
    """The default model in llama.cpp, which keeps the logits of every token."""
    loaded = llama_cpp.Llama(
        str(default_model_path), n_ctx=WINDOW, n_batch=512, n_threads=2, n_threads_batch=2, logits_all=True,
        verbose=False,
    )  # fmt: skip
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def llama_distance(llama: Any, windows: list[Window]) -> Distance:
    parts = []
    for token_ids, reference in windows:
        llama.reset()
        llama.eval(token_ids)
        logits = np.array(llama.scores[: len(token_ids)], np.float32)
        assert logits.any(axis=1).all()  # a row for every token
        parts.append(distance(reference, logits))
    return joined(parts)


@pytest.mark.parametrize("kv_dtype", ["f16", "f32"])
def test_int8_is_no_farther_from_float32_than_llama_cpp(
    windows: list[Window], llama_distance: Distance, llm_of: LLMFactory, report: Report, kv_dtype: KVDType
) -> None:
    decoder = llm_of("int8", kv_dtype).model.decoder
    found = joined(
        [distance(reference, teacher_forced(decoder, token_ids, kv_dtype=kv_dtype)) for token_ids, reference in windows]
    )
    report(f"mean KL of kvik {found.mean_kl:.4e}, of llama.cpp {llama_distance.mean_kl:.4e}")
    report(f"kvik: {found}")
    report(f"llama.cpp {llama_cpp.__version__}: {llama_distance}")
    assert llama_distance.mean_kl < 0.05  # the same text, model and tokens
    # Both round to int8 in groups of 32, so their means are nearly one: farther is what chance alone does not explain,
    # two standard errors of the mean difference of the same tokens.
    difference = found.kl - llama_distance.kl
    standard_error = float(difference.std() / np.sqrt(len(difference)))
    report(f"mean difference {difference.mean():.1e}, its standard error {standard_error:.1e}")
    assert difference.mean() <= 2 * standard_error
