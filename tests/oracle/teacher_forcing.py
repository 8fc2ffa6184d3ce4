"""kvik's logits after every token of a given text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvik.models.decoder import Decoder
from kvik.ops.base import Batch


def teacher_forced(
    decoder: Decoder, token_ids: Sequence[int], *, kv_dtype: str = "f16", chunks: Sequence[int] = (512,)
) -> npt.NDArray[np.float32]:
    """Logits after each token, (T, vocab_size), over a KV cache of its own.

    `chunks` are the tokens of each step; the last holds for all the steps after.
    """
    spec = decoder.spec.kv_spec(kv_dtype)
    num_blocks = spec.pool_blocks_for(len(token_ids))
    forward = decoder.capture(decoder.ops.allocate_kv(spec, num_blocks))
    # Blocks in no particular order, as a pool that has been in use for a while gives them.
    table = np.random.default_rng(0).permutation(num_blocks).astype(np.int32)
    ids = np.asarray(token_ids, np.int32)
    parts: list[npt.NDArray[np.float32]] = []
    start = 0
    while start < len(ids):
        count = chunks[min(len(parts), len(chunks) - 1)]
        positions = np.arange(start, min(start + count, len(ids)), dtype=np.int32)
        batch = Batch.in_blocks(
            token_ids=ids[positions],
            positions=positions,
            sequence_index=np.zeros(len(positions), np.int32),
            block_tables=table[None],
            logit_rows=np.arange(len(positions), dtype=np.int32),
            num_groups=len(spec.groups),
        )
        parts.append(decoder.ops.to_numpy(forward(batch)))
        start += count
    return np.concatenate(parts)
