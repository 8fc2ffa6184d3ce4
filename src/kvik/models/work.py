"""What one step has to compute and to read, counted from its batch."""

from __future__ import annotations

from dataclasses import dataclass

from kvik.cache import KVCacheSpec
from kvik.models.decoder import Decoder
from kvik.ops.base import Batch
from kvik.ops.table import keys_read, keys_seen


@dataclass(frozen=True, slots=True)
class StepWork:
    """Counts of one step, or of several added up. Norms and activations, far below a hundredth, are not counted."""

    num_steps: int = 0
    num_tokens: int = 0  # computed
    weight_multiply_adds: int = 0
    attention_multiply_adds: int = 0  # a query with a key, and a weight with a value
    weight_bytes: int = 0  # read: each matrix once a step, and of experts those that are chosen, as expected
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
    """The work of one step over this batch: what its ops cost at least."""
    num_tokens, num_logits = len(batch.token_ids), len(batch.logit_rows)
    work = StepWork(num_steps=1, num_tokens=num_tokens)
    for cost, of_logits in decoder.costs(kv_spec):
        rows = num_logits if of_logits else num_tokens
        kv = cost.kv
        work += StepWork(
            weight_multiply_adds=cost.multiply_adds * rows,
            attention_multiply_adds=0 if kv is None else kv.key_multiply_adds * keys_seen(batch, kv.window),
            weight_bytes=cost.weight_bytes_for(rows),
            kv_bytes=0 if kv is None else kv.key_bytes * keys_read(batch, kv.kv_group, kv.window),
        )
    return work
