"""What one step has to compute and to read, counted from its batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvik.cache import KVCacheSpec
from kvik.config import MAX_TOKENS
from kvik.models.decoder import Decoder
from kvik.ops.base import Batch


@dataclass(frozen=True, slots=True)
class StepWork:
    """Counts of one step, or of several added up. Norms and activations, far below a hundredth, are not counted."""

    num_steps: int = 0
    num_tokens: int = 0  # computed
    weight_multiply_adds: int = 0
    attention_multiply_adds: int = 0  # a query with a key, and a weight with a value
    weight_bytes: int = 0  # read: each matrix once a step
    kv_bytes: int = 0  # read: what a sequence's newest token sees, once a step for all of its tokens

    @property
    def multiply_adds(self) -> int:
        """Of weights and attention."""
        return self.weight_multiply_adds + self.attention_multiply_adds

    @property
    def read_bytes(self) -> int:
        """Of weights, keys and values."""
        return self.weight_bytes + self.kv_bytes

    def __add__(self, other: StepWork) -> StepWork:
        return StepWork(
            self.num_steps + other.num_steps,
            self.num_tokens + other.num_tokens,
            self.weight_multiply_adds + other.weight_multiply_adds,
            self.attention_multiply_adds + other.attention_multiply_adds,
            self.weight_bytes + other.weight_bytes,
            self.kv_bytes + other.kv_bytes,
        )


def count_work(decoder: Decoder, kv_spec: KVCacheSpec, batch: Batch) -> StepWork:
    """The work of one step over this batch: a token attends to itself and all before it, or its window."""
    spec, weights = decoder.spec, decoder.weights
    num_tokens, num_logits = len(batch.token_ids), len(batch.logit_rows)
    positions = batch.positions.astype(np.int64)
    layers = {None: kv_spec.num_full_layers} | {one.window: one.num_layers for one in kv_spec.windows}
    num_keys = num_read = 0
    for window, count in layers.items():
        first = np.maximum(0, positions + 1 - (window or MAX_TOKENS))
        num_keys += count * int((positions + 1 - first).sum())
        num_read += count * _tokens_seen(batch, first, positions)
    head = weights.lm_head.rows * weights.lm_head.matrix.columns
    return StepWork(
        num_steps=1,
        num_tokens=num_tokens,
        weight_multiply_adds=num_tokens * weights.layer_multiply_adds + num_logits * head,
        attention_multiply_adds=2 * spec.num_heads * spec.head_dim * num_keys,
        weight_bytes=weights.step_bytes(with_logits=num_logits > 0) if num_tokens else 0,
        kv_bytes=num_read * kv_spec.token_bytes // kv_spec.num_layers,
    )


def _tokens_seen(batch: Batch, first: npt.NDArray[np.int64], last: npt.NDArray[np.int64]) -> int:
    """Keys that some token of the batch sees, each sequence's once: its tokens are neighbours."""
    num_sequences = len(batch.block_tables)
    low, high = np.full(num_sequences, MAX_TOKENS, np.int64), np.full(num_sequences, -1, np.int64)
    np.minimum.at(low, batch.sequence_index, first)
    np.maximum.at(high, batch.sequence_index, last)
    return int(np.maximum(0, high + 1 - low).sum())
