"""Random rows of logits and what they are sampled with."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kvik.config import SamplingParams
from kvik.engine.sampler import SampleRow
from ops.arrangement import FloatArray

KINDS = ("normal", "peaked", "equals", "two values", "impossible", "huge", "tiny", "zeros")


def random_logits(kind: str, count: int, vocab_size: int, rng: np.random.Generator) -> FloatArray:
    """Like a model's, flat, full of equals, mostly impossible, near the largest or the least of float32."""
    logits: npt.NDArray[Any] = rng.normal(0, 3, (count, vocab_size))
    if kind == "peaked":
        logits[:, rng.integers(0, vocab_size, 5)] += 12
    if kind == "equals":
        logits = np.round(logits)
    if kind == "two values":
        logits = rng.integers(0, 2, logits.shape)
    if kind == "impossible":
        logits[rng.random(logits.shape) < 0.9] = -np.inf
        logits[:, rng.integers(vocab_size)] = 0.0
    if kind == "huge":
        logits *= 2e37
    if kind == "tiny":  # denormals, which must not be taken as zero
        logits *= 1e-44
    if kind == "zeros":  # of both signs, which are equal
        logits = np.where(logits < 0, -0.0, 0.0)
    return logits.astype(np.float32)


def random_rows(logits: FloatArray, count: int, rng: np.random.Generator) -> list[SampleRow]:
    """Any settings together; several rows may read the same logits."""
    num_logits, vocab_size = logits.shape

    def chance(share: float) -> bool:
        return bool(rng.random() < share)

    def ids(number: int) -> list[int]:
        found: list[int] = rng.integers(0, vocab_size, number).tolist()
        return found

    rows = []
    for _ in range(count):
        options: dict[str, Any] = {"temperature": float(rng.choice([0.0, 5e-324, 1e-3, 0.7, 1.0, 3.0, 100.0]))}
        if chance(0.4):
            options["top_k"] = int(rng.choice([1, 2, 5, 40, 64, 1000, vocab_size, vocab_size + 1]))
        if chance(0.5):
            options["top_p"] = float(rng.choice([5e-324, 0.01, 0.5, 0.9, 0.999, 1 - 1e-12]))
        if chance(0.3):
            options["min_p"] = float(rng.choice([5e-324, 1e-12, 1e-3, 0.1, 1.0]))
        if chance(0.2):
            options["repetition_penalty"] = float(rng.choice([0.01, 1.3, 100.0]))
        if chance(0.2):
            options["presence_penalty"] = float(rng.choice([-100.0, 0.5]))
        if chance(0.2):
            options["frequency_penalty"] = float(rng.choice([-0.3, 0.7, 100.0]))
        if chance(0.2):
            options["logit_bias"] = {token_id: float(rng.uniform(-100, 100)) for token_id in ids(5)}
        if chance(0.3):
            options["logprobs"] = int(rng.integers(0, 21))
        rows.append(
            SampleRow(
                row=int(rng.integers(num_logits)),
                params=SamplingParams(**options),
                seed=int(rng.integers(2**64, dtype=np.uint64)),
                position=int(rng.integers(0, 2**40)),
                token_ids=ids(20),
                num_prompt_tokens=int(rng.integers(0, 21)),
                forbidden_ids=ids(3) if chance(0.2) else (),
                mask=rng.bytes((vocab_size + 7) // 8) if chance(0.2) else None,
            )
        )
    return rows
